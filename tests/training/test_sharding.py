"""Sharding, on eight devices that a CPU pretends to have."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.configs import resolved
from helpers.trees import TINY
from jax.sharding import PartitionSpec

from jaxgpt.config.batch import Batch
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, with_fields
from jaxgpt.config.mesh_shape import MeshShape, choose_mesh, parse_mesh
from jaxgpt.training.sharding import make_layout, specs_of

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


def test_a_mesh_has_the_losses_of_one_device_with_another_network(seen) -> None:
    one, many = seen["qwen3 losses"].values()
    assert one[-1] < one[0] - 0.1
    np.testing.assert_allclose(many, one, rtol=3e-6)


def test_a_mesh_skips_the_overflows_of_one_device_in_float16(seen) -> None:
    one, many = seen["float16"].values()
    assert 0 < one["overflows"] < SAVED_AT
    for part in ("scale", "good_steps", "overflows"):
        assert many[part] == one[part], part
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-3)


@pytest.mark.parametrize("mesh", MESHES)
def test_muon_on_a_mesh_has_the_update_of_one_device(seen, mesh) -> None:
    one, many = seen["muon"]["one"], seen["muon"][mesh]
    assert one.keys() == many.keys()
    for path, update in one.items():
        np.testing.assert_allclose(many[path], update, rtol=0, atol=1e-5 * max(map(abs, update)))
    assert seen["muon_gathers"]["one"] == 0
    assert seen["muon_gathers"][mesh] <= 4  # one for each shape of a matrix, none in the iterations


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


def test_a_mixture_resumes_bit_for_bit_across_a_stage_on_a_mesh(seen) -> None:
    mesh = "data=2,fsdp=4"
    assert seen["resumed"][f"{mesh} to {mesh}"] == seen["losses"][mesh][SAVED_AT:]


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
