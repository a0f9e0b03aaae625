import hashlib
import json
import os
from pathlib import Path

import pytest
from helpers.checkpoints import sign

from jaxgpt.run.integrity import MANIFEST, DamagedError, read_manifest, verify, write_manifest
from jaxgpt.run.retention import best_step, newest_intact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "10"
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "array").write_bytes(bytes(range(256)) * 40)
    (folder / "state" / "names").write_text("[]")
    (folder / "mark").write_text("")
    sign(folder, 1.5, out_dir="läufe/\udc80", seed=7)
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_was_noted_comes_back_and_every_file_is_in_it(folder: Path) -> None:
    manifest = verify(folder)
    assert manifest == read_manifest(folder)
    assert (manifest.val_loss, manifest.config["seed"]) == (1.5, 7)
    assert manifest.config["out_dir"] == "läufe/\udc80"
    assert sorted(manifest.files) == ["mark", "state/d/array", "state/names"]


# As the first version with manifests wrote it.
OLD = """{
 "manifest": {
  "arrays": {
   "params/wte": "float32(257, 128)"
  },
  "config": {
   "bias": true,
   "learning_rate": 0.001,
   "mesh": null,
   "out_dir": "l\\u00e4ufe/\\udc80",
   "seed": 1
  },
  "data": {
   "train_tokens": 9
  },
  "files": {
   "state/array": [
    7,
    "f3c7807d475073ba009bf4801b2d934e9f0126cb96dd19a27dbffcae23a7f5a3"
   ]
  },
  "made_with": {
   "jax": "0.10.0"
  },
  "val_loss": 1.5
 },
 "sha256": "cf50de8db428a8180ea29a7be3e586db01a1ab0b79f2e3cc4d9fa5a054a333a4"
}"""


def test_an_old_manifest_loads_and_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "8"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "array").write_bytes(b"numbers")
    (folder / MANIFEST).write_text(OLD)
    manifest = verify(folder)
    assert manifest.config == {
        "bias": True,
        "learning_rate": 1e-3,
        "mesh": None,
        "out_dir": "läufe/\udc80",
        "seed": 1,
    }
    assert manifest.data == {"train_tokens": 9}
    write_manifest(folder, manifest)
    assert (folder / MANIFEST).read_text() == OLD


def test_every_flipped_bit_is_noticed_and_its_file_named(folder: Path) -> None:
    for path in files(folder):
        data = path.read_bytes()
        for place in range(0, len(data), 1 if path.name == MANIFEST else 997):
            for bit in (0, 7):
                changed = bytearray(data)
                changed[place] ^= 1 << bit
                path.write_bytes(changed)
                with pytest.raises(DamagedError, match=rf"^{path} is corrupt: "):
                    verify(folder)
        path.write_bytes(data)
    verify(folder)


def test_every_missing_truncated_or_longer_file_is_named(folder: Path) -> None:
    for path in files(folder):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(DamagedError, match=f"^{path} cannot be read .No such file"):
            verify(folder)
        for other in (data[:-1], data + b"x"):
            if other != data:
                path.write_bytes(other)
                with pytest.raises(DamagedError, match=f"^{path} "):
                    verify(folder)
        path.write_bytes(data)
    verify(folder)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"\xff", b'{"manifest": 3}', b'{"a": {}}', b"\0", b"9" * 9999),
        *(b"[" * 100_000, b'{"manifest": null}'),
        *(b'{"manifest": %b}' % (b"[" * depth + b"]" * depth) for depth in range(800, 1000, 5)),
    ],
)
def test_a_manifest_of_any_bytes_is_answered_with_its_path(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match=f"^{folder / MANIFEST} is corrupt: "):
        read_manifest(folder)


def signed(body: object) -> bytes:
    """A manifest file whose checksum is right."""
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": checksum, "manifest": body}, indent=1, sort_keys=True).encode()


