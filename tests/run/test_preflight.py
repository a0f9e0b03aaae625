from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.configs import resolved
from helpers.trees import TINY

from jaxgpt.config.batch import Batch
from jaxgpt.config.fields import Config
from jaxgpt.config.mesh_shape import MeshShape
from jaxgpt.errors import UserError, explain_out_of_memory
from jaxgpt.planning import fit, memory
from jaxgpt.planning.gpus import GIB
from jaxgpt.planning.memory import TooLargeError, estimate
from jaxgpt.run import preflight
from jaxgpt.run.preflight import Compiled, compile_to_fit
from jaxgpt.run.processes import SINGLE_PROCESS
from jaxgpt.training.layout import Layout

CPU = jax.devices("cpu")[0]
CFG = resolved(Config(model=TINY), batch_size=4, effective_batch_size=8, max_iters=10)
ONE = Layout(CPU)


def compile_run(cfg=CFG, free=(), processes=SINGLE_PROCESS, layout=ONE) -> Compiled:
    with compile_to_fit(cfg, free, layout, processes) as compiled:
        return compiled


@pytest.fixture
def machine(monkeypatch):
    """Sets what the device and the host have."""

    def has(device: int | None, host: int | None = 100 * GIB) -> None:
        monkeypatch.setattr(memory, "device_limit", lambda _: device)
        monkeypatch.setattr(memory, "host_available", lambda: host)

    return has


def test_what_is_compiled_runs_and_is_what_was_asked(machine) -> None:
    machine(GIB)
    ready = compile_run()
    assert ready.cfg == CFG
    tokens = np.zeros((2, 4, 9), np.uint16)
    state, metrics = ready.training.train_step(ready.training.init(), tokens)
    assert int(state.step) == 1
    assert np.isfinite(float(metrics["loss"]))
    assert ready.training.eval_step(state.params, tokens[0]).shape == (4,)


def test_a_step_that_does_not_fit_is_refused_with_figures_and_flags(machine, monkeypatch) -> None:
    machine(4 * CFG.model.parameter_count())
    with pytest.raises(TooLargeError, match=r"a step needs .* GiB \(batch_size 4, remat none"):
        compile_run()
    monkeypatch.setattr(
        preflight.fit, "flags_that_fit", lambda cfg, limit, need: f"less than {limit}"
    )
    with pytest.raises(TooLargeError, match="less than 0"):
        compile_run()


def test_a_model_of_absurd_size_is_refused_before_xla_sees_it(machine, monkeypatch) -> None:
    machine(GIB)
    monkeypatch.setattr(preflight, "_compile", lambda *_: pytest.fail("XLA would abort"))
    for sizes in ({"n_embd": 2**31 - 2}, {"n_layer": 10**8}):
        with pytest.raises(TooLargeError, match="does not fit cpu"):
            compile_run(replace(CFG, model=replace(TINY, **sizes)))
    # Each replica needs all parameters, and a CPU's devices share one memory.
    machine(2 * 4 * CFG.model.parameter_count() - 1)
    layout = Layout(CPU)
    layout.local_devices = (CPU, CPU)
    with pytest.raises(TooLargeError, match="does not fit cpu"):
        compile_run(replace(CFG, mesh=MeshShape(data=2)), layout=layout)
    with pytest.raises(pytest.fail.Exception):
        compile_run(replace(CFG, mesh=MeshShape(fsdp=2)), layout=layout)


def test_a_checkpoint_that_does_not_fit_the_host_is_refused(machine) -> None:
    machine(GIB, host=10)
    with pytest.raises(TooLargeError, match="copied to the host's memory"):
        preflight._check_host(estimate(CFG))
    machine(memory.host_bytes(CFG) + 1000)  # on a CPU both lie in one memory
    with pytest.raises(TooLargeError, match=r"there are 0\.00 GiB"):
        compile_run()


def test_what_fits_is_chosen_by_the_device_with_the_least_on_all_processes(machine) -> None:
    # On a CPU two devices share what is there.
    machine(4 * GIB)
    assert preflight._limit(CFG, [CPU, CPU]) == (4 * GIB - memory.host_bytes(CFG)) // 2
    poorest = SimpleNamespace(min_over_processes=lambda mine: 100_000)
    with pytest.raises(TooLargeError, match=r"there are 0\.00 GiB"):
        compile_run(processes=poorest)


def test_a_device_that_does_not_tell_its_memory_is_taken_at_its_word(machine) -> None:
    machine(None, host=None)
    assert compile_run().cfg == CFG
    with pytest.raises(TooLargeError, match="give --batch-size and --remat"):
        compile_run(free={"batch_size"})


def test_auto_takes_what_fits_and_compiles_it(machine) -> None:
    machine(2 * GIB)
    ready = compile_run(free=fit.CHOICES)
    assert (ready.cfg.batch, ready.cfg.remat) == (Batch(8, 1, 1), "none")
    state, _ = ready.training.train_step(ready.training.init(), np.zeros((1, 8, 9), np.uint16))
    assert int(state.step) == 1


def test_auto_says_when_nothing_fits(machine) -> None:
    machine(1000)
    with pytest.raises(TooLargeError, match="does not fit"):
        compile_run(free=fit.CHOICES)


def test_running_out_all_the_same_is_told_in_words() -> None:
    page = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\n" + 99 * "x\n"
    with (
        pytest.raises(UserError, match=r"is full: .*allocate 9 bytes\.\n.*--batch-size"),
        explain_out_of_memory(lambda: fit.flags_after_out_of_memory(CFG)),
    ):
        raise RuntimeError(page)
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(str):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("meminfo", "limit", "current", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable: 8 kB\n", None, None, 8192),
        ("MemAvailable: 8 kB\n", "max", "10", 8192),
        ("MemAvailable: 8 kB\n", "5000", "1000", 4400),
        ("", "5000", "1000", 4400),
        ("", None, None, None),
    ],
)
def test_a_containers_limit_counts(monkeypatch, meminfo, limit, current, expected) -> None:
    stat = None if current is None else "file 500\ninactive_file 400\n"
    files = {"meminfo": meminfo, "memory.max": limit, "memory.current": current}
    files["memory.stat"] = stat

    def read_text(path):
        if files.get(path.name) is None:
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(memory, "Path", lambda *parts: _path(parts, read_text))
    assert memory.host_available() == expected


def _path(parts, read_text):
    name = "/".join(parts).rpartition("/")[2]
    path = SimpleNamespace(name=name, read_text=lambda: read_text(path))
    return _Joinable(path, read_text)


class _Joinable:
    def __init__(self, path, read_text):
        self._path, self._read = path, read_text

    def __truediv__(self, name: str):
        return _path((name,), self._read)

    def read_text(self) -> str:
        return self._read(self._path)
