import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxgpt.config.fields import with_fields
from jaxgpt.export import main
from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.weights.model_card import model_card
from jaxgpt.weights.source import WeightsFlags, build_network, open_weights


def test_the_folder_has_every_file_of_transformers_and_no_other(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    }
    assert [path.name for path in exported.parent.iterdir()] == ["tiny-austen"]


def test_transformers_computes_the_run_s_logits_and_text(tiny_run: Path, exported: Path) -> None:
    torch = pytest.importorskip("torch", reason="the weights are compared with golden numbers")
    transformers = pytest.importorskip("transformers", reason="test_huggingface has golden numbers")
    weights = open_weights(WeightsFlags(out_dir=tiny_run))
    device = jax.devices("cpu")[0]
    model = nnx.merge(build_network(weights, device, "float32"), weights.load(device))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("It is a truth…", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == weights.tokenizer.encode("It is a truth…").tolist()
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
    np.testing.assert_allclose(model(ids.numpy())[..., :257], expected, atol=1e-4, rtol=0)
    assert theirs.generation_config.eos_token_id == weights.tokenizer.eot
    greedy = theirs.generate(ids[:, :4], do_sample=False, max_new_tokens=3, pad_token_id=256)
    assert tokenizer.decode(greedy[0]).startswith("It i")


def test_the_card_describes_the_run(tiny_run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    loss = read_metrics(tiny_run / "metrics.jsonl")[-1]["val/loss"]
    for row in (
        f"| parameters | {11_600 - 63 * 16:,} |",  # 63 rows of the embedding are padding
        "biases no (exported as zeros), tanh GELU",
        "| started from | random weights |",
        "novels that come with jaxgpt, 2,036,526 byte tokens |",
        f"| trained on | {8 * 4 * 16:,} tokens in 8 steps |",
        f"| validation loss | {loss:.4f} nats per token on 60 windows |",
    ):
        assert row in card, row
    settings = json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])
    assert (settings["n_embd"], settings["learning_rate"], settings["preset"]) == (16, 6e-3, "demo")
    assert str(tiny_run) not in card


def test_another_checkpoint_is_exported_on_request(tiny_run: Path, tmp_path: Path, capsys) -> None:
    argv = ["--out-dir", str(tiny_run), "--to", str(tmp_path / "m"), "--checkpoint", "4"]
    assert main(argv) == 0
    assert "tokens in 4 steps" in (tmp_path / "m" / "README.md").read_text()
    assert "step 4: 11,600 parameters, 1,008 of them padding, written to" in capsys.readouterr().out


def test_the_current_folder_can_be_written_and_a_failed_export_leaves_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "here.tmp").mkdir()  # somebody's own
    monkeypatch.chdir(here)
    argv = ["--out-dir", str(tiny_run), "--to", "."]
    with monkeypatch.context() as patch:
        patch.setattr("jaxgpt.export.write_tokenizer", fail)
        with pytest.raises(SystemExit):
            main(argv)
    assert "--to . cannot be written: No space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "here.tmp"]
    pushed: list[Path] = []
    monkeypatch.setattr("jaxgpt.weights.hub.check_login", lambda _: None)
    monkeypatch.setattr("jaxgpt.weights.hub.push", lambda *given: pushed.extend(given[2]))
    assert main([*argv, "--push", "me/model"]) == 0
    assert (here / "model.safetensors").exists()
    assert {path.name for path in pushed} == {path.name for path in here.iterdir()}


