"""The notebook for a free T4, run as it is, at a tiny size on the CPU."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.hub_server import serve

import jaxgpt
from jaxgpt.data.embedded import load_embedded
from jaxgpt.data.token_file import write_shard

nbclient = pytest.importorskip("nbclient", reason="needs pip install -e '.[test]'")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel", reason="needs pip install -e '.[test]'")

NOTEBOOK = Path(jaxgpt.__file__).parents[1] / "notebooks" / "t4.ipynb"
SIZE = (
    "--preset t4 --device cpu --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --batch-size 2 "
    "--effective-batch-size 2 --eval-iters 2 --sample-tokens 8"
)
# In place of the cell tagged `parameters`. A command that fails has to end the notebook, too.
PARAMETERS = f"""
REPOSITORY, WORK, TOKENS = "none", "{{work}}", "7K"
TRAIN = "{SIZE} --max-iters {{steps}} --eval-interval 500 --warmup-iters 1"
FROM = "{{work}}/kept/runs/t4"
TUNE = "--preset t4 --device cpu --batch-size 2 --effective-batch-size 2 --max-iters 3"
TUNE += " --eval-iters 2"
shell = get_ipython()
system = shell.system
def checked(command):
    system(command)
    assert shell.user_ns["_exit_code"] == 0, command
shell.system = checked
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with a clone that has a book, and a Hub with FineWeb's tokens."""
    shards = tmp_path / "hub" / "kjj0" / "fineweb100B-gpt2"
    shards.mkdir(parents=True)
    for name in ("val_000000", "train_000001", "train_000002"):
        tokens = np.random.default_rng(0).integers(0, 50257, 5000)
        write_shard(shards / f"fineweb_{name}.bin", tokens)
    clone = tmp_path / "work" / "jaxgpt"
    clone.mkdir(parents=True)
    (clone / "book.txt").write_bytes(load_embedded("austen.txt.xz")[:60_000])
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on Kaggle
    with serve(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield clone.parent


def execute(work: Path, parameters: str, until: str) -> dict[str, str]:
    """What each code cell prints, by the command in it, up to the first that has `until`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if until in cell.source)
    notebook.cells = [c for c in notebook.cells[: last + 1] if c.cell_type == "code"]
    (replaced,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    replaced.source = parameters
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(work))
    return {
        cell.source: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
    }


def printed_by(command: str, cells: dict[str, str]) -> str:
    return "".join(text for source, text in cells.items() if command in source)


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)


@pytest.mark.parametrize(
    ("repository", "answer"),
    [("", "REPOSITORY is empty: "), ("/nowhere", "/nowhere could not be cloned or installed: ")],
)
def test_without_a_clone_it_ends_with_a_sentence(repository, answer, tmp_path) -> None:
    parameters = f"REPOSITORY, WORK = {repository!r}, {str(tmp_path)!r}"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=rf"SystemExit\S* {answer}"):
        execute(tmp_path, parameters, until="git clone")


@pytest.mark.slow
def test_it_trains_resumes_samples_and_exports(work: Path) -> None:
    cells = execute(work, PARAMETERS.format(work=work, steps=110), until="jaxgpt.train {TRAIN}")
    first = printed_by("jaxgpt.train {TRAIN}", cells)
    assert "Done: 110 steps" in first
    assert "\x1b" not in first, "a bar, which a notebook would keep every state of"
    assert len(first.splitlines()) < 60
    cells = execute(work, PARAMETERS.format(work=work, steps=113), until="tuned.gguf")
    resumed = printed_by("jaxgpt.train {TRAIN}", cells)
    assert "from step 110 to step 113" in resumed
    assert "Done: 113 steps" in resumed
    assert printed_by("jaxgpt.sample", cells).count("It is a truth") == 3
    kept = work / "kept"
    assert (kept / "t4-hf" / "model.safetensors").is_file()
    assert {path.name for path in kept.glob("*.gguf")} == {"t4.gguf", "tuned.gguf"}
