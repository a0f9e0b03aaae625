"""Run by tests/training/test_meshes_agree.py with eight CPU devices; prints one JSON object.

A separate process, because the number of devices must be set before JAX starts.
"""

import dataclasses
import json
import os
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

# Most of the time is compilation, for eight devices; level 0 takes a third less.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.mesh_shape import parse_mesh
from jaxgpt.config.mixture import parse_shares
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.data.mixture import MixtureLoader
from jaxgpt.data.shards import TokenStream
from jaxgpt.model.generate import Generator, Sampling
from jaxgpt.model.network import init_params
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.training.build import build_training, compile_eval_step, compile_train_step
from jaxgpt.training.evaluation import evaluate
from jaxgpt.training.groups import joined
from jaxgpt.training.layout import Layout
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.schedule import make_schedule
from jaxgpt.training.sharding import MeshLayout

STEPS, SAVED_AT = 50, 20
MODEL = ModelConfig(
    **dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, n_vocab=50, dropout=0.1)
)
QWEN3 = dataclasses.replace(
    MODEL, arch="qwen3", n_kv_head=1, head_dim=12, tied_head=False, embedding_norm=True
)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_iters=5)
MUON = dataclasses.replace(OPTIMIZER, optimizer="muon", cautious_weight_decay=True)
BATCH, EFFECTIVE = 2, 32
# Counting up by one, two or three, to be learned; the second stage begins after the checkpoint.
STREAMS = {
    name: TokenStream.from_arrays([step * np.arange(2000) % 50])
    for name, step in (("one", 1), ("two", 2), ("three", 3))
}
STAGES = [
    (0, parse_shares("one:2,two:1")),
    ((SAVED_AT + 2) * EFFECTIVE + 5, parse_shares("three:2,one:1")),
]
LOADER = MixtureLoader(STREAMS, STAGES, MODEL.block_size, 50, seed=0)
WINDOWS = LOADER.read(np.arange(21))  # not a multiple of the micro-batch


class Run:
    """A tiny training on a mesh; None is a single device."""

    def __init__(
        self,
        mesh: str | None,
        scan_layers: bool = False,
        model: ModelConfig = MODEL,
        dtype: str = "float32",
    ):
        devices, shape = jax.devices(), parse_mesh(mesh)
        self.layout = MeshLayout(devices, shape) if mesh else Layout(devices[0])
        self.global_micro_batch = BATCH * shape.devices
        self.accumulation = EFFECTIVE // self.global_micro_batch
        self.training = build_training(
            model,
            OPTIMIZER,
            max_iters=STEPS,
            accumulation=self.accumulation,
            dtype=dtype,
            seed=0,
            device=devices[0],
            layout=self.layout,
            remat="full",
            scan_layers=scan_layers,
        )
        self.step = compile_train_step(self.training, self.accumulation, self.global_micro_batch)

    def train(self, state, steps):
        losses = []
        for i in steps:
            A, B = self.accumulation, self.global_micro_batch
            shape_ABT1 = (A, B, MODEL.block_size + 1)
            tokens = self.layout.load_batch(shape_ABT1, partial(LOADER.batch, i, A, B))
            state, metrics = self.step(state, tokens)
            losses.append(float(metrics["loss"]))
        return state, losses

    def evaluate(self, state) -> float:
        eval_step = self.layout.with_sharded_batch(
            compile_eval_step(self.training, self.global_micro_batch)
        )
        return evaluate(eval_step, state.params, WINDOWS, self.global_micro_batch)

    def sample(self, state) -> list[int]:
        """Tokens of greedy decoding, within the context (cached) and beyond it (not cached)."""
        sampling, options = Sampling(temperature=0), self.layout.jit_options()
        generator = Generator(
            self.training.graphdef, MODEL.block_size, sampling, chunk=12, jit_options=options
        )
        return generator.generate(state.params, [1, 2, 3], 12, state.key, samples=1)[0].tolist()


