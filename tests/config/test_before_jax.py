"""What is answered before JAX is imported, which takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import jaxgpt
from jaxgpt import COMMANDS

ROOT = Path(jaxgpt.__file__).parents[1]


WITHOUT_JAX = """
import os, sys
import jaxgpt.run.device as device
from jaxgpt import train
from jaxgpt.planning import local_gpus
device.PLUGINS = ()  # as on a machine without a GPU version of JAX
local_gpus.local_cards = lambda: []
codes = []
for argv in {argvs}:
    try:
        train.main(argv)
    except SystemExit as stop:
        codes.append(stop.code)
slow = {{"jax", "jaxlib", "flax", "optax", "orbax"}} & sys.modules.keys()
print(codes, sorted(slow), file=sys.stderr)
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: v for name, v in os.environ.items() if name != "JAX_PLATFORMS"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def test_mistakes_and_help_are_answered_before_jax_is_imported(tmp_path):
    (tmp_path / "bad.toml").write_text("n_layers = 3")
    out = ["--out-dir", str(tmp_path / "run")]
    argvs: list[list[str]] = [
        *([], ["--help"], ["--preset=demo", "--help"], ["--preset=nope"], ["--compile"]),
        ["--preset=demo", "--batch-sise=3"],
        ["--preset=demo", "--n-head=3"],
        ["--preset", str(tmp_path / "bad.toml")],
        ["--preset=24gb", *out],  # no GPU
        ["--preset=demo", "--device=gpu", *out],
        ["--preset=demo", "--vocab-size=100", *out],  # too small for the tokenizer
    ]
    done = run_python("-c", WITHOUT_JAX.format(argvs=argvs))
    codes = [2, 0, 0, *[2] * (len(argvs) - 3)]
    assert done.stderr.splitlines()[-1] == f"{codes} []", done.stderr
    assert not (tmp_path / "run").exists()


HEAVY = """
import sys
import jaxgpt
codes = []
for name in {names}:
    for argv in (["--help"], ["--no-such-flag"]):
        try:
            jaxgpt.main([name, *argv])
        except SystemExit as stop:
            codes.append(stop.code)
slow = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorboardX", "torch", "datasets", "pyarrow",
        "huggingface_hub", "tiktoken")
print(codes, [name for name in slow if name in sys.modules], file=sys.stderr)
"""


def test_no_command_imports_what_takes_long_before_it_understands_its_flags():
    """Each of these takes from a tenth of a second to several; the rest takes a third of one."""
    done = run_python("-c", HEAVY.format(names=tuple(COMMANDS)))
    assert done.stderr.splitlines()[-1] == f"{[0, 2] * len(COMMANDS)} []", done.stderr


def test_the_command_itself_explains_its_flags():
    done = run_python("-m", "jaxgpt.train", "--preset=demo", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--batch-size INT" in done.stdout