def test_a_gguf_file_has_a_modelfile_beside_it(tiny_run: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "a new one" / "my-model.gguf"
    assert main(["--out-dir", str(tiny_run), "--to", str(path), "--dtype", "q8_0"]) == 0
    assert {file.name for file in path.parent.iterdir()} == {"my-model.gguf", "my-model.Modelfile"}
    assert (path.parent / "my-model.Modelfile").read_text() == "FROM ./my-model.gguf\n"
    out, err = capsys.readouterr()
    assert f"ollama create my-model -f '{path.with_suffix('.Modelfile')}'" in out
    assert f"llama-completion -m '{path}'" in out
    assert "tensors are f16, because q8_0 needs rows of a multiple of 32" in err
    path.unlink()
    with pytest.raises(SystemExit):  # the user may have edited it
        main(["--out-dir", str(tiny_run), "--to", str(path)])
    assert "my-model.Modelfile already exists" in capsys.readouterr().err


def test_a_failed_gguf_export_leaves_nothing(tiny_run, tmp_path, monkeypatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", fail)
    with pytest.raises(SystemExit):
        main(["--out-dir", str(tiny_run), "--to", str(tmp_path / "m.gguf")])
    assert "m.gguf cannot be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gguf_package_is_a_sentence(tiny_run, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit):
        main(["--out-dir", str(tiny_run), "--to", str(tmp_path / "m.gguf")])
    assert "needs the gguf package: pip install gguf" in capsys.readouterr().err


def test_the_result_is_uploaded_with_its_card(tiny_run, tmp_path, monkeypatch, capsys) -> None:
    uploaded = {}

    def push(repository: str, target: Path, files: list[Path], card: str) -> str:
        uploaded[repository] = ([file.name for file in files], card)
        return "URL"

    monkeypatch.setattr("jaxgpt.weights.hub.check_login", lambda repository: None)
    monkeypatch.setattr("jaxgpt.weights.hub.push", push)
    to = str(tmp_path / "m.gguf")
    assert main(["--out-dir", str(tiny_run), "--to", to, "--push", "me/my-model"]) == 0
    names, card = uploaded["me/my-model"]
    assert names == ["m.gguf", "m.Modelfile"]
    assert "library_name: gguf" in card
    assert "Uploaded: URL" in capsys.readouterr().out


def test_the_card_counts_the_windows_that_were_evaluated(tiny_run: Path) -> None:
    weights = open_weights(WeightsFlags(out_dir=tiny_run))
    assert weights.run is not None
    card = model_card(weights, weights.run, {"train_tokens": 9, "val_tokens": 16 * 7 + 1})
    assert "on 7 windows |" in card


def test_the_card_names_the_data_that_was_read(tiny_run: Path, tmp_path: Path) -> None:
    weights = open_weights(WeightsFlags(out_dir=tiny_run))
    assert weights.run is not None
    # As `--preset 24gb --data-dir .../my-tokens` leaves it: the preset's dataset, another folder.
    asked = with_fields(weights.run.asked, dataset="fineweb", data_dir=tmp_path / "my-tokens")
    run = dataclasses.replace(weights.run, asked=asked)
    card = model_card(weights, run, {"train_tokens": 9, "val_tokens": 99})
    assert "| data | my-tokens (token files), 9 byte tokens |" in card
    assert "fineweb" not in card
    run = dataclasses.replace(run, asked=with_fields(asked, data_dir=tmp_path / "embedded"))
    assert "Jane Austen" not in model_card(weights, run, {"train_tokens": 9, "val_tokens": 99})


def test_the_card_of_a_mixture_names_its_sources_without_their_folders(tiny_run: Path) -> None:
    weights = open_weights(WeightsFlags(out_dir=tiny_run))
    assert weights.run is not None
    stages = ((5, "/home/me/law:1"),)
    asked = with_fields(weights.run.asked, dataset="/home/me/books:3,web:1", mixture_at=stages)
    run = dataclasses.replace(weights.run, asked=asked, tokenizer="/home/me/tok")
    data = {"train_tokens": 9, "val_tokens": 16 * 7 + 1}
    data |= {f"{name}: {key}": value for name in ("web", "law") for key, value in data.items()}
    card = model_card(weights, run, data)
    assert "| books:0.75,web:0.25; from step 5 law (token files), 27 tok tokens |" in card
    assert "on 21 windows |" in card
    assert "/home" not in card


@pytest.mark.parametrize(
    ("flags", "answers"),
    [
        ([], ["specify the run: --out-dir RUN", "specify what to write: --to FOLDER"]),
        (["--out-dir=RUN", "--to=FULL"], ["already exists; choose another name"]),
        (
            ["--out-dir=RUN", "--to=RUN/checkpoints/8/hf"],
            ["8 is a run's checkpoint; choose another"],
        ),
        (["--out-dir=RUN", "--to=x", "--dtype=f16"], ["--dtype f16 is for .gguf files: --to x.g"]),
        (["--out-dir=RUN", "--to=x.gguf", "--dtype=q4"], ["--dtype", "q8_0"]),
        (["--out-dir=RUN", "--to=x", "--push=me"], ["--push me must be owner/name"]),
        (["--out-dir=nowhere", "--to=x"], ["--out-dir nowhere: no such folder"]),
        (["--out-dir=HF", "--to=x"], ["is a Hugging Face model, not a run", "with --init-from"]),
        (["--out-dir=RUN", "--to=FULL/f/x"], ["cannot be written", "Not a directory"]),
        (["--out-dir=RUN", "--to=FULL/loop"], ["cannot be written", "Not a directory"]),
        (
            ["--out-dir=RUN", "--to=x", "--checkpoint=5"],
            ["--checkpoint 5: ", "has no such checkpoint"],
        ),
        (["--out-dir=RUN", "--too", "x"], ["Perhaps you meant", "--to PATH"]),
    ],
)
def test_a_user_error_is_one_message(tiny_run, exported, tmp_path, capsys, flags, answers) -> None:
    (tmp_path / "f").write_text("in the way")
    (tmp_path / "loop").symlink_to("loop")
    real = {"RUN": str(tiny_run), "FULL": str(tmp_path), "HF": str(exported)}
    argv = [re.sub("RUN|FULL|HF", lambda match: real[match[0]], flag) for flag in flags]
    with pytest.raises(SystemExit) as left:
        main(argv)
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert [part for part in answers if part not in err] == []
    assert "Traceback" not in err
