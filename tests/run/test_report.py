from pathlib import Path

import pytest
from helpers.configs import resolved

from jaxgpt.config.presets import load_preset
from jaxgpt.run.report import _next_commands


@pytest.mark.parametrize(
    ("warmup_iters", "lr_decay_iters", "says_so"),
    [(2, None, True), (2, 9, True), (2, 100, False), (100, None, False)],
)
def test_the_learning_rate_is_said_to_stay_only_where_it_has_decayed(
    tmp_path: Path, warmup_iters: int, lr_decay_iters: int | None, says_so: bool
) -> None:
    run = {"max_iters": 10, "warmup_iters": warmup_iters, "lr_decay_iters": lr_decay_iters}
    cfg = resolved(load_preset("demo"), "float32", out_dir=tmp_path, **run)
    text = _next_commands(cfg, "python -m jaxgpt.train", [], 10)
    assert "--max-iters 20\n      train longer" in text
    assert ("stays at min_lr" in text) == says_so
