"""Names that libraries interpret, in every place of every command: files keep them as they are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import assert_same_end, saved_steps, train

from jaxgpt import evaluate, export, prepare, sample
from jaxgpt.config.command_line import RunFlags, parse_run
from jaxgpt.data.token_file import write_shard
from jaxgpt.errors import UserError
from jaxgpt.files import user_path

NAMES = {
    "wildcards": "lr[1e-3]*?{a,b}",
    "not UTF-8": "caf\udce9",
    "markup": "[/INST] [red]x :fire:",
    "control": "new\nline\ttab\x1b[31m\x7f",
    "a URL's": "%2F#?=&gs:",
    "longest": "n" * 255,
}


@pytest.mark.slow
def test_any_name_goes_through_every_command(tmp_path: Path, capsys) -> None:
    """All kinds of names, one in another: 20 s."""
    place = tmp_path.joinpath(*NAMES.values())
    texts, data, run, exported = (place / f"{name} {NAMES['not UTF-8']}" for name in "trxe")
    texts.mkdir(parents=True)
    for name in NAMES.values():
        path = texts / f"{name.replace('/', '')[:251]}.txt"
        path.write_text(f"A text called {path.name!r}. " * 40)

    def done(command: Callable[[list[str]], int], *arguments: str | Path) -> str:
        capsys.readouterr()
        assert command([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    done(prepare.main, texts, "--out", data, "--tokenizer", "byte", "--val-fraction", "0.4")
    assert "byte" in done(prepare.main, "--inspect", data)
    flags = ("--dataset", "x", "--data-dir", str(data))
    assert train(run, *flags, "--max-iters", "4") == 0
    assert train(run, *flags, "--max-iters", "8") == 0
    assert saved_steps(run)[-2:] == [4, 8]
    assert train(tmp_path / "plain", *flags, "--max-iters", "8") == 0
    assert_same_end(run, tmp_path / "plain")
    done(sample.main, "--out-dir", run, "--prompt", "A", "--max-new-tokens", "3")
    done(evaluate.main, "--out-dir", run, "--val-tokens", "64", "--json")
    done(export.main, "--out-dir", run, "--to", exported)
    done(sample.main, "--init-from", exported, "--prompt", "A", "--max-new-tokens", "3")
    done(export.main, "--out-dir", run, "--to", place / ("m" * 255))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder_of_any_name_is_named(tmp_path: Path, refused, name: str) -> None:
    err = refused(tmp_path / "run", "--dataset", "x", "--data-dir", str(tmp_path / NAMES[name]))
    assert "no such folder" in err or "File name too long" in err


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3:/b", "hf://owner/name", "file:///tmp/x"])
def test_a_url_is_no_folder(tmp_path: Path, refused, monkeypatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"--out-dir {Path(path)}: is a URL" in refused(Path(path))
    write_shard(tmp_path / "x.bin", np.zeros(9, np.uint16))
    assert "--data-dir" in refused(Path("run"), "--dataset", "x", "--data-dir", path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_a_home_folder_that_does_not_exist_is_no_folder_called_tilde() -> None:
    with pytest.raises(UserError, match=r"--out ~nobody-here/x: there is no such home folder"):
        user_path("~nobody-here/x", "--out")
    assert user_path("./~x", "--out") == Path("~x")


def test_a_tilde_after_a_dot_is_a_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text('dataset = "mine"\ndata_dir = ".//~"')
    cfg, _, _ = parse_run(
        RunFlags,
        ["--preset", "x.toml", "--out-dir", "./~/run"],
        prog="p",
        description="",
        default_preset=lambda: None,
    )
    assert (cfg.out_dir, cfg.data_dir) == (tmp_path / "~" / "run", tmp_path / "~")
