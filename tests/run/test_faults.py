"""Faults of data and of the machine, through the command line: docs/faults.md lists them all.

Each test looks at the sentence, at the exit code, and at what is on disk afterwards.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import ROOT, SMALL, saved_steps, train

from jaxgpt.data.token_file import write_shard

# ---------------------------------------------------------------- data (rows 2-6, 8, 9, 11)

GOOD = np.arange(400, dtype=np.uint16) % 256
HEADER = np.zeros(256, "<i4")


def header(*words: int) -> bytes:
    whole = HEADER.copy()
    whole[: len(words)] = words
    return whole.tobytes()


FAULTY_SHARDS = {
    "2 magic": (header(12345, 1, 400) + GOOD.tobytes(), "starts with 12345"),
    "2 llama-3": (header(20240801, 7, 400) + GOOD.tobytes(), "is truncated: "),
    "2 version": (header(20240520, 2, 400) + GOOD.tobytes(), "is a shard of version 2"),
    "3 truncated": (header(20240520, 1, 400) + GOOD.tobytes()[:-9], "is truncated"),
    "3 over-long": (header(20240520, 1, 400) + GOOD.tobytes() * 2, "is too long"),
    "3 negative": (header(20240520, 1, -5), "is too long"),
    "4 empty": (b"", "is empty"),
    "4 no tokens": (header(20240520, 1, 0), "has a header but no tokens"),
    "6 id": (header(20240520, 1, 400) + (GOOD + 2).tobytes(), "outside the tokenizer's 257"),
    "8 short": (header(20240520, 1, 9) + GOOD[:9].tobytes(), "has 9 tokens"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("fault", FAULTY_SHARDS)
def test_a_faulty_shard_is_named_before_anything_is_made(tmp_path, refused, fault, split) -> None:
    content, reason = FAULTY_SHARDS[fault]
    for name in ("train", "val"):
        write_shard(tmp_path / f"x_{name}_000000.bin", GOOD)
    path = tmp_path / f"x_{split}_000000.bin"
    path.write_bytes(content)
    err = refused(tmp_path / "run", "--dataset", "x", "--data-dir", str(tmp_path))
    assert str(tmp_path) in err
    assert reason in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (GOOD.tobytes() + b"x", "an odd number"),
        (np.arange(4000, dtype=np.uint32).tobytes(), "as in uint32 or int64 tokens"),
    ],
)
def test_faulty_tokens_without_a_header_are_named(tmp_path, refused, content, reason) -> None:
    GOOD.tofile(tmp_path / "val.bin")
    (tmp_path / "train.bin").write_bytes(content)
    err = refused(tmp_path / "run", "--dataset", "x", "--data-dir", str(tmp_path))
    assert f"{tmp_path / 'train.bin'}: " in err
    assert reason in err


def test_other_data_of_the_same_size_is_refused(tmp_path, refused) -> None:
    data = ("--dataset", "x", "--data-dir", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        write_shard(tmp_path / f"data/x_{name}_000000.bin", GOOD)
    assert train(tmp_path / "run", *data, "--max-iters", "1") == 0
    before = saved_steps(tmp_path / "run")
    write_shard(tmp_path / "data/x_train_000000.bin", GOOD[::-1].copy())
    err = refused(tmp_path / "run", *data, "--max-iters", "2")
    assert re.search(r"was trained on \(train_fingerprint \w+ -> \w+\); name its data", err)
    assert saved_steps(tmp_path / "run") == before


def test_a_folder_that_no_file_system_takes_is_said_in_a_sentence(tmp_path, refused) -> None:
    err = refused(tmp_path, "--dataset", "x", "--data-dir", "x" * 300)
    assert "cannot be read (File name too long)" in err


def test_a_pickle_beside_the_data_is_never_opened(tmp_path, monkeypatch, refused) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "executed"))
    for name in ("train", "val"):
        GOOD.tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch $MARK'\ntR.")
    flags = ("--dataset", "x", "--data-dir", str(tmp_path), "--max-iters", "1")
    err = refused(tmp_path / "run", *flags)
    assert f"input.txt --tokenizer char --out {tmp_path}_tokens" in " ".join(err.split())
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- the machine (36)

WITHOUT = {
    "jax": "raise RuntimeError('jaxlib version 0.4.1 is older than 0.10.0')",
    "jaxlib": "raise ImportError('libcuda.so.1: cannot open shared object file')",
}


@pytest.mark.parametrize("module", WITHOUT)
def test_versions_that_do_not_fit_are_named(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text(WITHOUT[module])
    command = [sys.executable, "-m", "jaxgpt.train", *SMALL, "--out-dir", str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"JAX cannot be imported \(.*\); this is Python 3.* with jax \d", done.stderr)
    assert "pip install -U -e '.[cuda]'" in done.stderr
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- security


def test_nothing_in_the_package_can_load_a_pickle() -> None:
    loads = re.compile(
        r"^\s*(import|from) (pickle|joblib|dill|shelve|marshal|torch)\b|allow_pickle|np\.load\(",
        re.MULTILINE,
    )
    sources = sorted((ROOT / "jaxgpt").rglob("*.py"))
    assert len(sources) > 30
    assert [path.name for path in sources if loads.search(path.read_text())] == []
