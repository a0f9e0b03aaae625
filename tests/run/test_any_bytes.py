"""Whatever the bytes of a file are, the answer is the file's content or one plain sentence."""

import copy
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.config.fields import Config, flat_fields
from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import load_config
from jaxgpt.data import manifest
from jaxgpt.data.loader import WindowLoader
from jaxgpt.data.manifest import ShardEntry
from jaxgpt.data.shards import load_split
from jaxgpt.data.token_file import FORMATS, inspect_file
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.text_manifest import summarize
from jaxgpt.preparation.work_files import Journal, Plan, Record
from jaxgpt.run.integrity import MANIFEST, DamagedError, read_manifest
from jaxgpt.run.metrics import MetricsLog
from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics
from jaxgpt.run.tensorboard_events import _encode_record

T = TypeVar("T")
NO_DEADLINE = settings(deadline=None, max_examples=150)  # a busy machine is no fault


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def read_or_named(read: Callable[[], T], path: Path) -> T | None:
    """What was read, or None after a plain message that names the file; all else is an error."""
    try:
        return read()
    except UserError as fault:
        message = str(fault)
    assert message.startswith((f"{path}: ", f"{path} "))
    assert "Traceback" not in message
    return None


NUMBERS = st.one_of(
    st.sampled_from([*(format.magic for format in FORMATS), 7, 1, 0, -1, 2**31 - 1]),
    st.integers(-9, 600),
)
HEADERS = st.builds(
    lambda words, rest: struct.pack(f"<{len(words)}i", *words).ljust(1024, b"\0") + rest,
    st.lists(NUMBERS, max_size=5),
    st.binary(max_size=1200),
)


@NO_DEADLINE
@given(
    content=st.one_of(st.binary(max_size=3000), HEADERS),
    name=st.sampled_from(["x_train_0.bin", "train.bin"]),
)
@example(
    content=struct.pack("<3i", FORMATS[0].magic, 1, 3).ljust(1024, b"\0") + b"\1\0" * 3,
    name="x_train_0.bin",
)
def test_a_shard_of_any_bytes_is_read_or_named(folder: Path, content: bytes, name: str) -> None:
    for path in folder.glob("*.bin"):
        path.unlink()
    path = folder / name
    path.write_bytes(content)
    found = read_or_named(lambda: inspect_file(path), path)
    tokens = read_or_named(lambda: load_split(folder, "train", 257), path)
    if found is None or tokens is None:
        return
    # What is read is what is there: all of it, and nothing else.
    assert found.offset + 2 * found.length == len(content)
    expected = np.frombuffer(content, "<u2", offset=found.offset)
    np.testing.assert_array_equal(tokens.window(0, len(tokens)), expected)
    assert expected.max() < 257
    if len(tokens) > 4:
        assert WindowLoader(tokens, 4, 257, seed=0).batch(0, 1, 2).shape == (1, 2, 5)


BYTES = load_tokenizer("byte")
COUNTS = {"tokens": 9, "documents": 1}
SOUND = {
    "version": 1,
    "source": {},
    "tokenizer": {"name": "byte", "sha256": BYTES.sha256, "n_vocab": BYTES.n_vocab},
    "validation": {},
    "splits": {"train": COUNTS, "val": COUNTS},
    "shards": [
        {"file": "x_train_0.bin", "split": "train", "tokens": 9, "documents": 1, "sha256": "0"}
    ],
}
JSON = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
    max_leaves=4,
)


@st.composite
def damaged_manifests(draw: Callable) -> bytes:
    """A sound one, with something else in one place."""
    values = part = copy.deepcopy(SOUND)
    while True:
        key = draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
        if not isinstance(part[key], dict | list) or not part[key] or draw(st.booleans()):
            part[key] = draw(JSON)
            return json.dumps(values).encode()
        part = part[key]


@NO_DEADLINE
@given(content=st.one_of(st.binary(max_size=300), damaged_manifests()))
@example(content=b"[" * 100_000)
@example(content=json.dumps(SOUND).encode())
@example(content=json.dumps({**SOUND, "tokenizer": {}}).encode())
def test_a_manifest_of_any_bytes_is_read_or_named(folder: Path, content: bytes) -> None:
    path = folder / "data" / manifest.MANIFEST
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    found = read_or_named(lambda: manifest.load_manifest(path.parent), path)
    if found is None:
        return
    assert "tokenizer" in summarize(found)
    if found.shards:  # none of them is there
        with pytest.raises(UserError, match=f"^{path.parent}"):
            manifest.check_manifest(path.parent, BYTES)


