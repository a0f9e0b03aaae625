"""Sharding, on eight devices that a CPU pretends to have."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.trees import TINY
from jax.sharding import PartitionSpec

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, with_fields
from jaxgpt.config.mesh_shape import MeshShape, parse_mesh
from jaxgpt.training.sharding import choose_layout, for_shape, specs_of

MESHES = ("data=8", "fsdp=8", "data=2,fsdp=4")
SAVED_AT = 20
CFG = with_fields(Config(model=TINY), batch_size=2, effective_batch_size=32)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What tests/helpers/mesh_worker.py has seen."""
    worker = Path(__file__).parents[1] / "helpers" / "mesh_worker.py"
    command = [sys.executable, str(worker), str(tmp_path_factory.mktemp("mesh"))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_has_the_losses_of_one_device(seen, mesh) -> None:
    one, many = seen["losses"]["one"], seen["losses"][mesh]
    assert len(one) == 50
    assert one[-1] < one[0] - 0.1
    np.testing.assert_allclose(many, one, rtol=3e-6)  # sums of float32 in another order
    assert seen["evaluations"][mesh] == pytest.approx(seen["evaluations"]["one"], rel=2e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_writes_what_one_device_writes(seen, mesh) -> None:
    assert len(set(seen["samples"]["one"])) > 1
    assert seen["samples"][mesh] == seen["samples"]["one"]


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_holds_its_share_of_the_state_and_no_more(seen, mesh) -> None:
    shares, fsdp = seen["shares"][mesh], parse_mesh(mesh).fsdp
    matrices = {path for path in shares if path.endswith(("kernel", "embedding"))}
    for part in ("params/", "opt_state/acc_grads/", "/mu/", "/nu/"):
        assert sum(part in path for path in matrices) == 2 + 2 * 4, part
    for path, share in shares.items():
        assert share == (1 / fsdp if path in matrices else 1), path


def test_no_step_gathers_more_than_the_embedding_or_a_matrix_at_once(seen) -> None:
    assert seen["gathers"]["data=8"] == 0
    largest = max(seen["embedding"], 4 * TINY.n_embd**2)
    assert seen["gathers"]["fsdp=8"] == seen["gathers"]["data=2,fsdp=4"] == largest
    assert largest < seen["parameters"] / 4


@pytest.mark.parametrize(
    "change", ["one to fsdp=8", "fsdp=8 to data=2,fsdp=4", "data=2,fsdp=4 to one"]
)
def test_a_checkpoint_goes_on_over_any_other_mesh(seen, change) -> None:
    expected = seen["losses"]["one"][SAVED_AT:]
    np.testing.assert_allclose(seen["resumed"][change], expected, rtol=3e-6)


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


def devices(count: int, processes: int = 1) -> list[SimpleNamespace]:
    return [SimpleNamespace(process_index=i * processes // count) for i in range(count)]


def test_micro_batches_follow_from_the_devices() -> None:
    assert for_shape(CFG, MeshShape(8, 1)).gradient_accumulation_steps == 2
    assert for_shape(CFG, MeshShape(2, 2)).gradient_accumulation_steps == 4
    cfg, layout = choose_layout(CFG, devices(1))
    assert (cfg.mesh, cfg.gradient_accumulation_steps, layout.count) == (None, 16, 1)


@pytest.mark.parametrize(
    ("changes", "shape", "answer"),
    [
        ({}, MeshShape(3, 1), "32 is not a multiple of batch_size 2 x 3 devices; the nearest that "
         "is: 30, 33 with batch_size 1, or take 2 devices with --mesh and batch_size 2"),
        ({"effective_batch_size": 16, "batch_size": 16}, MeshShape(6, 1), "the nearest that is: "
         "96, 18 with batch_size 3, or take 4 devices with --mesh and batch_size 4"),
        ({"effective_batch_size": 4, "batch_size": 4, "auto_batch_size": True}, MeshShape(8, 1),
         "batch_size 1 x 8 devices; the nearest that is: 8, or take 4 devices"),
        ({"batch_size": 8}, MeshShape(8, 1), "the nearest that is: 64, or take batch_size 4"),
        ({"effective_batch_size": 36}, MeshShape(1, 3), "fsdp=3 does not divide n_embd 16; the "
         "nearest that do: 2, 4, 8"),
    ],
)  # fmt: skip
def test_what_devices_do_not_divide_is_answered_with_what_they_do(changes, shape, answer) -> None:
    with pytest.raises(ConfigError) as refused:
        for_shape(with_fields(CFG, **changes), shape)
    assert answer in str(refused.value)


def test_more_devices_than_there_are_and_fewer_than_the_processes_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="has 8 devices, and 2 are there"):
        choose_layout(with_fields(CFG, mesh="data=8"), devices(2))
    with pytest.raises(ConfigError, match="has 2 devices, and 4 are there"):
        choose_layout(with_fields(CFG, mesh="data=2"), devices(4, processes=2))


def test_the_rule_is_by_the_end_of_the_path() -> None:
    tree = {"wte": {"embedding": 0}, "blocks": {0: {"mlp": {"c_fc": {"kernel": 0, "bias": 0}}}}}
    specs = specs_of(tree)
    c_fc = specs["blocks"][0]["mlp"]["c_fc"]
    assert specs["wte"]["embedding"] == c_fc["kernel"] == PartitionSpec("fsdp")
    assert c_fc["bias"] == PartitionSpec()
