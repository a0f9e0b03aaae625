import os
import subprocess
import sys
from pathlib import Path

import compare_loss
import evaluate_checkpoints
import numpy as np
import pytest

from jaxgpt.errors import UserError

SCRIPT = Path(compare_loss.__file__)

NANOGPT_LOG = """\
step 0: train loss 5.6106, val loss 5.6129
iter 0: loss 5.6080, time 801.50ms, mfu -100.00%
iter 1: loss nan, time 35.01ms, mfu -100.00%
step 2: train loss 3.5012, val loss 3.4998
saving checkpoint to out
iter 2: loss 3.5100, time 90.10ms, mfu -100.00%
"""


@pytest.mark.parametrize("length", [12, 13, 14, 200])
def test_every_token_but_the_first_is_predicted_once_in_order(length):
    batches = list(evaluate_checkpoints.consecutive_windows(np.arange(length), 4, batch=3))
    predicted = [token for windows in batches for token in windows[:, 1:].ravel()]
    assert predicted == list(range(1, length))
    assert all((windows[:, :-1] + 1 == windows[:, 1:]).all() for windows in batches)
    assert all(len(windows) <= 3 and windows.shape[1] <= 5 for windows in batches)


def test_nanogpts_iterations_are_counted_as_steps():
    losses, estimate = compare_loss.read_nanogpt_log(NANOGPT_LOG)
    assert losses == {1: 5.6080, 2: pytest.approx(float("nan"), nan_ok=True), 3: 3.5100}
    assert estimate == 3.4998


def test_standard_errors_are_those_of_the_difference_of_two_means():
    # Variances 1 and 4 of three values each: the error is sqrt(1/3 + 4/3).
    errors = compare_loss.standard_errors([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert errors == pytest.approx(5 / (5 / 3) ** 0.5)


def test_only_nanogpts_own_seed_line_is_changed():
    train = "x = 1\ntorch.manual_seed(1337 + seed_offset)\n"
    assert compare_loss.with_seed(train, 7) == "x = 1\ntorch.manual_seed(7 + seed_offset)\n"
    for other in ("torch.manual_seed(42)", train + train, ""):
        with pytest.raises(UserError, match="seed"):
            compare_loss.with_seed(other, 7)


@pytest.mark.slow
def test_a_folder_without_nanogpt_ends_with_a_sentence_and_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "git clone https://github.com/karpathy/nanoGPT" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_torch_is_reported_with_the_remedy(tmp_path, monkeypatch):
    for name in compare_loss.NANOGPT_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch"):
        compare_loss.check_nanogpt(tmp_path)
