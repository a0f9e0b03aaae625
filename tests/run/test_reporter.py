import pytest

from jaxgpt.run.reporter import IN_A_ROW, DivergedError, SkipCounter


def note(counter: SkipCounter, step: int, skipped: int) -> str | None:
    scalars = {"train/skipped_steps": skipped, "train/loss": float("nan"), "train/grad_norm": 2.0}
    return counter.note(step, scalars)


def test_a_skipped_step_is_told_and_others_are_not() -> None:
    counter = SkipCounter(3)
    assert note(counter, 1, 3) is None
    assert note(counter, 2, 4) == "step 2 skipped: loss nan, gradient norm 2 (4 so far)"
    assert note(counter, 3, 4) is None


def test_ten_in_a_row_end_the_run_and_nine_do_not() -> None:
    counter = SkipCounter(0)
    assert IN_A_ROW == 10
    for step in range(1, 10):
        assert note(counter, step, step)
    assert note(counter, 10, 9) is None
    for step in range(11, 20):
        note(counter, step, step - 1)
    with pytest.raises(DivergedError, match=r"10 steps in a row, 11 to 20, .*--learning-rate"):
        note(counter, 20, 19)


def test_overflows_are_reported_and_never_end_the_run() -> None:
    counter = SkipCounter(0, overflows=1)
    scalars = {"train/skipped_steps": 0, "train/loss": 4.0, "train/grad_norm": float("inf")}
    for step in range(1, 20):
        message = counter.note(
            step, {**scalars, "train/overflows": step + 1, "train/loss_scale": 2048}
        )
        assert message == (
            f"step {step} skipped: a gradient overflowed float16; the loss scale is now 2,048 "
            f"({step + 1} so far)"
        )
