"""Check recorded figures against their limits, without measuring anything.

    python benchmarks/check_results.py

Reads the JSON files in benchmarks/results/. No change of the code can turn these checks red, only a
new measurement can; tests that a change can turn red are in tests/.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure_mesh import Case, config_of

from jaxgpt.planning.gpus import GIB, find_gpu
from jaxgpt.planning.memory import capacity_of

RESULTS = Path(__file__).absolute().parent / "results"
# GiB that each tier may need on its card: without remat, with full remat.
TIER_LIMITS = {
    "80gb": (27.5, 6),
    "48gb": (13.3, 4.2),
    "24gb": (11, 3.8),
    "16gb": (7.7, 3),
    "12gb": (5.2, 2.5),
}
HEAD_ROOM = 1.5 * GIB  # left free by every preset on every card of its tier


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def memory() -> Iterator[str]:
    """Tiers within their limits; presets with head room on every card of their tier."""
    rows = load("memory")["rows"]
    tiers = {(r["preset"], r["remat"]): r["peak_bytes"] for r in rows if r["list"] == "tiers"}
    for preset, limits in TIER_LIMITS.items():
        for remat, limit in zip(("none", "full"), limits, strict=True):
            if tiers[preset, remat] > limit * GIB:
                yield f"{preset} with remat {remat} needs more than {limit} GiB"
    presets = [row for row in rows if row["list"] == "presets"]
    for row in presets:
        if capacity_of(find_gpu(row["gpu"])) - row["peak_bytes"] < HEAD_ROOM:
            yield f"{row['preset']} leaves less than 1.5 GiB on {row['gpu']}"
    if not {"rtx3090", "rtx4090"} <= {r["gpu"] for r in presets if r["preset"] == "24gb-1558m"}:
        yield "24gb-1558m is not recorded for the RTX 3090 and the RTX 4090"


def speed() -> Iterator[str]:
    """On a CPU at least nanoGPT's speed with the newest JAX, 0.9 times it with the oldest."""
    found = {}
    for path in RESULTS.glob("speed-cpu-*.json"):
        for name, shape in json.loads(path.read_text())["shapes"].items():
            newest = not shape["versions"]["jax"].startswith("0.10")
            found[name, newest] = shape["speed_ratio"]
    if found.keys() != {(name, newest) for name in ("demo", "6L-384") for newest in (False, True)}:
        yield f"speed-cpu-*.json has {sorted(found)}, not both shapes with both versions of JAX"
    for (name, newest), ratio in found.items():
        if ratio < (1.0 if newest else 0.9):
            yield f"{name} runs at {ratio:.2f} times nanoGPT's speed"


def overhead() -> Iterator[str]:
    """Accumulation, start-up and the loader within their limits."""
    if load("accumulation")["ours_over_by_hand"] >= 1.1:
        yield "accumulation costs 10 % more than a sum written by hand"
    answers = load("start")["answer_seconds"].values()
    if max(seconds for answer in answers for seconds in answer.values()) >= 0.5:
        yield "--help or a mistake takes half a second"
    found = load("train-overhead")
    if found["share_together"] >= 0.02:
        yield "train adds 2 % to a step"
    if found["loader"]["tokens_per_second"] <= 2e6:
        yield "the loader reads fewer than 2M tokens/s"


def mesh() -> Iterator[str]:
    """The collectives of a compiled step move what sharding implies, and no more."""
    for row in load("mesh")["rows"]:
        case = {key: row[key] for key in Case.__dataclass_fields__}
        for error in mesh_errors(row, Case(**case)):
            yield f"mesh {row['mesh']}, {row['preset']}: {error}"


def mesh_errors(row: dict[str, Any], case: Case) -> Iterator[str]:
    moved, N = row["collectives"], row["parameters"]
    gathered = moved.get("all-gather", {"bytes": 0, "largest_bytes": 0})
    if gathered["largest_bytes"] >= N:  # half of all parameters in bfloat16
        yield "one all-gather has half of the model"
    if "fsdp" in (row["mesh"] or "") and row["remat"] == "full":
        m, A = config_of(case).model, row["gradient_accumulation_steps"]
        embeddings = ((m.vocab_size or 0) + m.block_size) * m.n_embd
        # Each micro-batch all-gathers the blocks twice in bfloat16, the embeddings once in float32.
        expected = A * (2 * 2 * (N - embeddings) + 4 * embeddings)
        if abs(gathered["bytes"] / expected - 1) > 1e-3:
            yield f"all-gathers {gathered['bytes']} bytes, expected {expected}"
        if abs(moved["reduce-scatter"]["bytes"] / (A * 4 * N) - 1) > 1e-3:
            yield f"reduce-scatters {moved['reduce-scatter']['bytes']} bytes, expected {A * 4 * N}"
    if row["mesh"] == "data=8":
        if set(moved) != {"all-reduce"}:
            yield f"uses {sorted(moved)}, not all-reduce only"
        elif not 1 <= moved["all-reduce"]["bytes"] / (4 * N) < 1.001:
            yield "averages gradients more than once per step"


def interchange() -> Iterator[str]:
    """Logits and ids equal to transformers', texts equal to llama.cpp's."""
    for m in load("parity")["models"]:
        if m["largest_difference"] > 1e-5 * m["largest_logit"]:
            yield f"{m['model']}, {m['n_layer']} layers, differs from transformers by over 1e-5"
        if not m["export_and_import_bit_exact"]:
            yield f"{m['model']}, {m['n_layer']} layers, changes when it is exported and imported"
    for row in load("tokenizers")["texts"]:
        for name in ("cut_from_the_text", "invented_by_hypothesis"):
            found = row[name]
            if not found["strings"] == found["same_ids"] == found["round_trips"]:
                yield f"{row['text']}: ids differ from transformers', or decode to another text"
    for name, dtypes in load("llama-cpp")["models"].items():
        if dtypes["f32"]["equal_texts"] != dtypes["f32"]["of"]:
            yield f"llama.cpp continues {name} in float32 otherwise than sample"
        if dtypes["f32"]["largest_logprob_difference"] > 2e-3:
            yield f"llama.cpp's log-probabilities of {name} differ by more than 2e-3"


def faults() -> Iterator[str]:
    """No fault that was injected broke a promise."""
    for run in load("inject-faults")["runs"]:
        yield from (f"{run['command']}: {broken}" for broken in run["broken"])


CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "memory": memory,
    "speed": speed,
    "overhead": overhead,
    "mesh": mesh,
    "interchange": interchange,
    "faults": faults,
}


def main() -> int:
    errors = [f"{name}: {error}" for name, check in CHECKS.items() for error in check()]
    print("\n".join(errors) or f"results: {', '.join(CHECKS)} within their limits")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
