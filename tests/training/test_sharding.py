"""What is asked of a mesh, and how arrays are divided on it."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.configs import resolved
from helpers.trees import TINY
from jax.sharding import PartitionSpec

from jaxgpt.config.batch import Batch
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, with_fields
from jaxgpt.config.mesh_shape import MeshShape, choose_mesh, parse_mesh
from jaxgpt.training.sharding import MeshLayout, make_layout, specs_of

CFG = with_fields(Config(model=TINY), batch_size=2, effective_batch_size=32)


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (None, MeshShape(1, 1)),
        ("data=8", MeshShape(8, 1)),
        ("fsdp=8", MeshShape(1, 8)),
        ("fsdp=4, data=2", MeshShape(2, 4)),
    ],
)
def test_a_mesh_is_two_numbers(text, shape) -> None:
    assert parse_mesh(text) == shape
    assert parse_mesh(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "8", "data=0", "data=2,data=4", "tensor=2", "data=-1"])
def test_what_is_no_mesh_is_said_so(text) -> None:
    with pytest.raises(ConfigError, match="is not of the form data=2,fsdp=4"):
        with_fields(CFG, mesh=text)


def test_micro_batches_follow_from_the_devices() -> None:
    assert resolved(CFG, mesh="data=8").batch == Batch(2, 8, 2)
    assert resolved(CFG, mesh="data=2,fsdp=2").batch == Batch(2, 4, 4)
    assert resolved(CFG).batch == Batch(2, 1, 16)
    assert make_layout([SimpleNamespace()], resolved(CFG).mesh).count == 1


def test_a_model_that_fsdp_does_not_divide_is_refused_with_sizes_that_do() -> None:
    with pytest.raises(ConfigError, match=r"fsdp=3 does not divide n_embd 16; the nearest that do"):
        resolved(CFG, effective_batch_size=36, mesh="fsdp=3")
    with pytest.raises(ConfigError, match=r"fsdp=500 .* n_embd 16; .* that do: 16, 8, 4"):
        resolved(CFG, effective_batch_size=500, batch_size=1, mesh="fsdp=500")


def test_more_devices_than_there_are_and_fewer_than_the_processes_have_are_refused() -> None:
    assert choose_mesh(None, 4) == MeshShape(data=4)
    assert choose_mesh("fsdp=2", 4) == MeshShape(fsdp=2)
    with pytest.raises(ConfigError, match="has 8 devices, and there are 2"):
        choose_mesh("data=8", 2)
    with pytest.raises(ConfigError, match="has 2 devices, and there are 4"):
        choose_mesh("data=2", 4, processes=2)


def test_the_rule_is_by_the_end_of_the_path() -> None:
    tree = {"wte": {"embedding": 0}, "blocks": {0: {"mlp": {"c_fc": {"kernel": 0, "bias": 0}}}}}
    specs = specs_of(tree)
    c_fc = specs["blocks"][0]["mlp"]["c_fc"]
    assert specs["wte"]["embedding"] == c_fc["kernel"] == PartitionSpec("fsdp")
    assert c_fc["bias"] == PartitionSpec()


def test_evaluation_steps_wait_for_each_other_on_a_cpu() -> None:
    # XLA aborts after a deadlock of 40 s, but by chance only: no test can wait for that.
    results, waited = [SimpleNamespace(block_until_ready=lambda: waited.append(1))], []
    layout = MeshLayout(jax.devices("cpu")[:1], MeshShape())
    step = layout.with_sharded_batch(lambda params, tokens_BT1: results)
    assert step(None, np.zeros((2, 3), np.uint16)) is not None
    assert waited == [1]
