"""Compile training steps for cards that need not be present, and record the memory they need.

    pip install -e '.[plan]'
    python benchmarks/measure_memory.py --json benchmarks/results/memory.json
    python benchmarks/measure_memory.py --table        # the README's table, from that file
    python benchmarks/measure_memory.py --details      # the table of docs/memory.md, likewise

Three lists: every preset on the smallest card of its tier and on the cards it names; the five tiers
with each remat; shapes of many sizes, to check the estimate of `jaxgpt.plan` against.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.fields import Config, flat_fields, with_fields
from jaxgpt.config.presets import all_presets, load_preset
from jaxgpt.config.resolved import Resolved, choose_dtype
from jaxgpt.planning import target
from jaxgpt.planning.gpus import GIB, Gpu, find_gpu
from jaxgpt.planning.train_command import resolve_new

ROOT = Path(__file__).absolute().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
# The smallest card that a tier's presets must fit, then those that people have.
CARDS = {
    80: ("h100", "a100-80gb"),
    48: ("l40s", "a6000"),
    24: ("a10g", "rtx3090", "rtx4090"),
    16: ("rtx5080", "rtx4080"),
    15: ("t4",),
    12: ("rtx3080", "rtx4070ti"),
    10: ("rtx3080", "rtx5070"),
    8: ("rtx3070", "rtx4060"),
}
TIERS = {
    "80gb": "a100-80gb",
    "48gb": "a6000",
    "24gb": "rtx4090",
    "16gb": "rtx4080",
    "12gb": "rtx4070ti",
}
REMATS = ("none", "light", "full")
MODEL_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
# What most runs leave at its default; only what differs is recorded.
OPTIONS = [
    field
    for field in (*dataclasses.fields(ModelConfig), flat_fields()["optimizer"])
    if field.name not in (*MODEL_FIELDS, "n_vocab")
]
ACCUMULATION = 4  # of the free shapes; memory does not depend on it


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape to check the estimate against."""

    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    block_size: int = 1024
    gpu: str = "rtx4090"
    bias: bool = False
    dropout: float = 0.0
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    scan_layers: bool = False
    arch: str = "gpt2"
    n_kv_head: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    tied_head: bool = True
    zero_init: bool = False
    embedding_norm: bool = False


QWEN3: dict[str, Any] = {"arch": "qwen3"}
SHAPES = (
    Shape(12, 12, 768, 8),
    Shape(12, 12, 768, 2),
    Shape(6, 6, 384, 16, block_size=512),
    Shape(4, 4, 256, 64, block_size=256),
    Shape(12, 12, 768, 8, bias=True),
    Shape(12, 12, 768, 8, dropout=0.1),
    Shape(24, 16, 1024, 8, scan_layers=True, state_dtype="bfloat16"),
    Shape(6, 6, 384, 8, dtype="float32", gpu="rtx3090"),
    Shape(12, 12, 768, 4, dtype="float16", gpu="t4"),
    Shape(6, 6, 384, 4, block_size=2048, dtype="float16", gpu="t4"),
    Shape(6, 6, 768, 8, tied_head=False, embedding_norm=True, zero_init=True, **QWEN3),
    Shape(6, 12, 768, 8, n_kv_head=4, **QWEN3),
    Shape(6, 3, 384, 16, block_size=512, tied_head=False, **QWEN3),
    Shape(4, 6, 768, 2, block_size=4096, n_kv_head=2, **QWEN3),
    Shape(4, 6, 384, 8, dtype="float16", gpu="t4", **QWEN3),
    Shape(24, 8, 1024, 8, scan_layers=True, state_dtype="bfloat16", **QWEN3),
    Shape(4, 16, 1024, 4, n_kv_head=8, head_dim=128, mlp_width=3072, **QWEN3),
)


def runs() -> Iterator[tuple[str, str, Resolved]]:
    """(list, card, configuration) of every measurement."""
    for cfg in all_presets():
        for gpu in CARDS.get(cfg.vram_gb or 0, ()):
            yield "presets", gpu, resolved_for(cfg, find_gpu(gpu))
    for name, gpu in TIERS.items():
        for remat in REMATS:
            cfg = with_fields(load_preset(name), remat=remat)
            yield "tiers", gpu, resolve_new(cfg, "bfloat16")
    for shape in SHAPES:
        for remat in REMATS:
            yield "shapes", shape.gpu, config_of(shape, remat)


def config_of(shape: Shape, remat: str) -> Resolved:
    """The configuration of a free shape."""
    values = dataclasses.asdict(shape)
    del values["gpu"]
    return _resolved(values | {"remat": remat}, ACCUMULATION)


def _resolved(values: dict[str, Any], accumulation: int) -> Resolved:
    """A run of GPT-2's vocabulary with these fields, dtype among them."""
    dtype = values.pop("dtype")
    values |= {"vocab_size": 50304, "effective_batch_size": accumulation * values["batch_size"]}
    return resolve_new(with_fields(Config(), **values), dtype)


def resolved_for(cfg: Config, gpu: Gpu) -> Resolved:
    """`cfg` in the dtype that a card computes in."""
    return resolve_new(cfg, choose_dtype(cfg.dtype, "gpu", gpu.compute_capability))