MISSING = object()
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("files", value) for value in (MISSING, [], None, 3, {"mark": 0}, {"mark": [0]}, DEEP)),
        *(("files", {"mark": value}) for value in (["0", ""], [0, None], [True, ""], [0.5, ""])),
        *(("files", {name: [0, ""]}) for name in ("\0", "\ud800", "x" * 300, "", "state")),
        *(("files", {"mark": [size, ""]}) for size in (-1, 10**400)),
        *(("config", value) for value in (MISSING, [], None, "x", 3)),
        *(("data", value) for value in (MISSING, [], None, "x", 3)),
        *(("arrays", value) for value in (MISSING, [], {"a": 1}, {"a": None})),
        *(("made_with", value) for value in (MISSING, [], {"jax": 1}, {"jax": []})),
        *(("val_loss", value) for value in (MISSING, "1.5", [], True, 10**400)),
    ],
)
def test_a_signed_manifest_of_any_shape_makes_a_damaged_checkpoint(
    folder: Path, key: str, value: object
) -> None:
    """The run falls back to the checkpoint before."""
    older = folder.with_name("9")
    (older / "state").mkdir(parents=True)
    sign(older, 2.5)
    body = json.loads((folder / MANIFEST).read_bytes())["manifest"]
    body[key] = value
    if value is MISSING:
        del body[key]
    (folder / MANIFEST).write_bytes(signed(body))
    warnings: list[str] = []
    if key != "files":
        assert best_step(folder.parent) == (9, 2.5)
    assert newest_intact(folder.parent, verify, warnings.append, strict=False) == 9
    assert f"checkpoint 10 is damaged and was renamed to 10.damaged: {folder}" in warnings[0]


@pytest.mark.parametrize("name", ["../9/mark", "state/../../9/mark", "/etc/hostname"])
def test_a_manifest_names_no_file_outside_its_folder(folder: Path, name: str) -> None:
    (folder.with_name("9")).mkdir()
    (folder.with_name("9") / "mark").write_text("")
    body = json.loads((folder / MANIFEST).read_bytes())["manifest"]
    body["files"] = {name: [0, hashlib.sha256().hexdigest()]}
    (folder / MANIFEST).write_bytes(signed(body))
    with pytest.raises(DamagedError, match=f"'{name}' is outside the folder"):
        verify(folder)


def test_a_checkpoint_under_another_steps_number_is_damaged(folder: Path) -> None:
    sign(folder, step=10)
    assert verify(folder).step == 10
    renamed = folder.rename(folder.with_name("11"))
    with pytest.raises(DamagedError, match=f"{renamed} is the checkpoint of step 10, renamed"):
        read_manifest(renamed)


def test_a_file_among_the_arrays_that_the_run_did_not_write_is_damage(folder: Path) -> None:
    """Orbax reads whatever lies there; beside them, a user may keep notes."""
    for name in ("notes.txt", "state/.DS_Store", "state/d/._array"):
        (folder / name).write_text("")
    verify(folder)
    (folder / "state" / "d" / "process_1").write_text("")
    with pytest.raises(DamagedError, match="state/d/process_1 is not a file of this checkpoint"):
        verify(folder)


def test_the_manifest_appears_complete_or_not_at_all(folder: Path, monkeypatch) -> None:
    (folder / MANIFEST).unlink()
    fsync, left = os.fsync, len(files(folder)) + 3  # every file and folder, not the manifest

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        sign(folder)
    assert not (folder / MANIFEST).exists()
    monkeypatch.undo()
    sign(folder)
    assert MANIFEST not in verify(folder).files


def test_a_symlink_in_place_of_the_temporary_file_is_not_followed(folder: Path, tmp_path) -> None:
    (tmp_path / "precious").write_text("mine")
    (folder / f"{MANIFEST}.tmp").symlink_to(tmp_path / "precious")
    sign(folder)
    verify(folder)
    assert (tmp_path / "precious").read_text() == "mine"
