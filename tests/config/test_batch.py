import pytest

from jaxgpt.config.batch import (
    Batch,
    BatchError,
    batch_sizes,
    divide_batch,
    divisors,
    fields_of_accumulation,
)
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config


@pytest.mark.parametrize(
    ("effective", "batch_size", "devices", "accumulation"),
    [(512, 32, 1, 16), (512, 32, 2, 8), (512, 64, 8, 1), (12, 12, 1, 1), (480, 10, 48, 1)],
)
def test_a_step_is_divided(effective, batch_size, devices, accumulation):
    batch = divide_batch(effective, batch_size, devices)
    assert batch == Batch(batch_size, devices, accumulation)
    assert batch.effective == effective
    assert batch.global_micro_batch == batch_size * devices


@pytest.mark.parametrize(
    ("sizes", "answer"),
    [
        ((512, 48, 1), "512 is not a multiple of batch_size 48; the nearest that is: 528, or use "
         "batch_size 32"),
        ((8, 32, 1), "the nearest that is: 32, or use batch_size 8"),
        ((32, 2, 3), "32 is not a multiple of batch_size 2 x 3 devices; the nearest that is: 30, "
         "33 with batch_size 1, or use 2 devices with --mesh and batch_size 2"),
        ((16, 16, 6), "the nearest that is: 96, 18 with batch_size 3, or use 4 devices with --mesh "
         "and batch_size 4"),
        ((4, 1, 8), "batch_size 1 x 8 devices; the nearest that is: 8, or use 4 devices"),
        ((32, 8, 8), "the nearest that is: 64, or use batch_size 4"),
    ],
)  # fmt: skip
def test_a_remainder_is_answered_with_sizes_that_divide(sizes, answer):
    with pytest.raises(BatchError) as refused:
        divide_batch(*sizes)
    assert answer in str(refused.value)


def test_the_batch_sizes_are_the_divisors_of_each_devices_share():
    assert batch_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert batch_sizes(12, 2) == [1, 2, 3, 6]
    with pytest.raises(BatchError, match="x 5 devices"):
        batch_sizes(12, 5)
    assert divisors(1) == [1]


def test_nanogpts_accumulation_counts_all_devices():
    fields = {"effective_batch_size": 480, "gradient_accumulation_steps": None}
    assert fields_of_accumulation(40, 12, None) == fields
    assert fields_of_accumulation(40, 12, 480) == fields
    sizes = {"gradient_accumulation_steps": 40, "batch_size": 12, "effective_batch_size": 400}
    with pytest.raises(ConfigError, match="40 x batch_size 12 = 480 is not effective_batch_size"):
        Config(**sizes)


def test_a_batch_says_how_it_comes_about():
    assert str(Batch(32, 1, 16)) == "batch_size 32 x 16 accumulated"
    assert str(Batch(32, 2, 8)) == "batch_size 32 x 2 devices x 8 accumulated"
