import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import assert_same_end, train

from jaxgpt import evaluate
from jaxgpt.errors import UserError
from jaxgpt.run.orbax_path import is_literal, orbax_path

NAMES = ["lr[1e-3]", "a*b?", "{x}", "100%", "back\\slash", "new\nline", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("name", ["runs", "with space", "größe", "a-b_c.d", "lr=3e-4,b=2"])
def test_ordinary_names_are_used_as_they_are(tmp_path: Path, name: str):
    with orbax_path(tmp_path / name) as path:
        assert path == tmp_path / name


@pytest.mark.parametrize("name", NAMES)
def test_a_special_name_gets_a_link_that_goes_again(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    with orbax_path(tmp_path / name) as path:
        assert is_literal(path)
        assert path.samefile(tmp_path / name)
    assert not path.parent.exists()


def test_a_locale_that_is_not_utf_8_does_not_change_a_name():
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = "import sys; from jaxgpt.run.orbax_path import *; print(is_literal(Path(sys.argv[1])))"
    told = subprocess.run([sys.executable, "-c", code, "é"], env=env, stdout=subprocess.PIPE)
    assert told.stdout == b"False\n"


def test_several_processes_refuse_a_special_name(tmp_path: Path):
    with (
        pytest.raises(UserError, match="several processes"),
        orbax_path(tmp_path / "lr[1e-3]", processes=2),
    ):
        pass


@pytest.mark.parametrize("place", ["lr[1e-3]/run", os.fsdecode(b"caf\xe9 [2]")])
def test_a_run_resumes_in_a_folder_of_any_name(straight: Path, tmp_path: Path, place: str):
    out_dir = tmp_path / place
    assert train(out_dir, "--max-iters", "4", "--lr-decay-iters", "8") == 0
    assert train(out_dir, "--max-iters", "8", "--lr-decay-iters", "8") == 0
    assert evaluate.main(["--out-dir", str(out_dir), "--val-tokens", "2000"]) == 0
    assert_same_end(Path(shutil.move(out_dir, tmp_path / "moved")), straight)


def test_a_checkpoint_that_cannot_be_read_back_is_not_signed(tmp_path: Path, monkeypatch, refused):
    monkeypatch.setattr("jaxgpt.run.orbax_path.is_literal", lambda folder: True)
    said = refused(tmp_path / "lr[1e-3]", "--max-iters", "4")
    assert "step 0 could not be saved" in said
