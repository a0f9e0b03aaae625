import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxgpt.run import compile_cache
from jaxgpt.run.compile_cache import (
    is_intact,
    note_new_entries,
    prepare_compile_cache,
    remove_damaged,
)

PROGRAM = """
import os, sys
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if sys.argv[1] == "prepared":
    from jaxgpt.run.compile_cache import prepare_compile_cache
    prepare_compile_cache(print)
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
print(events.count("/jax/compilation_cache/cache_hits"))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """An empty home folder, and none of the settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (compile_cache.FOLDER, compile_cache.SWITCH, compile_cache.MAX_SIZE):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    return tmp_path


def start(how: str) -> tuple[str, str]:
    """What a program that compiles one function says: (programs it found, its warnings)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*-cache") if path.is_file()]


def test_a_program_is_compiled_once_and_a_truncated_one_once_more(home: Path) -> None:
    assert start("prepared") == ("0", "")
    assert start("prepared") == ("1", "")
    (entry,) = entries(home)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    found, warned = start("prepared")
    assert (found, warned) == ("0", "")  # removed, compiled and written again
    assert entries(home)[0].stat().st_size > len(whole) // 2
    assert start("prepared") == ("1", "")


def test_left_to_itself_jax_warns_of_a_truncated_entry(home: Path, monkeypatch) -> None:
    """The day this fails, what removes them can go."""
    monkeypatch.setenv(compile_cache.FOLDER, str(home))
    start("bare")
    (entry,) = entries(home)
    entry.write_bytes(entry.read_bytes()[:100])
    for _ in range(2):
        found, warned = start("bare")
        assert found == "0"
        assert "Error reading persistent compilation cache entry" in warned


def test_the_folder_is_the_users_own_and_bounded(home: Path, monkeypatch) -> None:
    prepare_compile_cache(pytest.fail)
    folder = Path(os.environ.pop(compile_cache.FOLDER))
    assert folder.is_relative_to(home)
    assert folder.stat().st_mode & 0o777 == 0o700
    for age, name in enumerate("abc"):
        path = add_entry(folder, name)
        os.utime(path, ns=(0, 10**18 - age))
    monkeypatch.setattr(compile_cache, "LARGEST", 2 * path.stat().st_size)
    prepare_compile_cache(pytest.fail)
    assert sorted(path.name[6] for path in entries(folder)) == ["a", "b"]
    assert compile_cache.MAX_SIZE not in os.environ  # with it JAX stores nothing in some containers


@pytest.mark.parametrize("setting", [compile_cache.FOLDER, "XDG_CACHE_HOME", None])
def test_no_folder_is_called_tilde(home: Path, monkeypatch, setting: str | None) -> None:
    monkeypatch.chdir(home)
    if setting is None:  # and the user's number has no name
        monkeypatch.setattr(os.path, "expanduser", os.fspath)
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))
    else:
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv(setting, "~/cache")
    prepare_compile_cache(pytest.fail)
    folder = Path(os.environ[compile_cache.FOLDER])
    assert folder.is_relative_to(home / ("tmp" if setting is None else "cache"))
    assert not (home / "~").exists()


@pytest.mark.parametrize("name", ["caf\udce9", "ftp://host/cache"])
def test_a_folder_that_jax_cannot_use_is_said_and_done_without(home, monkeypatch, name) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv(compile_cache.FOLDER, name)
    monkeypatch.setenv(compile_cache.SWITCH, "true")
    said: list[str] = []
    prepare_compile_cache(said.append)
    assert "no compilation cache" in said[0]
    assert os.environ[compile_cache.SWITCH] == "false"


def test_a_folder_that_others_can_write_is_not_used(home: Path) -> None:
    prepare_compile_cache(pytest.fail)
    folder = Path(os.environ.pop(compile_cache.FOLDER))
    folder.chmod(0o777)
    said: list[str] = []
    prepare_compile_cache(said.append)
    assert compile_cache.FOLDER not in os.environ
    assert "can be written by others (chmod go-w)" in said[0]


def test_a_folder_that_cannot_be_made_is_said_and_done_without(home: Path, monkeypatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    said: list[str] = []
    prepare_compile_cache(said.append)
    assert compile_cache.FOLDER not in os.environ
    assert "every start compiles again" in said[0]


def test_a_full_disk_is_said_once_not_for_each_program(home: Path, monkeypatch) -> None:
    monkeypatch.setattr(compile_cache, "LEAST_FREE", 2**62)
    said: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        prepare_compile_cache(said.append)
        warnings.warn(
            "Error writing persistent compilation cache entry for 'jit_step'", stacklevel=1
        )
    assert len(said) == 1
    assert "the disk is full" in said[0]
    assert warned == []
    assert compile_cache.FOLDER in os.environ  # what is there is used


def test_the_users_settings_stand(home: Path, monkeypatch) -> None:
    monkeypatch.setenv(compile_cache.SWITCH, "false")
    prepare_compile_cache(pytest.fail)
    assert compile_cache.FOLDER not in os.environ
    monkeypatch.delenv(compile_cache.SWITCH)
    monkeypatch.setenv(compile_cache.FOLDER, str(home / "mine"))
    prepare_compile_cache(pytest.fail)
    assert os.environ[compile_cache.FOLDER] == str(home / "mine")
    assert compile_cache.MAX_SIZE not in os.environ


def test_a_zstandard_entry_that_does_not_decompress_is_removed(home: Path) -> None:
    entry = zstandard.ZstdCompressor().compress(os.urandom(1000))
    frame = entry[:4] + b"\xe0"  # of a header whose size has eight bytes
    sizes = [b"\xff" * 7 + b"\x7f", b"\xff" * 5 + b"\0\0\0"]  # 2**63 - 1, 2**40 - 1
    contents = [entry, entry[:-3], *(frame + size for size in sizes)]
    names = []
    for digit, content in zip("abcd", contents, strict=True):
        names.append(f"jit_f-{digit * 64}-cache")
        (home / names[-1]).write_bytes(content)
    assert sorted(remove_damaged(home)) == names[1:]


def add_entry(folder: Path, digit: str, content: bytes = b"x" * 1000) -> Path:
    path = folder / f"jit_f-{digit * 64}-cache"
    path.write_bytes(zlib.compress(content))
    return path


def flip_a_bit(path: Path) -> None:
    """Of a byte whose change zlib would notice, in a file whose date stays."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def make_a_folder(path: Path) -> None:
    path.unlink()
    (path / "sub").mkdir(parents=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: (path.write_bytes(b"x"), os.utime(path, ns=(0, 0))),
        lambda path: path.write_bytes(zlib.compress(b"another program")),
        flip_a_bit,
        make_a_folder,
    ],
)
@pytest.mark.parametrize("is_known", [True, False])
def test_any_damage_of_an_entry_costs_that_entry(home: Path, damage, is_known: bool) -> None:
    good, bad = (add_entry(home, digit) for digit in "ab")
    used = home / bad.name.replace("-cache", "-atime")
    used.write_bytes(b"")
    (home / "another-cache").write_bytes(b"nobody's business")
    if is_known:
        assert remove_damaged(home) == []
    damage(bad)
    could_be_sound = not is_known and not bad.is_dir() and is_intact(bad.read_bytes(), bad.name)
    assert remove_damaged(home) == ([] if could_be_sound else [bad.name])
    assert good.exists()
    assert bad.exists() == used.exists() == could_be_sound
    assert (home / "another-cache").exists()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
