"""Preparation by several processes, and merging their shards."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.preparing import SMALL, prepare, refusal, stream

from jaxgpt.data.manifest import load_manifest


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
    manifest = shared / "manifest-001-of-002.json"
    written = manifest.read_text()
    for changed, said in (
        ({"documents": {}}, "documents: Object missing required field `used`"),
        ({"documents": None}, "documents: Expected `object`, got `null`"),
        ({"token_count": 3}, "token_count: Expected `object | null`, got `int`"),
        ({"validation": {"tokens": "x"}}, "validation.tokens: Expected `int | null`, got `str`"),
    ):
        manifest.write_text(json.dumps({**json.loads(written), **changed}))
        message = refusal(capsys, "--merge", shared)
        assert f"{manifest}: {said}; delete it and run its prepare command again" in message
    manifest.unlink()
    assert prepare(*flags, "--out", shared, "--rank", 1, "--world-size", 2) == 0
    assert manifest.read_text() == written
    assert prepare("--merge", shared) == 0
    for split in ("train", "val"):
        np.testing.assert_array_equal(stream(shared, split), stream(alone, split))
    merged, single = load_manifest(shared), load_manifest(alone)
    assert merged is not None
    assert single is not None
    for name in ("splits", "documents", "token_count", "tokenizer", "source", "validation"):
        assert getattr(merged, name) == getattr(single, name), name


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
        assert f"was started with --world-size {was}, not" in message


def test_too_many_ranks_for_the_input_are_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--out", tmp_path / "out", "--val-fraction", "0.3", "--rank", "0")
    message = refusal(capsys, texts, *flags, "--world-size", "9")
    assert "the input is only 1 units of work" in message
    assert prepare(texts, *flags, "--world-size", "1") == 0, "the folder can be reused"


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
    assert "the ranks differ in source" in refusal(capsys, "--merge", out)
    (out / "manifest-001-of-002.json").write_text("{}")
    assert "manifest-001-of-002.json: Object missing required field `version`" in refusal(
        capsys, "--merge", out
    )


def test_a_first_rank_with_too_few_tokens_for_validation_is_refused(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for rank in (0, 1, 2):
        ranked = ("--rank", rank, "--world-size", 3, "--workers", "1", "--val-tokens", "90K")
        assert prepare(fineweb_like, "--out", out, *SMALL, *ranked) == 0
    message = refusal(capsys, "--merge", out)
    assert "validation is the first 90,000 tokens, but rank 0 has only" in message
    assert not (out / "manifest.json").exists()


def test_ranks_without_a_document_for_validation_are_not_merged_into_a_broken_folder(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "out", (*SMALL, "--val-fraction", "1e-9", "--workers", "1")
    for rank in (0, 1):
        ranked = ("--rank", rank, "--world-size", 2)
        assert prepare(fineweb_like, "--out", out, *flags, *ranked) == 0
    assert "no rank has a token of 'val'" in refusal(capsys, "--merge", out)
    assert not (out / "manifest.json").exists()
