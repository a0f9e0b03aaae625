import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from helpers.configs import resolved
from helpers.trees import TINY

import jaxgpt
from jaxgpt.config.fields import Config
from jaxgpt.config.presets import packaged_presets, presets_dir
from jaxgpt.config.resolved import BFLOAT16_FROM
from jaxgpt.planning import memory, target
from jaxgpt.planning.gpus import GIB, find_gpu
from jaxgpt.planning.memory import ESTIMATE_ERROR, Need, estimate
from jaxgpt.training.build import compile_eval_step, compile_train_step

ROOT = Path(jaxgpt.__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "measure_memory.py"))
ROWS = json.loads(SCRIPT["RESULTS"].read_text())["rows"]
# Of each preset, the row of the last card in its list.
BEST_KNOWN = {row["preset"]: row for row in ROWS if row["list"] == "presets"}
CFG = resolved(Config(model=TINY), batch_size=2, effective_batch_size=4, max_iters=10)


def name(row: dict) -> str:
    shape = f"{row['n_layer']}x{row['n_embd']}-B{row['batch_size']}"
    return f"{row['preset'] or shape}-{row['gpu']}-{row['remat']}"


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_the_estimate_is_as_near_to_the_compiler_as_it_says(row) -> None:
    guess = estimate(SCRIPT["config_from"](row))
    assert guess.method == "estimated"
    assert abs(guess.peak_bytes / row["peak_bytes"] - 1) < ESTIMATE_ERROR


def test_what_was_measured_covers_what_is_claimed() -> None:
    assert {row["remat"] for row in ROWS} == {"none", "light", "full"}
    assert {row["list"] for row in ROWS} == {"presets", "tiers", "shapes"}
    wanted = [SCRIPT["record"](*run, 0) for run in SCRIPT["runs"]()]
    found = [{**row, "peak_bytes": 0} for row in ROWS]
    assert [row for row in wanted if row not in found] == []
    assert [row for row in found if row not in wanted] == []


def test_the_headers_of_the_presets_have_the_measured_figures() -> None:
    peaks = {(r["preset"], r["gpu"]): r["peak_bytes"] for r in ROWS if r["list"] == "presets"}
    sentence = r"A step needs (\S+) GiB \(compiled\); an? (.+) has (\S+) GiB for it"
    headers = 0
    for preset in packaged_presets():
        text = (presets_dir() / f"{preset}.toml").read_text()
        for need, card, room in re.findall(sentence, text):
            gpu = find_gpu(card)
            figures = (peaks[preset, gpu.key], memory.capacity_of(gpu))
            assert (preset, need, room) == (preset, *(f"{x / GIB:.1f}" for x in figures))
            headers += 1
    assert headers == len(BEST_KNOWN)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_state_is_counted_to_the_byte(state_dtype, optimizer) -> None:
    cfg = resolved(CFG.asked, state_dtype=state_dtype, optimizer=optimizer)
    like = memory.build_for(cfg, jax.devices("cpu")[0]).state_like
    kept = {
        "parameters": like.params,
        "optimizer": like.opt_state.inner_opt_state[2],
        "accumulator": like.opt_state.acc_grads,
    }
    counted = {  # but for counts and Muon's three coefficients
        item: sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.size > 3
        )
        for item, tree in kept.items()
    }
    assert memory.state_bytes(cfg) == counted
    assert memory.host_bytes(cfg) == counted["parameters"] + counted["optimizer"]


def test_compiled_steps_tell_what_they_need_and_the_items_add_up() -> None:
    training = memory.build_for(CFG, jax.devices("cpu")[0])
    step = compile_train_step(training, 2, CFG.batch.batch_size)
    need = memory.need_of(CFG, step, compile_eval_step(training, CFG.batch.batch_size))
    assert need.method == "compiled"
    assert sum(need.breakdown_bytes.values()) == need.peak_bytes
    assert need.peak_bytes > sum(memory.state_bytes(CFG).values())
    assert min(need.breakdown_bytes.values()) >= 0


def test_an_evaluation_that_needs_more_than_a_step_counts() -> None:
    stats = {"output_size_in_bytes": 0, "alias_size_in_bytes": 0}

    def compiled(argument: int, temp: int):
        sizes = {"argument_size_in_bytes": argument, "temp_size_in_bytes": temp, **stats}
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))

    kept = memory.state_bytes(CFG)
    state = sum(kept.values())
    need = memory.need_of(CFG, compiled(state, 100), compiled(kept["parameters"], 10**6))
    assert need.peak_bytes == state + 10**6


def test_an_estimate_has_to_fit_with_its_error() -> None:
    known = {"peak_bytes": 10 * GIB, "host_bytes": 0, "breakdown_bytes": {}}
    assert Need(**known, method="compiled").fits(int(10.6 * GIB))
    assert not Need(**known, method="compiled").fits(int(10.4 * GIB))
    assert not Need(**known, method="estimated").fits(int(10.6 * GIB))
    assert Need(**known, method="estimated").fits(int(11.6 * GIB))


def test_the_pool_of_a_card_is_the_share_that_train_takes() -> None:
    assert memory.capacity_of(find_gpu("rtx4090")) == int(24564 * 2**20 * 0.92)


def test_the_hosts_memory_is_the_machines_or_the_containers() -> None:
    available = memory.host_available()
    assert available is None or 0 < available < 2**50
    assert memory.device_limit(jax.devices("cpu")[0]) is not None or available is None


needs_compiler = pytest.mark.skipif(
    target.obstacle(find_gpu("rtx4090")) is not None,
    reason=f"XLA's compiler for cards: {target.obstacle(find_gpu('rtx4090'))}",
)


def kind_of_program(row: dict) -> tuple:
    """The settings, apart from sizes, that change the program most."""
    cfg, gpu = SCRIPT["config_from"](row), find_gpu(row["gpu"])
    has_bfloat16 = gpu.compute_capability >= BFLOAT16_FROM
    return cfg.model.arch, row["remat"], row["state_dtype"], has_bfloat16


def share_of_card(row: dict) -> float:
    return row["peak_bytes"] / memory.capacity_of(find_gpu(row["gpu"]))


# Of each kind, the row nearest its card's limit, where XLA recomputes to save memory. The other
# rows' configurations are compared with their presets above.
ONE_OF_EACH_KIND = {
    kind_of_program(row): row for row in sorted(BEST_KNOWN.values(), key=share_of_card)
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("row", ONE_OF_EACH_KIND.values(), ids=name)
def test_presets_still_need_what_was_written_down(row) -> None:
    cfg, device = SCRIPT["config_from"](row), target.card_devices(find_gpu(row["gpu"]))[0]
    need = memory.need_of(cfg, memory.compile_ahead(cfg, device))
    assert need.method == "compiled"
    assert abs(need.peak_bytes / row["peak_bytes"] - 1) < 0.05
