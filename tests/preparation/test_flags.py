"""The flags of `jaxgpt.prepare`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.preparing import prepare

from jaxgpt.errors import UserError
from jaxgpt.preparation.flags import PrepareFlags


def test_all_mistakes_in_the_flags_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare("fineweb", "--workers", "0", "--val-tokens", "0", "--limit-tokens", "x")
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(flag in lines[n] for n, flag in enumerate(("--limit", "--val", "--workers")))


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--shard_tokns", "3", "Perhaps you meant: --shard-tokens"),
        ("--workers", "many", "Error parsing --workers"),
        (
            "--sample-by",
            "lines",
            "--sample-by lines must be document, paragraph, line, or the text between",
        ),
    ],
)
def test_a_flag_that_cannot_be_parsed_is_reported_with_the_valid_ones(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare("fineweb", flag, value)
    assert caught.value.code == 2
    assert said in " ".join(re.sub(r"[^\w\s(),:'-]", " ", capsys.readouterr().err).split())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("27B", 27 * 10**9),
        ("4.1B", 4_100_000_000),
        ("1e9", 10**9),
        ("100,000", 10**5),
        ("7k", 7000),
    ],
)
def test_numbers_may_have_suffixes_separators_and_exponents(text: str, number: int) -> None:
    assert PrepareFlags(limit_tokens=text).number_of("limit_tokens") == number


@pytest.mark.parametrize(
    "text", ["0", "-1", "0.5", "nan", "inf", "1e99", "1e999999T", "", "B", "1.5.2"]
)
def test_a_value_that_is_not_a_positive_integer_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a positive integer"):
        PrepareFlags(limit_tokens=text).number_of("limit_tokens")


def test_a_mistake_is_reported_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from jaxgpt.prepare import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, *sorted({'numpy', 'pyarrow', 'datasets', 'jax',"
        " 'tiktoken', 'huggingface_hub'} & set(sys.modules)))"
    )
    for flag, exit_code in (("--help", "0"), ("--limt-tokens", "2"), ("--workers=many", "2")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == exit_code, done


def test_a_closed_output_or_a_deleted_folder_is_no_bug_while_flags_are_parsed(
    tmp_path: Path,
) -> None:
    command = f"{sys.executable} -m jaxgpt.prepare"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for script, code in ((f"{command} --help >&-", 0), (f"rmdir $PWD; {command} --out ./~x", 2)):
        folder = tmp_path / str(code)
        folder.mkdir()
        done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True)
        assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr
