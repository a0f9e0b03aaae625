"""What was predicted before a card was measured, and how each figure is read from the results.

The table shows prediction and measurement; where they differ, something is to be learned.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from shapes import ABLATIONS, MEMORY_ITEMS, SPEED_ITEMS

H100 = "H100"  # in the name of the card that speeds are predicted for
Results = Mapping[str, Sequence[Mapping[str, Any]]]  # of each part, the JSON objects it printed


class Prediction(NamedTuple):
    """One figure: how it is read from the results, and its expected range; None is no limit."""

    name: str
    read: Callable[[Results], float]
    low: float | None = None
    likely: float | None = None
    high: float | None = None
    card: str = ""  # the prediction holds for devices with this in their name


# ---------------------------------------------------------------- reading


def last(part: str, *keys: str) -> Callable[[Results], float]:
    """A figure in the last JSON object that a part printed."""

    def read(results: Results) -> float:
        value: Any = results[part][-1]
        for key in keys:
            value = value[key]
        return value

    return read


def item(name: str, key: str) -> Callable[[Results], float]:
    """A figure of an item of steps.py, the last that any part printed."""
    return lambda results: _item(results, name)[key]


def _item(results: Results, name: str) -> Mapping[str, Any]:
    objects = (found for part in results.values() for found in part)
    return [found for found in objects if found.get("item") == name and "step_ms" in found][-1]


def ratio(top: Callable[[Results], float], bottom: Callable[[Results], float]) -> Any:
    return lambda results: top(results) / bottom(results)


def peak_over_compiled(name: str) -> Callable[[Results], float]:
    """The process's peak memory relative to the compiled step's; a CPU does not count it."""

    def read(results: Results) -> float:
        found = _item(results, name)
        if found["peak_bytes_from"] != "memory_stats":
            raise KeyError("peak_bytes")
        return found["peak_bytes"] / found["compiled_peak_bytes"]

    return read


def scaled(key: str, unit: float) -> Callable[[Results], float]:
    """One of measure_ceilings.py's figures, in `unit`."""
    return lambda results: last("ceilings", key)(results) / unit


def attention_error(results: Results) -> float:
    return max(last("attention", "errors")(results).values())


def losses(results: Results, part: str) -> list[float]:
    found = last(part, "losses")(results)
    return [found[step] for step in sorted(found, key=int)]


def differences_to_float32(results: Results) -> list[float]:
    """How far the losses in bfloat16 are from float32's, at each step that both runs have."""
    pairs = zip(losses(results, "train"), losses(results, "float32"), strict=False)
    return [abs(a - b) for a, b in pairs]


def first_difference(results: Results) -> float:
    return differences_to_float32(results)[0]


def largest_difference(results: Results) -> float:
    return max(differences_to_float32(results))


