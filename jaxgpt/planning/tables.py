"""Print the planner's answers as tables."""

from typing import Any

from rich.table import Table
from rich.text import Text

from jaxgpt.planning.gpus import GIB
from jaxgpt.run.console import OutputConsole, duration, make_table

COLOURS = {
    "parameters": "blue",
    "optimizer": "cyan",
    "accumulator": "green",
    "activations": "yellow",
    "logits": "magenta",
    "workspace": "bright_black",
}
BAR = 60  # columns


def print_one(record: dict[str, Any]) -> None:
    """One run on one card: what it needs item by item, and how long it takes."""
    console = OutputConsole(highlight=False, soft_wrap=True)
    console.print(f"[bold]{_title(record)}[/bold] on {_cards(record)}")
    console.print(_bar(record))
    console.print(_items(record))
    console.print(_facts(record))
    _print_command(console, record)


def print_overview(answer: dict[str, Any]) -> None:
    """Every preset on one card, the one to start with, and the largest model."""
    console = OutputConsole(highlight=False, soft_wrap=True)
    name = answer["recommended"]["gpu_name"]
    console.print(f"[bold]{name}[/bold]: {_gib(answer['capacity_bytes'])} for training")
    for reason in answer["reasons"]:
        console.print(reason, markup=False)
    hours = f"{answer['hours_given']:g} h"
    timed = any(record["predicted_loss"] for record in answer["presets"])
    columns = ("preset", "parameters", "GiB", "fits", "time", "tokens")
    table = _table(*columns, *([f"loss, {hours}"] if timed else []))
    for record in answer["presets"]:
        table.add_row(*_overview_row(record, timed))
    console.print(table)
    console.print("[dim]GiB are estimated, within a tenth; --preset NAME compiles, itemizes[/dim]")
    if timed:
        console.print(
            f"[dim]loss: predicted after {hours} of training here, to rank presets; it is not "
            "comparable with losses on FineWeb[/dim]"
        )
    largest, recommended = answer["largest_model"], answer["recommended"]
    if largest:
        console.print(f"\nThe largest model that trains here: {_title(largest)}", markup=False)
        console.print(f"  {_time(largest)}; memory {largest['method']}", markup=False)
        _print_command(console, largest)
    why = f", the least loss after {hours}" if timed else ""
    console.print(f"\nTo start with{why}: {_title(recommended)}", markup=False)
    console.print(f"  {_time(recommended)}; memory {recommended['method']}", markup=False)
    console.print(_bar(recommended))
    _print_command(console, recommended)


def print_hours(answer: dict[str, Any]) -> None:
    """The best model for given hours, among its neighbours."""
    console = OutputConsole(highlight=False, soft_wrap=True)
    hours = duration(answer["hours_given"] * 3600)
    console.print(f"[bold]{hours} on {answer['gpu_name']}[/bold]: {_title(answer)}")
    table = _table("n_layer/n_head/n_embd", "parameters", "tokens", "per parameter", "loss")
    for choice in answer["choices"]:
        best = choice["parameters"] == answer["parameters"]
        cells = (
            f"{choice['n_layer']}/{choice['n_head']}/{choice['n_embd']}",
            f"{choice['parameters'] / 1e6:.1f}M",
            f"{choice['total_tokens'] / 1e9:.2f}B",
            f"{choice['tokens_per_parameter']:.0f}",
            f"{choice['predicted_loss']:.3f}",
        )
        table.add_row(*cells, style="bold green" if best else None)
    console.print(table)
    if answer["other_recipe"]:
        console.print(_other_recipe(answer), markup=False)
    console.print(
        "[dim]The loss is a prediction: the scaling law of Hoffmann et al. 2022 as refitted by "
        "Besiroglu et al. 2024, on their data; 1.9B tokens of the modern network with Muon count "
        "as 10.3B of GPT-2 with AdamW, by modded-nanogpt's records. It ranks, it does not "
        "promise.[/dim]"
    )
    console.print(_facts(answer))
    _print_command(console, answer)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        left = column in ("preset", "fits")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _other_recipe(answer: dict[str, Any]) -> str:
    other = answer["other_recipe"]
    recipe = {"gpt2": "GPT-2 with AdamW"}.get(other["arch"], "The modern network with Muon")
    change = other["predicted_loss"] - answer["predicted_loss"]
    return (
        f"{recipe} would reach {other['predicted_loss']:.3f}, {abs(change):.3f} "
        f"{'lower' if change < 0 else 'higher'}, with {other['parameters'] / 1e6:.1f}M parameters: "
        f"python -m jaxgpt.plan {other['flags']} --gpu {answer['gpu']} "
        f"--hours {answer['hours_given']:g}"
    )


