"""From parts to shards, and resuming after a kill."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from jaxgpt.data.manifest import ShardEntry
from jaxgpt.data.shards import load_split
from jaxgpt.data.token_file import write_shard
from jaxgpt.errors import UserError
from jaxgpt.preparation.assemble import Assembler
from jaxgpt.preparation.documents import ReadOptions
from jaxgpt.preparation.inputs import Input
from jaxgpt.preparation.tokenize import part_path
from jaxgpt.preparation.work_files import FileSource, HubSource, Journal, Plan, Record, Settings

EOT = 9999


def plan_of(n_units: int, **changes: object) -> Plan:
    """A plan whose units are one file each."""
    settings = {
        "prefix": "x",
        "tokenizer": "gpt2",
        "tokenizer_sha256": "",
        "options": ReadOptions(),
        "shard_tokens": 100,
        "val_tokens": 100,
        "val_fraction": None,
        "unit_bytes": 10,
        **changes,
    }
    inputs = [Input(path=f"{n}.txt", size=10, kind="text", check="") for n in range(n_units)]
    return Plan(source=FileSource(), settings=Settings(**settings), rounds=[inputs])  # type: ignore[arg-type]


def finish_unit(assembler: Assembler, folder: Path, number: int, tokens: np.ndarray) -> None:
    tokens.astype("<u2").tofile(part_path(folder / "parts", number, "all"))
    record = Record(number, {"all": len(tokens)}, 1, {}, {}, None, 10)
    assembler.add(record)


def unit_tokens(number: int, n: int = 70) -> np.ndarray:
    return np.array([EOT, *range(number * 1000, number * 1000 + n - 1)], np.uint16)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / ".prepare"
    folder.mkdir()
    return folder


def test_units_that_finish_out_of_order_give_shards_in_order(tmp_path: Path, work: Path) -> None:
    assembler = Assembler(tmp_path, work, plan_of(5), None, EOT)
    for number in (3, 1, 4, 0, 2):
        finish_unit(assembler, work, number, unit_tokens(number))
        assembler.write_complete_shards()
    assert assembler.finished
    expected = np.concatenate([unit_tokens(number) for number in range(5)])
    val, train = (load_split(tmp_path, split, 10_000) for split in ("val", "train"))
    np.testing.assert_array_equal(val.window(0, len(val)), expected[:100])
    np.testing.assert_array_equal(train.window(0, len(train)), expected[100:])
    assert [shard.tokens for shard in assembler.shards] == [100, 100, 100, 50]
    assert [shard.documents for shard in assembler.shards] == [2, 1, 2, 0]
    assert not list((work / "parts").iterdir())


def test_a_shard_is_written_as_soon_as_its_tokens_are_there(tmp_path: Path, work: Path) -> None:
    assembler = Assembler(tmp_path, work, plan_of(5), None, EOT)
    cut = []
    for number in range(5):
        finish_unit(assembler, work, number, unit_tokens(number))
        assembler.write_complete_shards()
        cut.append(len(assembler.shards))
    assert cut == [0, 1, 2, 2, 4]


def test_a_shard_without_its_line_in_the_journal_is_adopted(
    tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembler = Assembler(tmp_path, work, plan_of(5), None, EOT)
    for number in range(3):
        finish_unit(assembler, work, number, unit_tokens(number))
    append = Journal.append

    def killed_before_the_second_line(journal: Journal, entry: msgspec.Struct) -> None:
        if journal.entries:
            raise KeyboardInterrupt
        append(journal, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", killed_before_the_second_line)
        with pytest.raises(KeyboardInterrupt):
            assembler.write_complete_shards()
    shards = sorted(tmp_path.glob("*.bin"))
    written = [path.stat().st_mtime_ns for path in shards]
    assert len(assembler.shards) == 1
    again = Assembler(tmp_path, work, plan_of(5), None, EOT)
    assert [shard.tokens for shard in again.shards] == [100, 100]
    assert again.pending_units() == [3, 4]
    assert [path.stat().st_mtime_ns for path in shards] == written
    assert Journal(work / "shards.jsonl", ShardEntry).entries == again.shards


def test_a_foreign_shard_is_not_adopted(tmp_path: Path, work: Path) -> None:
    name = "x_train_000001.bin"
    for n_units, tokens in ((0, 10), (3, 100), (3, 50)):  # before its turn, and when it is
        assembler = Assembler(tmp_path, work, plan_of(5), None, EOT)
        for number in range(n_units):
            finish_unit(assembler, work, number, unit_tokens(number))
        write_shard(tmp_path / name, np.arange(tokens))
        with pytest.raises(UserError, match=f"{name}: was not written by this command"):
            Assembler(tmp_path, work, plan_of(5), None, EOT)
        (tmp_path / name).unlink()


def test_a_limit_below_the_existing_tokens_keeps_all_records(tmp_path: Path, work: Path) -> None:
    assembler = Assembler(tmp_path, work, plan_of(5), None, EOT)
    for number in range(5):
        finish_unit(assembler, work, number, unit_tokens(number))
        assembler.write_complete_shards()
    limited = Assembler(tmp_path, work, plan_of(5), 130, EOT)
    assert limited.finished
    assert [record.number for record in limited.used_records()] == [0, 1, 2, 3, 4]


def test_a_unit_with_lost_tokens_is_processed_again(tmp_path: Path, work: Path) -> None:
    assembler = Assembler(tmp_path, work, plan_of(5), None, EOT)
    for number in (0, 1, 2, 4):
        finish_unit(assembler, work, number, unit_tokens(number))
    assembler.write_complete_shards()
    # Units 0 and 1 are in shards, 2 in part; a power cut took the end of 2, a user's rm 4.
    part_path(work / "parts", 2, "all").write_bytes(b"short")
    part_path(work / "parts", 4, "all").unlink()
    assert Assembler(tmp_path, work, plan_of(5), None, EOT).pending_units() == [2, 3, 4]


def test_a_limit_ends_the_training_tokens_exactly(tmp_path: Path, work: Path) -> None:
    assembler = Assembler(tmp_path, work, plan_of(5), 130, EOT)
    for number in range(3):
        assert assembler.pending_units()[0] == number
        finish_unit(assembler, work, number, unit_tokens(number))
        assembler.write_complete_shards()
    assert not assembler.finished
    finish_unit(assembler, work, 3, unit_tokens(3))
    assembler.write_complete_shards()
    assert assembler.finished
    assert assembler.pending_units() == []
    assert [shard.tokens for shard in assembler.shards] == [100, 100, 30]
    assert [record.number for record in assembler.used_records()] == [0, 1, 2, 3]


class Line(msgspec.Struct, forbid_unknown_fields=True):
    a: int


def test_a_truncated_last_line_of_a_journal_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, Line).append(Line(1))
    with path.open("ab") as file:
        file.write(b'{"a": 2')
    journal = Journal(path, Line)
    assert journal.entries == [Line(1)]
    journal.append(Line(3))
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5", "Expected `object`, got `int`"),
        ('{"b": 1}', "unknown field `b`"),
        ('{"a": 1, "b": 2}', "unknown field `b`"),
        ('{"a": "1"}', "a: Expected `int`, got `str`"),
        ("{", "JSON"),
        ("\0\0", "JSON"),
        pytest.param("[" * 10**5, "(Expected `object`, got `array`|nested too deeply)", id="["),
    ],
)
def test_a_journal_with_any_other_line_is_refused(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "out" / ".prepare" / "journal.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(UserError, match=f"{path}: line 2: .*{expected}") as caught:
        Journal(path, Line)
    assert f"; delete {tmp_path / 'out'} and prepare the text again" in str(caught.value)


def test_a_journal_with_the_tokens_of_other_parts_is_refused(tmp_path: Path, work: Path) -> None:
    record = Record(0, {"train": 5, "val": 0}, 1, {}, {}, None, 10)
    Journal(work / "units.jsonl", Record).append(record)
    with pytest.raises(UserError, match="tokens of train, val in unit 0, expected all; delete"):
        Assembler(tmp_path, work, plan_of(2), None, EOT)


def test_a_plan_is_loaded_as_saved_and_a_corrupt_one_is_refused(tmp_path: Path) -> None:
    plan = plan_of(3, val_tokens=None, val_fraction=0.1)
    hub = HubSource(repo="a/b", name="", split="train", revision="main", commit="c")
    path = tmp_path / "plan.json"
    assert Plan.load(path) is None
    for source in (hub, FileSource()):
        plan = replace(plan, source=source)
        plan.save(path)
        assert Plan.load(path) == plan
    written = path.read_text()
    for was, now, expected in (
        ("shard_tokens", "shard_size", "settings: .* missing required field `shard_tokens`"),
        ('"size": 10', '"size": "10"', r"rounds\[0\]\[0\]\.size: Expected `int`, got `str`"),
        ('"kind": "files"', '"kind": "Hub"', "source: .* missing required field `repo`"),
        ('"prefix": "x"', '"prefix": "../x"', r"settings\.prefix: Expected `str` matching"),
    ):
        assert was in written
        path.write_text(written.replace(was, now))
        with pytest.raises(UserError, match=f"{path}: {expected}.*another folder with --out"):
            Plan.load(path)