def last_tenth(values: Sequence[float]) -> float:
    return statistics.mean(values[-(len(values) // 10) :])


def fall(results: Results) -> float:
    found = losses(results, "train")
    return found[0] - last_tenth(found)


def final_difference(results: Results) -> float:
    both = (last_tenth(losses(results, part)) for part in ("train", "nanogpt-train"))
    return abs(next(both) - next(both))


def b64_over_nanogpt(results: Results) -> float:
    return item("b64", SPEED)(results) / last("nanogpt-b64", SPEED)(results)


def memory_over_nanogpt(results: Results) -> float:
    peaks = (last(part, "peak_bytes")(results) for part in ("bench-b32", "nanogpt-b32"))
    return next(peaks) / next(peaks)


def equal_share(results: Results) -> float:
    return last("resume", "steps_equal")(results) / last("resume", "steps")(results)


def commands_failed(results: Results) -> float:
    """How many commands failed or were not started."""
    codes = last("resume", "exit_codes")(results)
    return sum(codes.get(name) != 0 for name in ("resumed", "sample", "evaluate", "export"))


def evaluated_difference(results: Results) -> float:
    return abs(last("resume", "evaluated")(results) - last("resume", "logged")(results))


# ---------------------------------------------------------------- predictions

SPEED = "tokens_per_second"
OURS, NANOGPT = last("bench-b32", SPEED), last("nanogpt-b32", SPEED)
FIRST = (
    Prediction("attention, largest relative error", attention_error, 0, None, 1e-2),
    Prediction("bfloat16 and float32, loss of step 1", first_difference, 0, None, 0.01),
    Prediction("bfloat16 and float32, any step", largest_difference, 0, None, 0.15),
    Prediction("train, fall of the loss", fall, 2),
    Prediction("train and nanoGPT, last tenths", final_difference, 0, None, 0.15),
    Prediction("b32, tokens/s", OURS, 370e3, 435e3, 500e3, H100),
    Prediction("b32, MFU", last("bench-b32", "mfu")),
    Prediction("b64, tokens/s", item("b64", SPEED), 380e3, 445e3, 515e3, H100),
    Prediction("24gb, tokens/s", item("24gb", SPEED), 480e3, 570e3, 690e3, H100),
    Prediction("nanoGPT b32, tokens/s", NANOGPT, 380e3, 450e3, 520e3, H100),
    Prediction("nanoGPT b64, tokens/s", last("nanogpt-b64", SPEED), 390e3, 460e3, 530e3, H100),
    Prediction("b32 / nanoGPT, speed", ratio(OURS, NANOGPT), 0.8, 0.96, 1.1),
    Prediction("b64 / nanoGPT, speed", b64_over_nanogpt, 0.8, 0.96, 1.1),
    Prediction("b32 / nanoGPT, memory", memory_over_nanogpt, 0, None, 0.6),
    *(
        Prediction(f"{name}, real / compiled peak", peak_over_compiled(name), 1.0, None, 1.03)
        for name in SPEED_ITEMS
    ),
    Prediction("large product, TFLOP/s", scaled("product_flops", 1e12), 742, None, 801, H100),
    Prediction("copy, TB/s", scaled("copy_bytes_per_second", 1e12), 2.7, None, 3.0, H100),
    Prediction("trace, share of time without a kernel", last("trace", "gaps_share")),
)
SECOND = (
    Prediction("kill -9 and resume, share of losses equal", equal_share, 1, 1, 1),
    Prediction("train, sample, evaluate, export: failed", commands_failed, 0, 0, 0),
    Prediction("evaluated and logged loss", evaluated_difference, 0, None, 1e-3),
    *(
        Prediction(
            f"{name} / as it is, time", ratio(item(name, "step_ms"), item("as-it-is", "step_ms"))
        )
        for name in ABLATIONS[1:]
    ),
    Prediction("deterministic, same bits twice", item("deterministic", "same_bits"), 1, 1, 1),
    Prediction("24gb-774m, tokens/s", item("24gb-774m", SPEED), 52e3, 68e3, 82e3, H100),
    Prediction("80gb-350m, tokens/s", item("80gb-350m", SPEED), 140e3, 168e3, 200e3, H100),
    *(
        Prediction(f"{name}, real / compiled peak", peak_over_compiled(name), 1.0, None, 1.03)
        for name in MEMORY_ITEMS
    ),
)
PREDICTIONS = {"first": FIRST, "second": SECOND, "trial": FIRST + SECOND}


# ---------------------------------------------------------------- the table


def table(lines: Sequence[Prediction], results: Results, device: str) -> list[dict[str, Any]]:
    """Each line with what was measured, if anything was, and what was predicted for `device`."""
    rows = []
    for line in lines:
        try:
            measured: float | None = float(line.read(results))
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            measured = None  # its part failed, was killed or was not started
        limits = {"low": line.low, "likely": line.likely, "high": line.high}
        if line.card not in device:
            limits = dict.fromkeys(limits)
        rows.append({"line": line.name, "measured": measured, **limits})
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    if row["measured"] is None:
        return "not measured"
    if row["low"] is None:
        return ""
    high = float("inf") if row["high"] is None else row["high"]
    return "as predicted" if row["low"] <= row["measured"] <= high else "NOT as predicted"


def predicted(row: Mapping[str, Any]) -> str:
    known = [row[key] for key in ("low", "likely", "high") if row[key] is not None]
    return " - ".join(dict.fromkeys(map(number, known)))


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"{row['line']:42} {number(row['measured']):>10}  "
        f"{predicted(row):32} {verdict(row)}".rstrip()
        for row in rows
    )
