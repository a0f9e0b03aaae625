"""Files that older versions wrote are still read."""

from pathlib import Path

import pytest
from helpers.preparing import refusal

from jaxgpt.data.manifest import ShardEntry, SplitTotals, load_manifest
from jaxgpt.preparation.inputs import Input
from jaxgpt.preparation.work_files import HubSource, Journal, Plan, Record

# As jaxgpt 0.1.0 wrote them.
SHARD = """{"file": "x_val_000000.bin", "split": "val", "tokens": 9, "documents": 2, \
"sha256": "82d0"}"""
COMMON = f""" "tokenizer": {{"name": "gpt2", "sha256": "53", "n_vocab": 50257, "eot": 50256}},
"eot": "before each document", "dtype": "uint16", "splits": {{"train": {{"tokens": 0, \
"documents": 0}}, "val": {{"tokens": 9, "documents": 2}}}}, "shards": [{SHARD}]"""
OF_TEXT = f"""{{"version": 1, "jaxgpt": "0.1.0", "source": {{"kind": "Hub", "repo": "a/b", \
"name": "", "split": "train", "revision": "main", "commit": "c0", "inputs": 1, "bytes": 99, \
"sha256_of_inputs": "37", "text_column": "text", "sample_by": "document", "files": ["a.jsonl"]}},
{COMMON}, "validation": {{"rule": "first tokens", "tokens": 9}}, "shard_tokens": 1000,
"documents": {{"used": 2, "skipped": {{"null": 1}}, "skipped_for_example": {{"null": "a.jsonl"}}}},
"token_count": {{"source_says": 7, "tokens_minus_documents": 7, "equal": true}}}}"""
READY_MADE = f"""{{"version": 1, "jaxgpt": "0.1.0", "source": {{"kind": "ready-made shards", \
"repo": "a/b", "commit": "c0"}}, {COMMON}, "validation": {{"rule": "as its makers chose it"}},
"shard_tokens": null}}"""
PLAN = """{"source": {"kind": "Hub", "repo": "a/b", "name": "", "split": "train", "revision": \
"main", "commit": "c0"}, "settings": {"prefix": "text", "tokenizer": "byte", "tokenizer_sha256": \
"4d", "options": {"text_column": "text", "sample_by": "document", "encoding_errors": "skip"}, \
"shard_tokens": 1000, "val_tokens": null, "val_fraction": 0.3, "unit_bytes": 1000, "rank": 0, \
"world_size": 1}, "rounds": [[{"path": "a.jsonl", "size": 99, "kind": "jsonl", "check": "0a", \
"rows": 0}]]}"""
UNIT = """{"number": 5, "tokens": {"train": 288, "val": 216}, "documents": 14, "skipped": \
{"null": 1}, "examples": {"null": "/in/a.jsonl"}, "token_count": 42, "bytes": 972}"""


def test_files_of_version_0_1_0_are_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    shard = ShardEntry(file="x_val_000000.bin", split="val", tokens=9, documents=2, sha256="82d0")
    path.write_text(OF_TEXT)
    of_text = load_manifest(tmp_path)
    assert of_text is not None
    assert of_text.shards == [shard]
    assert of_text.documents is not None
    assert of_text.documents.skipped == {"null": 1}
    assert of_text.token_count is not None
    assert of_text.token_count.equal
    path.write_text(READY_MADE)
    ready_made = load_manifest(tmp_path)
    assert ready_made is not None
    assert ready_made.documents is None
    assert ready_made.splits.val == of_text.splits.val == SplitTotals(9, 2)

    path.write_text(PLAN)
    plan = Plan.load(path)
    assert plan is not None
    assert isinstance(plan.source, HubSource)
    assert plan.source.commit == "c0"
    assert plan.settings.val_fraction == 0.3
    assert plan.rounds == [[Input(path="a.jsonl", size=99, kind="jsonl", check="0a")]]
    path.write_text(UNIT + "\n")
    (unit,) = Journal(path, Record).entries
    assert (unit.number, unit.tokens["val"], unit.examples) == (5, 216, {"null": "/in/a.jsonl"})
    path.write_text(SHARD + "\n")
    assert Journal(path, ShardEntry).entries == [shard]


def test_a_folder_that_ranks_began_is_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    plan = out / ".prepare" / "rank-000-of-002" / "plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text(PLAN)
    message = refusal(capsys, texts, "--out", out)
    assert f"{out}: was begun with --rank and --world-size (rank-000-of-002), which" in message
    assert plan.exists()
