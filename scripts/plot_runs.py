"""Draw runs side by side from their metrics.jsonl: loss, learning rate, throughput.

    python scripts/plot_runs.py runs/24gb runs/second --to curves.png    # or .svg; needs matplotlib

One picture of three parts that share their x-axis: optimizer steps, or with --x tokens, tokens.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxgpt.errors import UserError, fail
from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics

FORMATS = (".png", ".svg")
POINTS = 1000  # in one curve; longer curves are averaged over neighbouring points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--to", type=Path, default=Path("curves.png"), help="a .png or .svg")
    parser.add_argument("--x", choices=("step", "tokens"), default="step")
    args = parser.parse_args()
    try:
        draw(args.runs, args.to, args.x)
    except UserError as error:
        fail(parser.prog, str(error))
    print(args.to)


def draw(runs: list[Path], to: Path, x: str = "step") -> None:
    """Write the picture.

    Raises:
        UserError: if a run has no metrics, the format is unknown, or matplotlib is missing.
    """
    if to.suffix not in FORMATS:
        raise UserError(f"--to {to} must end in {' or '.join(FORMATS)}")
    curves = {run: read_curves(run, x) for run in runs}
    try:
        import matplotlib
    except ImportError:
        raise UserError("plotting needs matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, rate, speed) = pyplot.subplots(
        3, 1, sharex=True, figsize=(8, 8), height_ratios=(3, 1, 1), layout="constrained"
    )
    labels = labels_of(list(curves))
    for index, curve in enumerate(curves.values()):
        color = f"C{index % 10}"
        loss.plot(*curve("train/loss"), color=color, linewidth=0.8, alpha=0.5)
        loss.plot(*curve("val/loss"), color=color, marker="o", markersize=3, label=labels[index])
        rate.plot(*curve("train/learning_rate"), color=color)
        speed.plot(*curve("speed/tokens_per_second"), color=color)
    loss.set_ylabel("loss, nats per token\n(line with dots: validation)")
    rate.set_ylabel("learning rate")
    speed.set(ylabel="tokens per second", ylim=(0, None), xlabel=x)
    loss.legend()
    for part in (loss, rate, speed):
        part.grid(alpha=0.3)
    try:
        figure.savefig(to, dpi=110)
    except OSError as error:
        raise UserError(f"--to {to} cannot be written: {error}") from None
    pyplot.close(figure)


def read_curves(run: Path, x: str) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """A function from a tag to its (x_P, y_P), read from the metrics of a run."""
    records = read_metrics(run / METRICS_FILE)
    if not records:
        raise UserError(f"{run} has no {METRICS_FILE}, or an empty one; is it a run's folder?")
    tokens = tokens_per_step(run) if x == "tokens" else 1

    def curve(tag: str) -> tuple[np.ndarray, np.ndarray]:
        points = [(r["step"] * tokens, r[tag]) for r in records if tag in r]
        x_P, y_P = np.array(points, float).reshape(-1, 2).T
        return thinned(x_P), thinned(y_P)

    return curve


def labels_of(runs: list[Path]) -> list[str]:
    """The runs' folder names, or their paths if two names are equal."""
    names = [run.absolute().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def tokens_per_step(run: Path) -> int:
    """Tokens in one optimizer step of the run."""
    try:
        values = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return int(values["effective_batch_size"] * values["block_size"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run / 'config.json'} cannot be read: {error}") from None


def thinned(y_P: np.ndarray) -> np.ndarray:
    """(P,) values, or means of neighbouring values if there are more than POINTS."""
    if len(y_P) <= POINTS:
        return y_P
    return np.array([part.mean() for part in np.array_split(y_P, POINTS)])


if __name__ == "__main__":
    main()
