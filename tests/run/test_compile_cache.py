import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from jaxgpt.run import compile_cache
from jaxgpt.run.compile_cache import prepare_compile_cache, remove_damaged

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


def test_the_folder_is_the_users_own_and_bounded(home: Path) -> None:
    prepare_compile_cache(pytest.fail)
    folder = Path(os.environ[compile_cache.FOLDER])
    assert folder.is_relative_to(home)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert int(os.environ[compile_cache.MAX_SIZE]) == compile_cache.LARGEST


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


def test_without_the_zstandard_package_its_entries_are_kept(home: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    truncated = zstandard.ZstdCompressor().compress(b"x" * 1000)[:-3]
    (home / f"jit_f-{'a' * 64}-cache").write_bytes(truncated)
    (home / f"jit_f-{'b' * 64}-cache").write_bytes(zlib.compress(b"x" * 1000)[:-3])
    assert remove_damaged(home) == [f"jit_f-{'b' * 64}-cache"]


def test_what_was_intact_is_not_read_again(home: Path, monkeypatch) -> None:
    good, bad = (home / f"jit_f-{digit * 64}-cache" for digit in "ab")
    (home / "another-cache").write_bytes(b"nobody's business")
    good.write_bytes(zlib.compress(b"x" * 1000))
    bad.write_bytes(good.read_bytes()[:-3])
    used = home / bad.name.replace("-cache", "-atime")
    used.write_bytes(b"")
    assert remove_damaged(home) == [bad.name]
    assert not used.exists()
    assert (home / "another-cache").exists()
    looked = []
    monkeypatch.setattr(compile_cache, "is_intact", lambda entry: looked.append(entry) or True)
    os.utime(good, ns=(0, 0))
    assert remove_damaged(home) == []
    assert looked == []