def _by_memory_and_size(pair: tuple[Resolved, Gpu]) -> tuple[int, int]:
    cfg, _ = pair
    return cfg.asked.vram_gb or 0, cfg.model.parameter_count()


def record(kind: str, gpu: str, cfg: Resolved, peak_bytes: int) -> dict[str, Any]:
    """One measurement with everything it depends on."""
    m, values = cfg.model, cfg.flat()
    return {
        "list": kind,
        "gpu": gpu,
        "preset": cfg.asked.preset if kind != "shapes" else None,
        "parameters": m.parameter_count(),
        **{name: getattr(m, name) for name in MODEL_FIELDS},
        **{f.name: values[f.name] for f in OPTIONS if values[f.name] != f.default},
        "batch_size": cfg.batch.batch_size,
        "gradient_accumulation_steps": cfg.batch.accumulation,
        "remat": cfg.remat,
        "scan_layers": cfg.asked.scan_layers,
        "dtype": cfg.dtype,
        "state_dtype": cfg.optimizer.state_dtype,
        "peak_bytes": peak_bytes,
    }


def config_from(row: dict[str, Any]) -> Resolved:
    """The configuration that a record was made from."""
    names = [*MODEL_FIELDS, "batch_size", "remat", "scan_layers", "dtype", "state_dtype"]
    names += [field.name for field in OPTIONS if field.name in row]
    return _resolved({name: row[name] for name in names}, row["gradient_accumulation_steps"])


def measure_all(path: Path, only: str | None) -> None:
    """Measure what is not in `path` yet; write the file after each measurement."""
    target.prepare_environment()
    from jaxgpt.planning import memory

    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {json.dumps({**row, "peak_bytes": 0}) for row in rows}
    for kind, gpu, cfg in runs():
        if only not in (None, kind) or json.dumps(record(kind, gpu, cfg, 0)) in known:
            continue
        need = memory.need_of(cfg, memory.compile_ahead(cfg, target.card_devices(find_gpu(gpu))[0]))
        rows.append(record(kind, gpu, cfg, need.peak_bytes))
        what = f"{kind:8} {gpu:10} {cfg.asked.preset:11} {cfg.remat:5}"
        print(f"{what} {need.peak_bytes / GIB:6.2f} GiB")
        sys.stdout.flush()
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
        command = "python benchmarks/measure_memory.py --json benchmarks/results/memory.json"
        text = json.dumps({"command": command, "versions": versions, "rows": rows}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def preset_rows(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Resolved, Gpu, int]]:
    """(configuration, best-known card of its tier, bytes a step needs there), small cards first."""
    peaks = {(r["preset"], r["gpu"]): r["peak_bytes"] for r in rows if r["list"] == "presets"}
    asked = [cfg for cfg in all_presets() if cfg.vram_gb is not None]
    pairs = [(one, find_gpu(CARDS[one.vram_gb][-1])) for one in asked]
    configs = [(resolved_for(one, gpu), gpu) for one, gpu in pairs]
    for cfg, gpu in sorted(configs, key=_by_memory_and_size):
        yield cfg, gpu, peaks[cfg.asked.preset, gpu.key]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The README's table of presets."""
    lines = [
        "| preset | parameters | GiB needed | compiled for | tokens |",
        "|---|---|---|---|---|",
    ]
    for cfg, gpu, peak in preset_rows(rows):
        cells = (
            f"`{cfg.asked.preset}`",
            f"{cfg.model.parameter_count() / 1e6:.1f}M",
            f"{peak / GIB:.1f}",
            gpu.name,
            f"{cfg.total_tokens / 1e9:.1f}B",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/memory.md: shapes, batches, free memory and predicted days."""
    from jaxgpt.planning.memory import capacity_of
    from jaxgpt.planning.speed import HOUR, tokens_per_second

    lines = [
        "| preset | n_layer / n_head / n_embd | batch_size x accumulation | remat | card "
        "| GiB free | learning_rate | tokens per parameter | days |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cfg, gpu, peak in preset_rows(rows):
        m = cfg.model
        rate = tokens_per_second(cfg, gpu)
        cells = (
            f"`{cfg.asked.preset}`",
            f"{m.n_layer} / {m.n_head} / {m.n_embd}",
            f"{cfg.batch.batch_size} x {cfg.batch.accumulation}",
            cfg.remat,
            gpu.name,
            f"{(capacity_of(gpu) - peak) / GIB:.1f}",
            f"{cfg.optimizer.learning_rate:g}",
            f"{cfg.total_tokens / m.parameter_count():.0f}",
            "?" if rate is None else f"{cfg.total_tokens / rate / HOUR / 24:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--only", choices=("presets", "tiers", "shapes"))
    parser.add_argument("--table", action="store_true", help="print the README's table and stop")
    parser.add_argument("--details", action="store_true", help="print the table of docs/memory.md")
    args = parser.parse_args(argv)
    if args.table or args.details:
        rows = json.loads(args.json.read_text())["rows"]
        print(table(rows) if args.table else details(rows))
    else:
        measure_all(args.json, args.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
