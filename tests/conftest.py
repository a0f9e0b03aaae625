"""Shapes and steps shared by the tests; every model is tiny and everything runs on the CPU."""

import atexit
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where XLA's compiler for cards is installed, it must not look for one.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# Most of the time is XLA's, for programs that run for microseconds, and a third of that is LLVM's
# optimizations. `.ci/run` sets it to false for the slow tests, which compile as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "true" and version("jaxlib").startswith("0.10."):
    # A third of the compile time; newer versions have no such flag, and compile faster.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Many runs of the tests are of the same shapes: each program is compiled once, as for a user who
# starts a run again. The folder is new each time, so that all of them are compiled, and shared by
# the workers of pytest-xdist.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxgpt-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import numpy as np
import pytest
from helpers.trees import TINY

# Shells have what they start in the background ignore Ctrl-C, and nohup SIGHUP; a run leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # of no effect here, and the default in children


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for `-n auto`: none where files are named, because each takes seconds to start."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return min(os.cpu_count() or 1, 8)


# Where the longest files are, which begin first, so that no worker ends with one while others idle.
LONGEST = ("planning", "commands", "training", "run", "model", "weights", "preparation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rooms = {room: place for place, room in enumerate(LONGEST)}
    items.sort(key=lambda item: rooms.get(item.path.parent.name, len(rooms)))


@pytest.fixture(scope="session", autouse=True)
def empty_working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees what commands have left in the checkout: `runs/`, `data/`, a folder `tok/`."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("working-directory"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def steps_traced_once() -> Iterator[None]:
    """Runs of one configuration, of any length, share their steps, whose compilation takes longest.

    Where `.ci/run` sets JAX_DISABLE_MOST_OPTIMIZATIONS=false, for slow tests and resumed runs, each
    run traces and compiles its own.
    """
    from jaxgpt.planning import memory
    from jaxgpt.training.layout import Layout

    build = memory.build_training

    @functools.lru_cache(32)
    def build_once(*args, **kwargs):
        return build(*args, **kwargs)

    def build_training(model, optimizer, layout=None, compiler_options=None, **kwargs):
        if compiler_options or type(layout) not in (Layout, type(None)):
            kwargs |= {"layout": layout, "compiler_options": compiler_options}
            return build(model, optimizer, **kwargs)
        # The steps depend on the end of the decay, and on the end of the run only where that is it.
        kwargs["max_iters"] = optimizer.lr_decay_iters or kwargs["max_iters"]
        return build_once(model, optimizer, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "true":
            patch.setattr(memory, "build_training", build_training)
        yield


@pytest.fixture(scope="session")
def tokens_BT1() -> np.ndarray:
    """Six windows of random tokens, (6, 9) uint16."""
    return np.random.default_rng(0).integers(0, TINY.n_vocab, (6, 9)).astype(np.uint16)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a run of eight steps on the embedded text, byte tokens, evaluated at each 4."""
    from jaxgpt.train import main

    out_dir = tmp_path_factory.mktemp("runs") / "tiny"
    flags = [
        *("--preset", "demo", "--n-layer", "2", "--n-head", "2", "--n-embd", "16"),
        *("--block-size", "16", "--batch-size", "4", "--effective-batch-size", "4"),
        *("--max-iters", "8", "--eval-interval", "4", "--eval-iters", "5", "--sample-tokens", "0"),
    ]
    assert main([*flags, "--out-dir", str(out_dir)]) == 0
    return out_dir


@pytest.fixture(scope="session")
def exported(tiny_run: Path, tmp_path_factory) -> Path:
    """The tiny run as a Hugging Face folder."""
    from jaxgpt import export

    folder = tmp_path_factory.mktemp("exported") / "tiny-austen"
    assert export.main(["--out-dir", str(tiny_run), "--to", str(folder)]) == 0
    return folder


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen]]:
    """Processes that a test starts, and that are killed when it ends."""
    started: list[subprocess.Popen] = []
    yield started
    for child in started:
        if child.poll() is None:
            child.kill()
        child.wait()


@pytest.fixture(scope="session")
def fineweb_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parquet files with FineWeb's columns, 0.9 MB of text."""
    from helpers.preparing import build

    folder = tmp_path_factory.mktemp("fineweb-like")
    build(folder, files=3, n_bytes=900_000, row_group=40)
    return folder


@pytest.fixture(scope="session")
def prepared(fineweb_like: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run makes of them that nothing interrupted."""
    from helpers.preparing import SMALL, prepare

    out = tmp_path_factory.mktemp("prepared") / "out"
    assert prepare(fineweb_like, "--out", out, *SMALL, "--workers", "1") == 0
    return out


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty short text files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"Text number {number}. " * (number + 1))
    return folder


@pytest.fixture(scope="session")
def straight(tmp_path_factory) -> Path:
    """A run of eight steps, with checkpoints at 4 and 8; tests take copies of it."""
    from helpers.runs import STEPS, train

    out_dir = tmp_path_factory.mktemp("runs") / "straight"
    assert train(out_dir, *STEPS) == 0
    return out_dir


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


@pytest.fixture
def refused(capsys):
    """The answer to a run that ends with exit code 2."""
    from helpers.runs import train

    def answer(out_dir: Path, *flags: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            train(out_dir, *flags)
        err = capsys.readouterr().err
        assert left.value.code == 2
        assert "python -m jaxgpt.train: " in err
        assert "Traceback" not in err
        return err

    return answer