VALUES = st.one_of(
    st.integers(-3, 2**70),
    st.floats(),
    st.booleans(),
    st.text(max_size=12),
    st.just([]),
    st.just({}),
)


def as_toml(value: object) -> str:
    if isinstance(value, str):
        return (
            '"' + "".join(f"\\U{ord(c):08x}" for c in value if not "\ud800" <= c < "\ue000") + '"'
        )
    if isinstance(value, bool):
        return str(value).lower()
    return "{}" if value == {} else str(value)


@NO_DEADLINE
@given(values=st.dictionaries(st.sampled_from([*flat_fields(), "n_layers", "compile"]), VALUES))
def test_a_preset_of_any_values_is_a_configuration_or_named(folder: Path, values) -> None:
    path = folder / "any.toml"
    path.write_text("".join(f"{k} = {as_toml(v)}\n" for k, v in values.items()), encoding="utf-8")
    check_preset(path)


@NO_DEADLINE
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda s: s.encode("utf-8", "replace"))
    )
)
@example(content=b"a = " + b"[" * 100_000)
@example(content=b"n_layer = 0x" + b"f" * 5000)
def test_a_preset_of_any_bytes_is_a_configuration_or_named(folder: Path, content: bytes) -> None:
    path = folder / "any.toml"
    path.write_bytes(content)
    check_preset(path)


def check_preset(path: Path) -> None:
    cfg = read_or_named(lambda: load_preset(str(path)), path)
    assert cfg is None or type(cfg) is Config


@NO_DEADLINE
@given(content=st.one_of(st.binary(max_size=300), st.sampled_from([b"{}", b'{"n_layer": 1e999}'])))
@example(content=b"[" * 100_000)
@example(content=b'{"step": 8, "val/loss": "x"}\n{"step": 9, "val/loss": ' + b"9" * 400 + b"}")
@example(content=b'{"step": true}\n{"step": 1.5}')
def test_what_lies_in_a_runs_folder_may_hold_any_bytes(folder: Path, content: bytes) -> None:
    path = folder / "config.json"
    path.write_bytes(content)
    cfg = read_or_named(lambda: load_config(path), path)
    assert cfg is None or type(cfg) is Config
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match="is corrupt"):
        read_manifest(folder)
    (folder / "metrics.jsonl").write_bytes(content)
    for record in read_metrics(folder / "metrics.jsonl"):
        assert type(record["step"]) is int
        assert all(isinstance(float(value), float) for value in record.values())
    told: list[str] = []
    MetricsLog(folder, resume_step=0, on_error=told.append).close()
    assert told == []


@NO_DEADLINE
@given(records=st.lists(st.binary(max_size=60), max_size=4), rest=st.binary(max_size=30))
@example(records=[b"\x08\xff\xff"], rest=b"")  # whose checksums are right, and which is no event
@example(records=[], rest=b"\xff" * 30)
def test_event_files_of_any_records_stop_no_start(
    folder: Path, records: list[bytes], rest: bytes
) -> None:
    path = folder / "events" / "events.out.tfevents.1.here"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(_encode_record, records)) + rest)
    (path.parent / METRICS_FILE).unlink(missing_ok=True)
    told: list[str] = []
    with MetricsLog(path.parent, resume_step=0, on_error=told.append) as log:
        log.scalars(1, {"train/loss": 1.0})
    assert told == []
    assert read_metrics(path.parent / METRICS_FILE)[-1]["step"] == 1


RECORD = {"number": 0, "tokens": {"all": 5}, "documents": 1, "skipped": {}, "examples": {}}
RECORD |= {"token_count": None, "bytes": 9}


@NO_DEADLINE
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.dictionaries(st.sampled_from(list(RECORD)), JSON).map(
            lambda changed: json.dumps({**RECORD, **changed}).encode() + b"\n"
        ),
    )
)
@example(content=b"[" * 100_000 + b"\n")
@example(content=b'{"number": ' + b"9" * 5000 + b"}\n")
@example(content=b"\0" * 20 + b"\n")  # what some file systems leave after a power cut
def test_what_lies_in_a_preparations_folder_may_hold_any_bytes(
    folder: Path, content: bytes
) -> None:
    path = folder / "work" / "units.jsonl"
    path.parent.mkdir(exist_ok=True)
    for kind in (Record, ShardEntry):
        path.write_bytes(content)
        journal = read_or_named(lambda kind=kind: Journal(path, kind), path)
        assert journal is None or all(type(entry) is kind for entry in journal.entries)
    path.write_bytes(content)
    plan = read_or_named(lambda: Plan.load(path), path)
    assert plan is None or type(plan) is Plan