@example(content=b'{"jit_f-": -1}')
def test_checksums_of_any_bytes_cost_no_entry(home: Path, content: bytes) -> None:
    entry = add_entry(home, "a")
    (home / compile_cache.CHECKSUMS).write_bytes(content)
    assert remove_damaged(home) == []
    assert entry.exists()


def test_entries_of_this_process_are_known_to_the_next(home: Path, monkeypatch) -> None:
    monkeypatch.setenv(compile_cache.FOLDER, str(home))
    entry = add_entry(home, "a")
    note_new_entries()
    entry.write_bytes(zlib.compress(b"another program"))
    assert remove_damaged(home) == [entry.name]


def test_results_of_autotuning_have_checksums_too(home: Path) -> None:
    results = home / compile_cache.AUTOTUNING / "key.textproto"
    results.parent.mkdir()
    results.write_text("version: 3")
    assert remove_damaged(home) == []
    results.write_text("version: 2")
    assert remove_damaged(home) == [f"{compile_cache.AUTOTUNING}/key.textproto"]


def test_an_entry_without_its_last_use_gets_one_where_jax_needs_it(home: Path, monkeypatch) -> None:
    entry = add_entry(home, "a")
    remove_damaged(home)
    used = home / entry.name.replace("-cache", "-atime")
    assert not used.exists()
    monkeypatch.setenv(compile_cache.MAX_SIZE, "1000000")
    remove_damaged(home)
    assert len(used.read_bytes()) == 8
