"""The table of docs/performance.md, made from the files in benchmarks/results/.

python benchmarks/performance_table.py                        # prints it
python benchmarks/check_docs.py --write --only tables         # updates the page
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).absolute().with_name("gpu")))
from predictions import number, predicted

ROOT = Path(__file__).absolute().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30
Row = tuple[str, ...]
HEADER = ("what", "where", "jaxgpt", "for comparison", "file")


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args(argv)
    print(table(RESULTS))
    return 0


def table(folder: Path) -> str:
    """All rows of the files in `folder` as one Markdown table."""
    rows: list[Row] = [HEADER, ("---",) * len(HEADER)]
    for path in sorted(folder.glob("*.json")):
        for pattern, make in ROWS.items():
            if path.match(pattern):
                link = f"[{path.stem}](../benchmarks/results/{path.name})"
                rows += [(*row, link) for row in make(json.loads(path.read_text()))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def speed(result: Mapping[str, Any]) -> Iterator[Row]:
    """Every shape beside nanoGPT."""
    for name, r in result["shapes"].items():
        shape = r["shape"]
        low, high = r["speed_ratio_range"]
        flags = next(run["setting"] for run in r["runs"] if run["program"] == "jaxgpt")
        flags = "" if flags == "default" else f", with `{flags}`"
        mfu = "" if r["jaxgpt_mfu"] is None else f", MFU {r['jaxgpt_mfu']:.1%}"
        cards = [r.get("jaxgpt_card_bytes"), r.get("nanogpt_card_bytes")]
        on_card = (
            ""
            if None in cards
            else "; by nvidia-smi {:.1f} and {:.1f} GiB".format(*(b / GIB for b in cards))
        )
        yield (
            f"training, {name}: {shape['n_layer']}L/{shape['n_head']}H/{shape['n_embd']}, "
            f"{shape['accumulation']} x {shape['batch_size']} x {shape['block_size']} tokens, "
            f"vocabulary {shape['vocab_size']:,}{flags}",
            where(r, result.get("processor")),
            f"{r['jaxgpt_tokens_per_second']:,.0f} tokens/s{mfu}, "
            f"{r['jaxgpt_peak_bytes'] / GIB:.2f} GiB",
            f"nanoGPT ({r['nanogpt_setting']}, torch {r['versions']['torch']}) "
            f"{r['nanogpt_tokens_per_second']:,.0f} tokens/s, "
            f"{r['nanogpt_peak_bytes'] / GIB:.2f} GiB: **{r['speed_ratio']:.2f}** times its speed "
            f"({low:.2f} to {high:.2f}), {r['memory_ratio']:.2f} times its memory{on_card}",
        )


def bench(r: Mapping[str, Any]) -> Iterator[Row]:
    """What `jaxgpt.bench` measured of a preset."""
    yield (
        f"training, preset {r['preset']}: {r['batch']}, {r['optimizer']}",
        where(r),
        f"{r['tokens_per_second']:,.0f} tokens/s, MFU {r['mfu']:.1%}, "
        f"{r['peak_bytes'] / GIB:.2f} GiB",
        f"compiled peak {r['compiled_peak_bytes'] / GIB:.2f} GiB; {r['compile_seconds']:.0f} s of "
        f"compiling, {r['first_step_seconds']:.0f} s to the first step",
    )


def quarter_hour(result: Mapping[str, Any]) -> Iterator[Row]:
    """Each figure of a card beside what was predicted for it."""
    versions = result["results"]["versions"][-1]
    here = where({"device": result["device"].partition(",")[0], "versions": versions})
    for row in result["lines"]:
        if row["measured"] is not None:
            limits = predicted(row)
            yield (
                row["line"],
                here,
                number(row["measured"]),
                f"predicted {limits}" if limits else "",
            )


def accumulation(r: Mapping[str, Any]) -> Iterator[Row]:
    """MultiSteps beside a sum by hand."""
    ms = r["step_ms"]
    yield (
        f"a step of {r['accumulation']} micro-batches of {r['batch_size']}, "
        f"{r['parameters'] / 1e6:.1f}M parameters",
        where(r),
        f"{ms['ours']:.1f} ms",
        f"a sum by hand {ms['by hand']:.1f} ms: {r['ours_over_by_hand']:.3f} times its time; "
        f"MultiSteps in a plain loop {ms['plain loop']:.1f} ms",
    )


def optimizers(r: Mapping[str, Any]) -> Iterator[Row]:
    """The two optimizers' validation losses, each at the best of its learning rates."""
    adamw, muon = (best_variant(r["runs"], name) for name in ("adamw", "muon"))
    steps = adamw[0]["steps"]
    goal = mean_curve(adamw)[-1]
    sooner = next(step for step, loss in zip(steps, mean_curve(muon), strict=True) if loss <= goal)
    yield (
        f"validation loss after {steps[-1]:,} steps of the demo, {r['setting']['text']} text, "
        f"with `{r['setting']['flags']}`",
        where(r),
        summary(muon),
        f"{summary(adamw)}, which Muon reaches by step {sooner:,}",
    )


