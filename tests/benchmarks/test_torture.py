import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgpt

ROOT = Path(jaxgpt.__file__).parents[1]


@pytest.mark.slow
def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "torture.py"), "--kills", "10"]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "runs")],
        **dict(env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True),
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^kill \d+:", done.stdout, re.MULTILINE)) == 10
    assert "under way" in done.stdout
