import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import LARGEST, ConfigError
from jaxgpt.config.fields import (
    SECTIONS,
    Config,
    flat_fields,
    flat_values,
    with_fields,
)
from jaxgpt.config.optimizer import OptimizerConfig


def faults(**changes) -> list[str]:
    """The lines of the message with which a configuration is refused."""
    with pytest.raises(ConfigError) as refused:
        with_fields(Config(), **changes)
    return str(refused.value).splitlines()


def test_the_defaults_are_a_legal_configuration():
    assert Config() == Config(model=ModelConfig(), optimizer=OptimizerConfig())


def test_a_configuration_cannot_be_changed_after_it_is_made():
    cfg = Config()
    for section, name in ((cfg, "max_iters"), (cfg.model, "n_layer"), (cfg.optimizer, "beta1")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, 3)


def test_sections_share_no_field_name():
    """The name of a section, `optimizer`, may be a field's: the section itself is never named."""
    own = [field.name for field in dataclasses.fields(Config) if field.name not in SECTIONS]
    sections = [field.type for field in dataclasses.fields(Config) if field.name in SECTIONS]
    names = own + [field.name for section in sections for field in dataclasses.fields(section)]
    assert len(names) == len(set(names)) == len(flat_fields())


@pytest.mark.parametrize(
    "name",
    [
        *("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "lr_decay_iters"),
        *("batch_size", "effective_batch_size", "gradient_accumulation_steps", "max_iters"),
        *("eval_interval", "eval_iters", "log_interval", "keep_checkpoints"),
    ],
)
def test_what_is_counted_lies_between_one_and_what_jax_can_count(name):
    for value in (-3, 0, LARGEST + 1):
        (fault,) = faults(**{name: value})
        assert fault.startswith(f"{name} {value} ")


@pytest.mark.parametrize("name", ["warmup_iters", "momentum_warmup_iters", "sample_tokens", "seed"])
def test_what_may_be_nothing_may_not_be_negative(name):
    with_fields(Config(), **{name: 0})
    assert faults(**{name: -1}) == [f"{name} -1 must be at least 0"]


def test_a_seed_that_jax_would_cut_off_is_refused():
    # jax.random.key(2**32) is key(0).
    assert faults(seed=2**32) == [f"seed {2**32} must be at most {LARGEST}"]


@pytest.mark.parametrize(
    "name",
    [
        *("learning_rate", "min_lr", "weight_decay", "grad_clip", "beta1", "beta2", "dropout"),
        *("embedding_lr", "head_lr", "vector_lr", "cooldown_fraction", "checkpoint_minutes"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5])
def test_numbers_are_finite_and_not_negative(name, value):
    (fault,) = faults(**{name: value})
    assert fault.startswith(f"{name} {value:g} must be ")


@pytest.mark.parametrize(
    "name", [n for n, f in flat_fields().items() if re.search(r"\bfloat\b", str(f.type))]
)
def test_numbers_that_float32_cannot_hold_are_refused(name):
    for value in (1e39, -1e39, 1e-39, 5e-324):
        told = f"{name} {value:g} is beyond float32"
        assert any(fault.startswith(told) for fault in faults(**{name: value}))


@pytest.mark.parametrize("name", ["beta1", "beta2", "dropout"])
def test_a_share_stays_below_one(name):
    for value in (1.0, 0.99999999):  # the second is 1 in float32
        assert faults(**{name: value}) == [f"{name} {value} must be at least 0 and below 1"]


@pytest.mark.parametrize("name", ["learning_rate", "head_lr", "checkpoint_minutes"])
def test_some_numbers_cannot_be_zero(name):
    assert faults(**{name: 0.0}) == [f"{name} 0 must be finite and above 0"]


def test_a_width_that_heads_do_not_divide_is_answered_with_the_nearest_that_they_do():
    (fault,) = faults(n_embd=770, n_head=12)
    assert "n_embd 770" in fault
    assert "n_head 12" in fault
    assert fault.endswith(" 768")


def test_a_batch_that_does_not_divide_is_refused():
    (fault,) = faults(effective_batch_size=512, batch_size=48)
    assert fault.startswith("effective_batch_size 512 is not a multiple of batch_size 48")
    (fault,) = faults(effective_batch_size=30, batch_size="auto", mesh="data=4")
    assert "is not a multiple of batch_size 1 x 4 devices" in fault


def test_accumulation_and_effective_batch_may_not_disagree():
    with_fields(Config(), batch_size=8, effective_batch_size=64, gradient_accumulation_steps=8)
    (fault,) = faults(batch_size=8, effective_batch_size=64, gradient_accumulation_steps=7)
    assert "7 x batch_size 8 = 56 is not effective_batch_size 64" in fault


def test_accumulation_needs_a_batch_size_that_is_a_number():
    (fault,) = faults(batch_size="auto", gradient_accumulation_steps=4)
    assert fault.startswith("gradient_accumulation_steps 4 needs a batch_size that is a number")


def test_a_rate_that_would_rise_at_the_end_is_answered_with_one_that_falls():
    (fault,) = faults(learning_rate=3e-5)
    assert fault == (
        "min_lr 6e-05 is above learning_rate 3e-05; set it as well, usually to a tenth: 3e-06"
    )
    with_fields(Config(), learning_rate=3e-5, decay_lr=False)  # min_lr is not used then


def test_a_cooldown_is_a_share_of_the_run():
    with_fields(Config(), cooldown_fraction=1.0)
    for value in (0.0, 1.5):
        (fault,) = faults(cooldown_fraction=value)
        assert fault.startswith(f"cooldown_fraction {value:g} must be above 0 and at most 1; ")


def test_a_run_may_be_shorter_than_its_warm_up():
    with_fields(Config(), max_iters=100, warmup_iters=2000, lr_decay_iters=100)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    with_fields(Config(), vocab_size=50304, n_vocab=50257)
    (fault,) = faults(vocab_size=50000, n_vocab=50257)
    assert "vocab_size 50000" in fault
    assert "50257" in fault


def test_a_data_folder_that_would_not_be_read_is_refused():
    (fault,) = faults(dataset="embedded", data_dir=Path("data/mine"))
    assert "data_dir data/mine is not read with dataset 'embedded'" in fault


def test_every_fault_is_reported_at_once():
    found = faults(
        n_embd=770, dropout=1.5, beta2=2.0, batch_size=48, max_iters=0, learning_rate=math.nan
    )
    assert [fault.split()[0] for fault in found] == [
        *("n_embd", "dropout", "learning_rate", "beta2", "max_iters", "effective_batch_size"),
    ]


def test_fields_are_changed_by_their_flat_names_and_the_rest_stays():
    cfg = with_fields(Config(seed=7), n_layer=3, beta1=0.8, max_iters=9)
    assert (cfg.model.n_layer, cfg.optimizer.beta1, cfg.max_iters, cfg.seed) == (3, 0.8, 9, 7)
    assert cfg.model.n_head == ModelConfig.n_head
    with pytest.raises(TypeError):
        with_fields(cfg, n_layers=3)


def test_flat_values_are_json_by_the_names_of_the_fields():
    cfg = with_fields(Config(), n_layer=3, out_dir=Path("runs/x"))
    values = flat_values(cfg)
    assert values.keys() == flat_fields().keys()
    assert (values["n_layer"], values["out_dir"], values["data_dir"]) == (3, "runs/x", None)
    assert json.loads(json.dumps(values)) == values


def test_tokens_of_a_step_follow_from_the_effective_batch():
    assert Config(effective_batch_size=512).tokens_per_step == 524_288


def test_what_is_left_to_the_memory_there_is():
    assert Config().open_choices == frozenset()
    assert Config(batch_size="auto", remat="auto").open_choices == {"batch_size", "remat"}
    assert Config(batch_size=8).batch_size_or(3) == 8
    assert Config(batch_size="auto").batch_size_or(3) == 3