def best_variant(runs: Sequence[Mapping[str, Any]], optimizer: str) -> list[Mapping[str, Any]]:
    """The runs at an optimizer's best learning rate, by the first seed."""
    mine = [run for run in runs if run["variant"].startswith(f"optimizer={optimizer},")]
    best = min((run for run in mine if run["seed"] == 0), key=lambda run: run["val_loss"][-1])
    return [run for run in mine if run["variant"] == best["variant"]]


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Validation losses of several seeds, their mean at each evaluation."""
    return [statistics.mean(losses) for losses in zip(*(r["val_loss"] for r in runs), strict=True)]


def summary(runs: Sequence[Mapping[str, Any]]) -> str:
    """A variant and its last loss, with the standard error over its seeds."""
    losses = [run["val_loss"][-1] for run in runs]
    error = statistics.stdev(losses) / len(losses) ** 0.5
    name = runs[0]["variant"].removeprefix("optimizer=").replace(",learning_rate=", " at ")
    return f"{name}: {statistics.mean(losses):.3f} ± {error:.3f} ({len(losses)} seeds)"


def start(r: Mapping[str, Any]) -> Iterator[Row]:
    """Time to answer, and the two starts."""
    slowest = max(s for answers in r["answer_seconds"].values() for s in answers.values())
    first, second = r["first_start"], r["second_start"]
    here = where({"device": first["device"], "versions": r["versions"]})
    yield ("`--help` or a mistake, the slowest of seven commands", here, f"{slowest:.2f} s", "")
    yield (
        f"start to the end of the first step, {first['step_ms'] / 1e3:.1f} s of it the step: "
        f"`{r['run']}`",
        here,
        f"{second['first_step_seconds']:.1f} s the second time",
        f"{first['first_step_seconds']:.1f} s the first time",
    )


def train_overhead(r: Mapping[str, Any]) -> Iterator[Row]:
    """The loader's speed, and what train adds to a step."""
    here = where({"device": "cpu", "versions": r["versions"]})
    loader = r["loader"]
    cold = "cold" if loader["files_were_cold"] else "perhaps warm"
    yield (
        f"the loader, from {cold} files of {loader['tokens_in_files'] / 1e6:,.0f}M tokens",
        here,
        f"{loader['tokens_per_second'] / 1e6:.1f}M tokens/s",
        "",
    )
    shares = ", ".join(f"{name} {share:.2%}" for name, share in r["shares"].items())
    yield (
        "what `train` adds to a step, as a share of the 24gb preset's step "
        f"({r['step_seconds']:.1f} s, {r['step_seconds_are']})",
        here,
        f"{r['share_together']:.2%}",
        shares,
    )


ROWS = {
    "speed-*.json": speed,
    "bench-*.json": bench,
    "quarter-hour-*.json": quarter_hour,
    "accumulation.json": accumulation,
    "optimizers-*.json": optimizers,
    "start.json": start,
    "train-overhead.json": train_overhead,
}


def where(r: Mapping[str, Any], processor: str | None = None) -> str:
    name = processor if r["device"] == "cpu" and processor else r["device"]
    return f"{name}, jax {r['versions']['jax']}"


if __name__ == "__main__":
    sys.exit(main())
