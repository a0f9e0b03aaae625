"""Eight devices, which a CPU pretends to have, train, sample and restore what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.trees import TINY

from jaxgpt.config.mesh_shape import parse_mesh

MESHES = ("data=8", "fsdp=8", "data=2,fsdp=4")
SAVED_AT = 20
pytestmark = pytest.mark.slow  # 40 s of compiling for eight devices


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