def shares(state) -> dict[str, float]:
    """The fraction of each array on the first device, by path."""
    return {
        joined(path): leaf.addressable_shards[0].data.size / leaf.size
        for path, leaf in jax.tree.leaves_with_path(state)
        if leaf.size
    }


def overflowing(state):
    """A state in float16 whose loss scale is too large for some steps."""
    scale = state.loss_scale.scale
    return state._replace(loss_scale=state.loss_scale._replace(scale=scale * 2**10))


def largest_gather(program: str) -> int:
    """Elements of the largest all-gather's result."""
    results = re.findall(r" = (.*?) all-gather(?:-start)?\(", program)
    shapes = [dims for result in results for dims in re.findall(r"\[([\d,]+)\]", result)]
    return max((int(np.prod([int(d) for d in dims.split(",")])) for dims in shapes), default=0)


def muon_update(layout: Layout) -> tuple[dict[str, list[float]], int]:
    """Muon's update by path, for gradients that follow from the parameters; all-gathers in it."""
    optimizer = make_optimizer(MUON, make_schedule(MUON, STEPS), 1, map_stack=layout.map_stack)
    params = init_params(MODEL, jax.random.key(0))
    params = jax.device_put(params, layout.state_shardings(params))
    state = jax.jit(optimizer.init)(params)
    state = jax.device_put(state, layout.state_shardings(state))
    grads = jax.tree.map(lambda p: jax.numpy.sin(100 * p), params)
    update = jax.jit(lambda *args: optimizer.update(*args)[0])
    compiled = update.lower(grads, state, params).compile()
    found = {
        joined(p): leaf for p, leaf in jax.tree.leaves_with_path(compiled(grads, state, params))
    }
    values = {path: np.asarray(leaf).ravel().tolist() for path, leaf in found.items()}
    return values, compiled.as_text().count(" all-gather(")


def main(folder: Path) -> None:
    answer: dict = defaultdict(dict)
    runs = {mesh or "one": Run(mesh) for mesh in (None, "data=8", "fsdp=8", "data=2,fsdp=4")}
    for name, run in runs.items():
        state, losses = run.train(run.training.init(), range(SAVED_AT))
        with Checkpoints(folder / name, keep=1) as checkpoints:
            checkpoints.begin(state, config={}, data={})
            checkpoints.finish()
        state, more = run.train(state, range(SAVED_AT, STEPS))
        answer["losses"][name] = losses + more
        answer["evaluations"][name] = run.evaluate(state)
        answer["samples"][name] = run.sample(state)
        answer["shares"][name] = shares(state)
        answer["gathers"][name] = largest_gather(run.step.as_text())
        answer["muon"][name], answer["muon_gathers"][name] = muon_update(run.layout)
    for name in ("one", "data=2,fsdp=4"):
        run = Run(None if name == "one" else name, model=QWEN3)
        answer["qwen3 losses"][name] = run.train(run.training.init(), range(SAVED_AT))[1]
        run = Run(None if name == "one" else name, dtype="float16")
        state, losses = run.train(overflowing(run.training.init()), range(SAVED_AT))
        answer["float16"][name] = {
            "losses": losses,
            **{part: float(leaf) for part, leaf in state.loss_scale._asdict().items()},
        }
    answer["parameters"] = sum(x.size for x in jax.tree.leaves(state.params))
    answer["embedding"] = state.params["wte"]["embedding"].size
    runs["fsdp=8"] = Run("fsdp=8", scan_layers=True)
    mesh = "data=2,fsdp=4"
    for saved, now in (("one", "fsdp=8"), ("fsdp=8", mesh), (mesh, "one"), (mesh, mesh)):
        run = runs[now]
        with Checkpoints(folder / saved, keep=1) as checkpoints:
            restored = checkpoints.restore(SAVED_AT, run.training.state_like)
        _, losses = run.train(restored, range(SAVED_AT, STEPS))
        answer["resumed"][f"{saved} to {now}"] = losses
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
