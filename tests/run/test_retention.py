import errno
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from helpers.checkpoints import sign

from jaxgpt.errors import UserError
from jaxgpt.run.integrity import MANIFEST, verify
from jaxgpt.run.retention import (
    best_step,
    check_writable,
    finished_steps,
    newest_intact,
    prune,
    remove,
    remove_unfinished,
)


def add(folder: Path, step: int, loss: float | None = None) -> Path:
    path = add_unfinished(folder, step)
    sign(path, loss)
    return path


def add_unfinished(folder: Path, name: object) -> Path:
    path = folder / str(name)
    (path / "state").mkdir(parents=True)
    (path / "state" / "array").write_bytes(b"numbers")
    return path


def damage(path: Path) -> None:
    (path / "state" / "array").write_bytes(b"numbres")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_what_has_a_manifest_and_a_steps_name_is_finished(tmp_path: Path) -> None:
    assert finished_steps(tmp_path / "none") == []
    for step in (100, 20, 3):
        add(tmp_path, step)
    add_unfinished(tmp_path, 200)
    for name in ("5.damaged", "007", "٣", "-1", "notes", "9" * 200):
        sign(add_unfinished(tmp_path, name), 0.0)
    assert finished_steps(tmp_path) == [3, 20, 100]
    assert best_step(tmp_path) is None


def test_the_best_is_that_of_the_lowest_loss_that_is_a_number(tmp_path: Path) -> None:
    for step, loss in {1: 3.0, 2: 1.5, 3: float("nan"), 4: None, 5: 2.0, 6: float("inf")}.items():
        add(tmp_path, step, loss)
    assert best_step(tmp_path) == (2, 1.5)
    (tmp_path / "2" / MANIFEST).write_text("{}")
    assert best_step(tmp_path) == (5, 2.0)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in {1: 3.0, 2: 1.5, 3: None, 4: float("nan"), 5: 2.0}.items():
        add(tmp_path, step, loss)
    add_unfinished(tmp_path, 6)
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["2", "4", "5", "6"]
    prune(tmp_path, keep=1)
    assert names(tmp_path) == ["2", "5", "6"]


def test_an_unfinished_save_pushes_nothing_out(tmp_path: Path) -> None:
    add(tmp_path, 1)
    add_unfinished(tmp_path, 2)
    prune(tmp_path, keep=1)
    assert finished_steps(tmp_path) == [1]


def test_what_killed_saves_and_deletions_left_is_removed(tmp_path: Path) -> None:
    add(tmp_path, 10)
    left = ["20", "30.orbax-checkpoint-tmp", "5.deleted", "7.orbax-checkpoint-tmp.deleted"]
    for name in left:
        add_unfinished(tmp_path, name)
    add_unfinished(tmp_path, "15.damaged")
    (tmp_path / "notes.txt").write_text("mine")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["10", "15.damaged", "notes.txt"]


def test_a_file_with_the_name_of_a_leftover_stops_no_start(tmp_path: Path) -> None:
    add(tmp_path, 1)
    add_unfinished(tmp_path, 2)
    (tmp_path / "2.deleted").touch()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["1"]


def test_a_killed_first_save_is_removed(tmp_path: Path) -> None:
    add_unfinished(tmp_path, 0)
    remove_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_a_copy_without_its_manifest_is_refused_and_not_removed(tmp_path: Path) -> None:
    add_unfinished(tmp_path, 40)
    with pytest.raises(UserError, match=rf"40/{MANIFEST} is missing.*copy the whole folder again"):
        remove_unfinished(tmp_path)
    assert names(tmp_path) == ["40"]


def test_a_deletion_that_is_killed_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch) -> None:
    path = add(tmp_path, 1)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(path)
    assert names(tmp_path) == ["1.deleted"]
    assert finished_steps(tmp_path) == []


def test_the_newest_intact_checkpoint_is_taken_and_damaged_ones_are_put_aside(tmp_path) -> None:
    for step in (1, 2, 3, 4):
        add(tmp_path, step)
    damage(tmp_path / "3")
    (tmp_path / "4" / "state" / "array").unlink()
    told: list[str] = []
    assert newest_intact(tmp_path, verify, told.append, strict=False) == 2
    assert names(tmp_path) == ["1", "2", "3.damaged", "4.damaged"]
    for step, line in zip((4, 3), told, strict=True):
        array = tmp_path / str(step) / "state" / "array"
        assert re.match(rf"checkpoint {step} is damaged .* {step}\.damaged: {array} ", line)
    add(tmp_path, 3)
    damage(tmp_path / "3")
    assert newest_intact(tmp_path, verify, told.append, strict=False) == 2
    assert "3.damaged" in names(tmp_path)

    add(tmp_path, 3)

    def delete_and_verify(folder: Path) -> object:
        if folder.name == "3":
            shutil.rmtree(folder)  # as somebody might at this moment
        return verify(folder)

    assert newest_intact(tmp_path, delete_and_verify, told.append) == 2
    assert told[-1].startswith("checkpoint 3 is damaged, so checkpoint 2 is used: ")


