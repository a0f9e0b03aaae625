"""`python -m jaxgpt.prepare` from the command line to the shards, and on to a trained model."""

import hashlib
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxgpt import train
from jaxgpt.data.manifest import load_manifest
from jaxgpt.data.shards import load_split
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.prepare import main

SCRIPTS = Path(__file__).parents[1] / "scripts"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
build = runpy.run_path(str(SCRIPTS / "build_fineweb_like.py"))["build"]
SMALL = ("--shard-tokens", "30K", "--unit-bytes", "100K")


def prepare(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that cannot work says; one line, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        prepare(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def contents(out: Path) -> dict[str, str]:
    """SHA-256 of every file that training or a reader sees, by name."""
    files = [*out.glob("*.bin"), *out.glob("manifest*.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def stream(out: Path, split: str) -> np.ndarray:
    tokens = load_split(out, split, 50_257)  # type: ignore[arg-type]
    return np.array(tokens.window(0, len(tokens)))


@pytest.fixture(scope="module")
def fineweb_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parquet files with FineWeb's columns, 0.9 MB of text."""
    folder = tmp_path_factory.mktemp("fineweb-like")
    build(folder, files=3, n_bytes=900_000, row_group=40)
    return folder


@pytest.fixture(scope="module")
def prepared(fineweb_like: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run makes of them that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out"
    assert prepare(fineweb_like, "--out", out, *SMALL, "--workers", "1") == 0
    return out


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty short text files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"Text number {number}. " * (number + 1))
    return folder


def test_two_commands_go_from_parquet_files_to_a_trained_model(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data" / "fineweb"
    files = sorted(fineweb_like.glob("*.parquet"))
    assert prepare(*files, "--out", out, "--val-tokens", "20K", "--shard-tokens", "100K") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    command = told.removeprefix("train on it: python -m jaxgpt.train ").split()
    small = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--eval-iters=2"]
    flags = ["--preset=demo", "--tokenizer=gpt2", f"--out-dir={tmp_path}/run", "--max-iters=3"]
    assert train.main([*command, *flags, *small]) == 0
    assert "epochs" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


def test_the_number_of_workers_changes_no_byte(
    fineweb_like: Path, prepared: Path, tmp_path: Path
) -> None:
    assert prepare(fineweb_like, "--out", tmp_path / "out", *SMALL, "--workers", "3") == 0
    assert contents(tmp_path / "out") == contents(prepared)


def test_the_size_of_the_units_changes_no_byte(
    fineweb_like: Path, prepared: Path, tmp_path: Path
) -> None:
    flags = ("--shard-tokens", "30K", "--unit-bytes", "1M")
    assert prepare(fineweb_like, "--out", tmp_path / "out", *flags) == 0
    assert contents(tmp_path / "out") == contents(prepared)


def test_every_document_is_there_once_with_the_end_of_text_token_before_it(
    fineweb_like: Path, prepared: Path
) -> None:
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer("gpt2")
    expected = []
    for path in sorted(fineweb_like.glob("*.parquet")):
        expected += pq.read_table(path, columns=["text"])["text"].to_pylist()
    found = []
    for split in ("train", "val"):
        tokens = stream(prepared, split)
        assert tokens[0] == tokenizer.eot
        starts = np.flatnonzero(tokens == tokenizer.eot)
        found += [tokenizer.decode(ids[1:]) for ids in np.split(tokens, starts)[1:]]
    assert sorted(found) == sorted(expected)


def test_tokens_minus_documents_are_the_source_s_own_count(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    assert manifest is not None
    count = manifest["token_count"]
    assert count["equal"]
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    documents = sum(split["documents"] for split in manifest["splits"].values())
    assert count["source_says"] == count["tokens_minus_documents"] == tokens - documents > 100_000


def test_a_wrong_count_in_the_source_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["some words"] * 100, "token_count": [3] * 100})
    pq.write_table(table, tmp_path / "a.parquet")
    assert prepare(tmp_path / "a.parquet", "--out", tmp_path / "o", "--val-tokens", "10") == 0
    assert "NOT EQUAL" in capsys.readouterr().out


# Stopping and going on


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen]]:
    started: list[subprocess.Popen] = []
    yield started
    for child in started:
        if child.poll() is None:
            child.kill()
        child.wait()


def start(
    children: list[subprocess.Popen], *arguments: object, session: bool = False
) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-m", "jaxgpt.prepare", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    )
    children.append(child)
    return child


def wait_for(folder: Path, pattern: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.005)


def test_a_run_killed_at_any_moment_and_run_again_ends_with_the_same_bytes(
    fineweb_like: Path, prepared: Path, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    draw, out = random.Random(4), tmp_path / "out"
    patterns = (".prepare/plan.json", ".prepare/parts/*", "*_train_000002.bin")
    for workers, pattern in enumerate(patterns, start=1):
        child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", workers)
        wait_for(out, pattern)
        time.sleep(draw.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (out / "manifest.json").exists(), "killed too late to prove anything"
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert finished
    assert prepare(fineweb_like, "--out", out, *SMALL) == 0
    assert contents(out) == contents(prepared)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "written again"
    assert not any((out / ".prepare" / "parts").iterdir())


def test_ctrl_c_at_a_terminal_while_workers_start_is_told_in_one_line(
    fineweb_like: Path, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    out = tmp_path / "out"
    child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", "2", session=True)
    wait_for(out, ".prepare/parts")  # a worker starts right after, and imports for half a second
    time.sleep(0.2)
    os.killpg(child.pid, signal.SIGINT)  # a terminal's reaches workers too
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors == "python -m jaxgpt.prepare: stopped; the same command goes on from here\n"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_does(
    fineweb_like: Path,
    prepared: Path,
    tmp_path: Path,
    children: list[subprocess.Popen],
    sent: signal.Signals,
    code: int,
) -> None:
    out = tmp_path / "out"
    child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", "2")
    wait_for(out, ".prepare/parts/*")
    child.send_signal(sent)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code
    assert errors == "python -m jaxgpt.prepare: stopped; the same command goes on from here\n"
    assert prepare(fineweb_like, "--out", out, *SMALL) == 0
    assert contents(out) == contents(prepared)


def test_workers_do_not_outlive_a_parent_that_is_killed(
    fineweb_like: Path, tmp_path: Path, children: list[subprocess.Popen]
) -> None:
    child = start(children, fineweb_like, "--out", tmp_path / "out", *SMALL, "--workers", "2")
    wait_for(tmp_path / "out", ".prepare/parts/*")
    of_child = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(child.pid)], capture_output=True, text=True
    )
    workers = [int(pid) for pid in of_child.stdout.split()]
    assert workers
    child.kill()
    child.wait()
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_second_run_in_the_same_folder_is_refused(
    fineweb_like: Path, tmp_path: Path, children: list[subprocess.Popen], capsys
) -> None:
    out = tmp_path / "out"
    child = start(children, fineweb_like, "--out", out, *SMALL, "--workers", "1")
    wait_for(out, ".prepare/plan.json")
    os.kill(child.pid, signal.SIGSTOP)
    try:
        message = refusal(capsys, fineweb_like, "--out", out, *SMALL)
    finally:
        os.kill(child.pid, signal.SIGCONT)
    assert "another prepare is writing to it" in message


def test_a_finished_folder_is_left_as_it_is(
    fineweb_like: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.glob("*.*")}
    assert prepare(fineweb_like, "--out", prepared, *SMALL) == 0
    assert "is complete; there is nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in prepared.glob("*.*")} == before


# Limits, added data, validation


def test_a_limit_stops_and_a_larger_one_goes_on_where_it_stopped(
    fineweb_like: Path, tmp_path: Path
) -> None:
    flags = (fineweb_like, *SMALL, "--val-tokens", "20K", "--workers", "2")
    assert prepare(*flags, "--out", tmp_path / "all") == 0
    out = tmp_path / "limited"
    assert prepare(*flags, "--out", out, "--limit-tokens", "45K") == 0
    assert len(stream(out, "train")) == 45_000
    first = contents(out)
    assert prepare(*flags, "--out", out, "--limit-tokens", "100K") == 0
    assert len(stream(out, "train")) == 100_000
    kept = {name: sha for name, sha in contents(out).items() if name in first}
    first.pop("manifest.json"), kept.pop("manifest.json")
    assert kept == first, "a finished shard was written again"
    assert prepare(*flags, "--out", out) == 0
    for split in ("train", "val"):
        np.testing.assert_array_equal(stream(out, split), stream(tmp_path / "all", split))


def test_a_limited_run_does_not_depend_on_the_workers_either(
    fineweb_like: Path, tmp_path: Path
) -> None:
    for workers in (1, 3):
        out = tmp_path / str(workers) / "out"
        flags = ("--limit-tokens", "70K", "--workers", workers)
        assert prepare(fineweb_like, "--out", out, *SMALL, *flags) == 0
    assert contents(tmp_path / "1" / "out") == contents(tmp_path / "3" / "out")


def test_the_first_tokens_are_validation_where_they_are_asked_for(
    fineweb_like: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fineweb"
    flags = ("--val-tokens", "50K", "--shard-tokens", "50K", "--unit-bytes", "100K")
    assert prepare(fineweb_like, "--out", out, *flags) == 0
    names = [shard["file"] for shard in json.loads((out / "manifest.json").read_text())["shards"]]
    assert names[:2] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert names[-1] == "fineweb_val_000000.bin"
    import pyarrow.parquet as pq

    first = pq.read_table(sorted(fineweb_like.glob("*.parquet"))[0], columns=["text"])["text"]
    tokenizer = load_tokenizer("gpt2")
    expected = np.concatenate([[tokenizer.eot, *tokenizer.encode(str(t))] for t in first[:10]])
    val = stream(out, "val")
    assert len(val) == 50_000
    np.testing.assert_array_equal(val[: len(expected)], expected)


def test_adding_files_leaves_finished_shards_and_the_validation_documents(
    texts: Path, tmp_path: Path
) -> None:
    out, flags = tmp_path / "out", ("--val-fraction", "0.3", "--shard-tokens", "200")
    later = [texts / "00.txt", texts / "39.txt"]
    first = [path for path in sorted(texts.iterdir()) if path not in later]
    assert prepare(*first, "--out", out, *flags) == 0
    before, val = contents(out), stream(out, "val")
    assert prepare(*first, *later, "--out", out, *flags) == 0
    after = contents(out)
    assert all(after[name] == sha for name, sha in before.items() if name != "manifest.json")
    np.testing.assert_array_equal(stream(out, "val")[: len(val)], val)
    tokens = sum(len(stream(out, split)) for split in ("train", "val"))
    assert prepare(texts, "--out", tmp_path / "all", *flags) == 0
    assert tokens == sum(len(stream(tmp_path / "all", split)) for split in ("train", "val"))


def test_a_document_goes_to_the_same_split_whatever_is_around_it(
    texts: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer("gpt2")

    def validation(out: Path) -> set[str]:
        tokens = stream(out, "val")
        pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[1:]
        return {tokenizer.decode(ids[1:]) for ids in pieces}

    some = sorted(texts.iterdir())[::2]
    assert prepare(texts, "--out", tmp_path / "all", "--val-fraction", "0.3") == 0
    assert prepare(*some, "--out", tmp_path / "some", "--val-fraction", "0.3") == 0
    named = {path.read_text() for path in some}
    assert validation(tmp_path / "some") == validation(tmp_path / "all") & named
    assert validation(tmp_path / "some")


def test_a_document_longer_than_a_shard_is_split_and_not_lost(tmp_path: Path) -> None:
    text = "".join(f"word{number} " for number in range(20_000))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    flags = ("--val-tokens", "100", "--shard-tokens", "1K")
    assert prepare(tmp_path / "long.jsonl", "--out", tmp_path / "out", *flags) == 0
    tokens = np.concatenate([stream(tmp_path / "out", split) for split in ("val", "train")])
    assert load_tokenizer("gpt2").decode(tokens[1:]) == text
    assert len(list((tmp_path / "out").glob("*.bin"))) > 50


def test_bytes_as_tokens_are_trained_on_with_the_tokenizer_that_made_them(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(texts, "--out", out, "--tokenizer", "byte") == 0
    assert f"--data-dir {out} --tokenizer byte" in capsys.readouterr().out
    tokens = stream(out, "train")
    assert tokens[0] == 256
    assert bytes(tokens[1:7].astype(np.uint8)) == b"Text n"


# Mistakes


def test_what_cannot_be_read_is_refused_in_a_sentence(
    texts: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pdf").touch()
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([tmp_path / "gone.txt"], "gone.txt: no such file or folder"),
        ([f"{tmp_path}/*.parquet"], "*.parquet: no file matches"),
        ([tmp_path / "a.pdf"], "a.pdf: is no text that can be read here"),
        ([tmp_path / "empty"], "empty: holds no text"),
        ([prepared], "holds tokens already; train on them with"),
        ([next(prepared.glob("*.bin"))], "holds tokens already"),
        ([texts / "01.txt"], "is one document, and validation takes whole ones"),
        ([texts, "--tokenizer", "o200k_base"], "has 200,019 ids"),
        ([texts, "--out", texts / "01.txt"], "is a file; choose a folder with --out"),
        ([texts, "--val-fraction", "2"], "must be between 0 and 1"),
        ([texts, "--val-fraction", "0.1", "--val-tokens", "5"], "two rules for validation"),
        ([texts, "--limit-tokens", "many"], "--limit-tokens many: is no number; write 27B"),
        ([texts, "--shard-tokens", "3B"], "holds at most 2,147,483,647"),
        ([texts, "--shard_tokns", "3"], "did you mean '--shard-tokens'?"),
        ([texts, "--rank", "3"], "--rank and --world-size belong together"),
        ([texts, "--rank", "3", "--world-size", "3"], "rank 3 of 3"),
        ([texts, "--tokens", "3"], "--tokens belongs to --ready"),
        ([texts, "--name", "x", "--split", "dev"], "--name and --split: of data sets of the Hub"),
        ([texts, "--out", texts], "holds the text itself; choose another folder with --out"),
        (["fineweb", "--ready", "--tokenizer", "byte"], "are; leave out --tokenizer"),
        (["fineweb", "fineweb-edu", "--ready"], "--ready takes one name"),
        (["fineweb", "--ready", "--rank", "0", "--world-size", "2"], "do it in one process"),
        (["--inspect", tmp_path / "gone"], "gone: no such folder; name a folder of tokens"),
        ([], "name what to prepare"),
    ):
        out = [] if "--out" in arguments or not arguments else ["--out", tmp_path / "o"]
        assert said in refusal(capsys, *arguments, *out)
    assert not (tmp_path / "o").exists(), "a mistake leaves no folder"
    assert not (texts / ".prepare").exists()


def test_a_mistake_is_answered_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from jaxgpt.prepare import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, *sorted({'numpy', 'pyarrow', 'datasets', 'jax',"
        " 'tiktoken', 'huggingface_hub'} & set(sys.modules)))"
    )
    for flag, exit_code in (("--help", "0"), ("--limt-tokens", "2"), ("--workers=many", "2")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == exit_code, done


def test_another_source_or_other_settings_are_refused(
    fineweb_like: Path, prepared: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted(fineweb_like.glob("*.parquet"))[0]
    for arguments, said in (
        ([texts, *SMALL], "has 000_00000.parquet in it already"),
        ([first, *SMALL], "has 001_00000.parquet in it already"),
        ([fineweb_like, "--unit-bytes", "100K"], "--shard-tokens 30000, not 100000000"),
        ([fineweb_like, *SMALL, "--text-column", "url"], "--text-column text, not url"),
        ([fineweb_like, *SMALL, "--tokenizer", "byte"], "--tokenizer gpt2, not byte"),
        ([fineweb_like, *SMALL, "--val-tokens", "9"], "--val-tokens None, not 9"),
    ):
        message = refusal(capsys, *arguments, "--out", prepared)
        assert said in message
        assert "--out" in message


def test_an_input_that_changed_under_a_begun_folder_is_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(texts, "--out", tmp_path / "out") == 0
    changed = texts / "07.txt"
    changed.write_text(changed.read_text().replace("7", "8"))  # as long as it was
    message = refusal(capsys, texts, "--out", tmp_path / "out")
    assert f"{changed}: is not what {tmp_path / 'out'} was begun with" in message


def test_a_mistake_that_made_nothing_does_not_bind_the_folder(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    message = refusal(capsys, fineweb_like, "--out", out, "--text-column", "txt")
    assert "has no column 'txt'" in message
    assert "text, id, dump, url" in message
    assert prepare(fineweb_like, "--out", out, *SMALL) == 0


def test_documents_that_cannot_be_used_are_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps({"text": f"Document {n}."}).encode() for n in range(60)]
    bad = [b'{"text": null}', b'{"text": ""}', b'{"text": "caf\xe9"}', b"[" * 100_000, b'{"text"']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good, *bad]))
    (tmp_path / "b.txt").write_bytes("naïve".encode("latin-1"))
    arguments = (tmp_path / "a.jsonl", tmp_path / "b.txt", "--val-fraction", "0.3")
    assert prepare(*arguments, "--out", tmp_path / "out") == 0
    told = " ".join(capsys.readouterr().out.split())
    for line in (
        "left out: null 1 documents, the first in a.jsonl",
        "left out: empty 1 documents, the first in a.jsonl",
        "left out: not UTF-8 2 documents, the first in a.jsonl",
        "left out: not JSON 2 documents, the first in a.jsonl",
    ):
        assert line in told
    manifest = load_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["documents"]["used"] == 60
    assert sum(split["documents"] for split in manifest["splits"].values()) == 60
    assert prepare(*arguments, "--out", tmp_path / "o2", "--encoding-errors", "replace") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not UTF-8" not in told
    replaced = load_manifest(tmp_path / "o2")
    assert replaced is not None
    assert replaced["documents"]["used"] == 62


def test_text_of_which_nothing_can_be_used_is_told_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "others": [1, 2]}, indent=1))
    message = refusal(capsys, tmp_path / "a.json", "--out", tmp_path / "out")
    assert f"none of the documents can be used, each is not JSON ({tmp_path / 'a.json'})" in message


def test_tokens_made_inside_the_folder_of_the_text_are_no_text(
    texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(texts)
    assert prepare(".", "--val-fraction", "0.3") == 0
    assert (texts / "data" / "texts" / "manifest.json").is_file()
    assert prepare(".", "--val-fraction", "0.3") == 0
    assert "is complete; there is nothing to do" in capsys.readouterr().out


def test_a_finished_shard_that_is_gone_is_told(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (texts, "--out", tmp_path / "out", "--val-fraction", "0.3")
    assert prepare(*arguments) == 0
    lost = tmp_path / "out" / "out_train_000001.bin"
    lost.unlink()
    assert f"{lost}: was written and is missing" in refusal(capsys, *arguments)


def test_the_bar_of_a_limited_run_ends_where_the_limit_is_reached(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*SMALL, "--val-tokens", "10K", "--limit-tokens", "20K")
    assert prepare(fineweb_like, "--out", tmp_path / "out", *flags) == 0
    told = " ".join(capsys.readouterr().out.split())
    size = sum(path.stat().st_size for path in fineweb_like.glob("*.parquet"))
    share = 30_000 * 4.6 / (size * 1.56)
    (kilobytes,) = re.findall(r"the limit is reached after about ([\d.]+) kB", told)
    assert float(kilobytes) == pytest.approx(size * share / 1000, rel=0.01)


def test_a_folder_of_someone_else_s_shards_is_not_written_to(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxgpt.data.token_file import write_shard

    write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(9))
    assert "did not put there" in refusal(capsys, texts, "--out", tmp_path)


def test_a_split_without_documents_is_told_with_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    arguments = (tmp_path / "0.txt", tmp_path / "1.txt", "--out", tmp_path / "out")
    assert "--sample-by paragraph" in refusal(capsys, *arguments, "--val-fraction", "1e-9")
    arguments = (*arguments[:2], "--out", tmp_path / "out2", "--val-tokens", "1K")
    assert "all its tokens are validation" in refusal(capsys, *arguments)


def test_a_full_disk_is_told_before_anything_is_read(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = refusal(capsys, texts, "--out", tmp_path / "out")
    assert "of disk and has 1.0 kB free" in message
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_disk_that_fills_up_is_told_and_gone_on_from(
    fineweb_like: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = (
        "import resource, sys; from jaxgpt.prepare import main\n"
        "limit = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "sys.exit(main(sys.argv[2:]))"
    )
    for limit in ("30000", "60000"):  # less than a unit's tokens, less than a shard
        command = [sys.executable, "-c", code, limit, str(fineweb_like), "--out", str(out), *SMALL]
        full = subprocess.run(command, capture_output=True, text=True)
        assert full.returncode == 2
        assert "File too large; the same command goes on once that is mended" in full.stderr
        assert len(full.stderr.strip().splitlines()) == 1, full.stderr
    assert prepare(fineweb_like, "--out", out, *SMALL) == 0
    assert contents(out) == contents(prepared)


def test_it_goes_on_when_nobody_takes_what_it_says(texts: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "jaxgpt.prepare",
        str(texts),
        "--out",
        str(tmp_path / "a" / "out"),
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=full, timeout=120)
    assert done.returncode == 0
    assert prepare(texts, "--out", tmp_path / "b" / "out") == 0
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_a_damaged_file_stops_the_run_and_keeps_what_is_finished(
    fineweb_like: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for path in fineweb_like.glob("*.parquet"):
        (folder / path.name).write_bytes(path.read_bytes())
    last = sorted(folder.glob("*.parquet"))[-1]
    whole = last.read_bytes()
    middle = len(whole) // 2
    last.write_bytes(whole[:middle] + bytes(2000) + whole[middle + 2000 :])
    message = refusal(capsys, folder, "--out", out, *SMALL, "--workers", "1")
    assert f"{last}: " in message
    assert any(out.glob("*.bin"))


# Several machines


def test_the_ranks_shards_in_order_are_those_of_one_process(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (fineweb_like, *SMALL, "--val-tokens", "20K")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert prepare(*flags, "--out", alone) == 0
    for rank in (1, 0):
        ranked = ("--rank", rank, "--world-size", 2, "--workers", "1")
        assert prepare(*flags, "--out", shared, *ranked) == 0
        assert f"python -m jaxgpt.prepare --merge {shared}" in capsys.readouterr().out
        if rank:
            assert "rank 0 of 2 has not finished" in refusal(capsys, "--merge", shared)
    assert prepare("--merge", shared) == 0
    for split in ("train", "val"):
        np.testing.assert_array_equal(stream(shared, split), stream(alone, split))
    merged, single = load_manifest(shared), load_manifest(alone)
    assert merged is not None
    assert single is not None
    for name in ("splits", "documents", "token_count", "tokenizer", "source", "validation"):
        assert merged[name] == single[name], name


def test_another_number_of_processes_is_refused(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    plan = out / ".prepare" / "rank-000-of-002" / "plan.json"
    plan.parent.mkdir(parents=True)
    plan.touch()
    (alone / ".prepare").mkdir(parents=True)
    (alone / ".prepare" / "plan.json").touch()
    ranked = ("--rank", "0", "--world-size", "3")
    for folder, flags, was in ((out, (), 2), (out, ranked, 2), (alone, ranked, 1)):
        message = refusal(capsys, fineweb_like, "--out", folder, *SMALL, *flags)
        assert f"was begun with --world-size {was}, not" in message


def test_text_is_not_mixed_with_ready_made_shards(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    (tmp_path / "out" / ".prepare" / "ready.json").write_text('{"repo": "a/b"}')
    assert "holds ready-made shards" in refusal(capsys, texts, "--out", tmp_path / "out")


def test_too_many_ranks_for_the_input_are_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--out", tmp_path / "out", "--val-fraction", "0.3", "--rank", "0")
    message = refusal(capsys, texts, *flags, "--world-size", "9")
    assert "the input is only 1 units of work" in message
    assert prepare(texts, *flags, "--world-size", "1") == 0, "the mistake does not bind the folder"


def test_ranks_that_read_the_same_files_at_two_commits_are_merged(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for rank in (0, 1):
        ranked = ("--rank", rank, "--world-size", 2, "--workers", "1")
        flags = (*SMALL, "--val-tokens", "20K")
        assert prepare(fineweb_like, "--out", out, *flags, *ranked) == 0
        path = out / f"manifest-00{rank}-of-002.json"
        manifest = json.loads(path.read_text())
        manifest["source"]["commit"] = "ab"[rank] * 40  # the data set's page was edited meanwhile
        path.write_text(json.dumps(manifest))
    assert prepare("--merge", out) == 0
    changed = json.loads((out / "manifest-001-of-002.json").read_text())
    changed["source"]["sha256_of_inputs"] = "0" * 64
    (out / "manifest-001-of-002.json").write_text(json.dumps(changed))
    assert "they differ in source" in refusal(capsys, "--merge", out)


def test_ranks_without_a_document_for_validation_are_not_merged_into_a_broken_folder(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "out", (*SMALL, "--val-fraction", "1e-9", "--workers", "1")
    for rank in (0, 1):
        ranked = ("--rank", rank, "--world-size", 2)
        assert prepare(fineweb_like, "--out", out, *flags, *ranked) == 0
    assert "no rank has a token of 'val'" in refusal(capsys, "--merge", out)
    assert not (out / "manifest.json").exists()


# Other trainers


def test_shards_are_those_of_llm_c_and_modded_nanogpt_byte_for_byte(tmp_path: Path) -> None:
    """The hashes are of files that their own scripts wrote of this text; see the JSON's command."""
    recorded = json.loads((RESULTS / "interchange.json").read_text())
    assert len(recorded["writers_whose_files_are_equal_byte_for_byte"]) == 2
    build(tmp_path / "text", files=2, n_bytes=600_000)
    out, tokens = tmp_path / "fineweb", recorded["shard_tokens"]
    flags = ("--val-tokens", tokens, "--shard-tokens", tokens, "--unit-bytes", "100K")
    assert prepare(tmp_path / "text", "--out", out, *flags) == 0
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.bin")}
    assert found == recorded["shards"]