def _title(record: dict[str, Any]) -> str:
    shape = f"{record['n_layer']}L/{record['n_head']}H/{record['n_embd']}"
    return f"{record['preset']}: {record['parameters'] / 1e6:.1f}M parameters, {shape}"


def _cards(record: dict[str, Any]) -> str:
    if record["mesh"] is None:
        return str(record["gpu_name"])
    return f"each of {record['devices']} x {record['gpu_name']} ({record['mesh']})"


def _bar(record: dict[str, Any]) -> Text:
    """The card's memory as a bar: one colour per item, dots for what is free."""
    capacity, bar = record["capacity_bytes"], Text()
    filled = 0.0
    for item, count in record["breakdown_bytes"].items():
        start, filled = filled, filled + BAR * count / max(capacity, record["peak_bytes"])
        bar.append("█" * (round(filled) - round(start)), style=COLOURS[item])
    bar.append("·" * (BAR - round(filled)))
    share = record["peak_bytes"] / capacity
    bar.append(f" {_gib(record['peak_bytes'])} of {_gib(capacity)}, {share:.0%}")
    return bar


def _items(record: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    what = {
        "parameters": "float32",
        "optimizer": f"its moments, {record['optimizer']}, {record['state_dtype']}",
        "accumulator": f"of gradients, {record['state_dtype']}",
        "activations": f"batch_size {record['batch_size']} x {record['block_size']} tokens, "
        f"remat {record['remat']}",
        "logits": "one chunk and its gradient",
        "workspace": "transient gradients, weights in the matrix products' dtype, the rest",
    }
    for item, count in record["breakdown_bytes"].items():
        table.add_row(Text(item, style=COLOURS[item]), _gib(count), what[item])
    table.add_row("peak", _gib(record["peak_bytes"]), Text(_how(record)))
    table.add_row(
        "head room", _gib(record["headroom_bytes"]), "" if record["fits"] else "too little"
    )
    table.add_row("host", _gib(record["host_bytes"]), "memory, while a checkpoint is written")
    return table


def _facts(record: dict[str, Any]) -> Table:
    time = "unknown: no MFU is known for this card in this dtype"
    if record["tokens_per_second"] is not None:
        time = (
            f"{duration(record['hours'] * 3600)} at {record['tokens_per_second']:,.0f} tokens/s, "
            f"predicted from an MFU of {record['mfu']:.0%} without remat ({record['mfu_source']})"
            + ("; communication between cards is not included" if record["mesh"] else "")
        )
    rate = f"{record['learning_rate']:g}"
    if record["optimizer"] == "adamw":
        rate += f"; the README's rule for this size: {record['suggested_learning_rate']:g}"
    rows = {
        "step": f"{record['effective_batch_size']} sequences = {record['batch']}; "
        f"{record['tokens_per_step']:,} tokens",
        "in total": f"{record['total_tokens'] / 1e9:.2f}B tokens, "
        f"{record['tokens_per_parameter']:.0f} a parameter",
        "attention": f"{record['attention']}, {record['dtype']}",
        "time": time,
        "learning rate": rate,
    }
    return make_table(rows)


def _overview_row(record: dict[str, Any], timed: bool) -> list[str]:
    loss = record["predicted_loss"]
    cells = [
        record["preset"],
        f"{record['parameters'] / 1e6:.1f}M",
        f"{record['peak_bytes'] / GIB:.1f}",
        _fits(record),
        "?" if record["hours"] is None else duration(record["hours"] * 3600),
        f"{record['total_tokens'] / 1e9:.1f}B",
    ]
    return [*cells, f"{loss:.3f}" if loss else ""] if timed else cells


def _fits(record: dict[str, Any]) -> str:
    batch_size, remat = record["batch_size_that_fits"], record["remat_that_fits"]
    if record["fits"]:
        return "[green]yes[/green]"
    if batch_size is None:
        return "[red]no[/red]"
    return f"batch {batch_size}" + (f", {remat}" if remat != record["remat"] else "")


def _time(record: dict[str, Any]) -> str:
    tokens = f"{record['total_tokens'] / 1e9:.1f}B tokens"
    if record["hours"] is None:
        return f"{tokens}, time unknown"
    return f"{tokens} in {duration(record['hours'] * 3600)}"


def _print_command(console: OutputConsole, record: dict[str, Any]) -> None:
    if record["fits"]:
        console.print(f"  {record['command']}", style="bold")
    elif record["command_that_fits"]:
        console.print("[red]It does not fit.[/red] This should (estimated; --fit compiles it):")
        console.print(f"  {record['command_that_fits']}", style="bold")
    else:
        console.print("[red]It does not fit with any batch_size and remat.[/red]")


def _how(record: dict[str, Any]) -> str:
    if record["method"] == "compiled":
        return "compiled for this card"
    return f"estimated, within a tenth; {record['why_estimated']}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