def test_a_manifest_that_links_to_a_missing_file_is_damage_and_no_leftover(tmp_path: Path) -> None:
    for step in (1, 2):
        add(tmp_path, step)
    (tmp_path / "2" / MANIFEST).unlink()
    (tmp_path / "2" / MANIFEST).symlink_to(tmp_path / "unmounted")
    remove_unfinished(tmp_path)
    told: list[str] = []
    assert newest_intact(tmp_path, verify, told.append, strict=False) == 1
    assert names(tmp_path) == ["1", "2.damaged"]
    assert "integrity.json cannot be read (No such file or directory)" in told[0]


def fails(number: int, path: Path, *_: object) -> None:
    raise OSError(number, os.strerror(number), str(path))


def test_what_cannot_be_read_is_neither_unfinished_nor_absent(tmp_path, monkeypatch) -> None:
    for step in (1, 2):
        add(tmp_path, step)

    with monkeypatch.context() as patch:
        patch.setattr("os.lstat", partial(fails, errno.EIO))
        assert finished_steps(tmp_path) == [1, 2]
    monkeypatch.setattr("os.listdir", partial(fails, errno.EACCES))
    with pytest.raises(PermissionError):
        finished_steps(tmp_path)


def test_a_folder_that_takes_no_checkpoint_is_known_before_orbax_waits_for_it(
    tmp_path, monkeypatch
) -> None:
    check_writable(tmp_path, 1)
    assert names(tmp_path) == []
    monkeypatch.setattr("os.mkdir", partial(fails, errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        check_writable(tmp_path, 1)


def test_no_checkpoint_at_all_is_a_new_run(tmp_path: Path) -> None:
    assert newest_intact(tmp_path, verify, print, strict=True) is None


def test_where_none_is_sound_each_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(add(tmp_path, step))
    with pytest.raises(UserError) as refused:
        newest_intact(tmp_path, verify, print, strict=False)
    assert "another --out-dir" in str(refused.value)
    assert all(
        f"{tmp_path / step / 'state/array'} is corrupt" in str(refused.value) for step in "12"
    )
    assert names(tmp_path) == ["1", "2"]


def test_who_asks_for_the_newest_is_not_given_an_older_one(tmp_path: Path) -> None:
    add(tmp_path, 1)
    damage(add(tmp_path, 2))
    with pytest.raises(UserError, match=r"checkpoint 2 is damaged: .*--resume auto falls back"):
        newest_intact(tmp_path, verify, print, strict=True)
    assert names(tmp_path) == ["1", "2"]


def test_files_that_are_named_like_checkpoints_are_left_alone(tmp_path: Path) -> None:
    add(tmp_path, 4)
    for name in ("12", "5.deleted", "7.orbax-checkpoint-tmp", "notes.txt"):
        (tmp_path / name).write_text("somebody's")
    before = sorted(tmp_path.iterdir())
    remove_unfinished(tmp_path)
    prune(tmp_path, keep=1)
    assert finished_steps(tmp_path) == [4]
    assert sorted(tmp_path.iterdir()) == before


def test_an_old_checkpoint_that_is_a_link_is_pruned_and_its_target_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    elsewhere = add(tmp_path / "elsewhere", 1)
    for step in (2, 3):
        add(folder, step)
    (folder / "1").symlink_to(elsewhere)
    prune(folder, keep=1)
    assert names(folder) == ["3"]
    (folder / "2.deleted").symlink_to(elsewhere)
    remove_unfinished(folder)
    assert names(folder) == ["3"]
    assert names(elsewhere) == [MANIFEST, "state"]


def test_a_checkpoint_that_cannot_be_deleted_keeps_no_other_and_stops_no_start(
    tmp_path: Path, monkeypatch
) -> None:
    for step in (1, 2, 3):
        add(tmp_path, step)
    rmtree = shutil.rmtree

    def busy(path: Path) -> None:
        if path.name.startswith("1"):
            raise OSError(16, "Device or resource busy")
        rmtree(path)

    monkeypatch.setattr("shutil.rmtree", busy)
    with pytest.raises(OSError, match="busy"):
        prune(tmp_path, keep=1)
    assert names(tmp_path) == ["1.deleted", "3"]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["1.deleted", "3"]
