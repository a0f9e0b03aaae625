import json
import os
from pathlib import Path

import pytest

from jaxgpt.run.integrity import MANIFEST, DamagedError, read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "10"
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "array").write_bytes(bytes(range(256)) * 40)
    (folder / "state" / "names").write_text("[]")
    (folder / "mark").write_text("")
    write_manifest(folder, {"val_loss": 1.5, "config": {"out_dir": "läufe/\udc80", "seed": 7}})
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_was_noted_comes_back_and_every_file_is_in_it(folder: Path) -> None:
    manifest = verify(folder)
    assert manifest == read_manifest(folder)
    assert (manifest["val_loss"], manifest["config"]["seed"]) == (1.5, 7)
    assert manifest["config"]["out_dir"] == "läufe/\udc80"
    assert sorted(manifest["files"]) == ["mark", "state/d/array", "state/names"]


def test_every_flipped_bit_is_noticed_and_its_file_named(folder: Path) -> None:
    for path in files(folder):
        data = path.read_bytes()
        for place in range(0, len(data), 1 if path.name == MANIFEST else 997):
            for bit in (0, 7):
                changed = bytearray(data)
                changed[place] ^= 1 << bit
                path.write_bytes(changed)
                with pytest.raises(DamagedError, match=rf"^{path} .*checksum differs"):
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
    "content", [b"", b"{", b"[]", b"3", b"\xff", b'{"manifest": 3}', b"[" * 100_000, b'{"a": {}}']
)
def test_a_manifest_of_any_bytes_is_answered_with_its_path(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match=f"^{folder / MANIFEST} is not what was written"):
        read_manifest(folder)


def test_the_manifest_appears_whole_or_not_at_all(folder: Path, monkeypatch) -> None:
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
        write_manifest(folder, {})
    assert not (folder / MANIFEST).exists()
    monkeypatch.undo()
    write_manifest(folder, {})
    assert MANIFEST not in json.dumps(verify(folder)["files"])
