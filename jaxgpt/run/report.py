"""What a run prints at its start and at its end."""

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxgpt.config.command_line import without_flags
from jaxgpt.config.optimizer import GROUP_RATES
from jaxgpt.config.resolved import Resolved
from jaxgpt.planning.gpus import GIB
from jaxgpt.planning.local_gpus import preset_of_this_machine
from jaxgpt.run.console import counted, print_table
from jaxgpt.run.folder import changes
from jaxgpt.run.metrics_file import EVENT_FILES, METRICS_FILE, read_metrics

if TYPE_CHECKING:  # JAX comes after the command line
    from jaxgpt.run.opening import Data
    from jaxgpt.run.preflight import Compiled


class Result(NamedTuple):
    """The result of a run."""

    val_loss: float = math.nan
    sample: str = ""


def print_run(
    compiled: "Compiled", data: "Data", resumed_step: int | None, saved: Resolved | None
) -> None:
    """Print the resolved configuration, what follows from it, and how it differs from `saved`."""
    cfg, need, device = compiled.cfg, compiled.need, compiled.layout.device
    m, o, asked = cfg.model, cfg.optimizer, cfg.asked
    tokens, windows = cfg.tokens_per_step, sum(map(len, data.validation.values()))
    where = "from the start" if resumed_step is None else f"from step {resumed_step:,}"
    rate = f"{o.learning_rate:g} after {counted(o.warmup_iters, 'step')} of warm-up"
    if cfg.max_iters <= o.warmup_iters:
        rate += ", which takes the whole run"
    elif o.decay_lr:
        rate += f", {o.schedule} to {o.min_lr:g} at step {o.lr_decay_iters:,}"
    else:
        rate += ", constant"
    own_rates = {name: getattr(o, name) for name in GROUP_RATES if getattr(o, name)}
    rate += "".join(f", {name} {value:g}" for name, value in own_rates.items())
    rows = {
        "run": f"{asked.out_dir}, {where} to step {cfg.max_iters:,}{_source_end(cfg)}",
        "model": f"{m.arch}, {m.describe_parameters()}: n_layer {m.n_layer}, n_head {m.n_head}, "
        f"n_embd {m.n_embd}, block_size {m.block_size}, vocab_size {m.vocab_size}, "
        f"bias {m.bias}, dropout {m.dropout:g}",
        "weights": f"random, seed {asked.seed}" if cfg.init_from is None else cfg.init_from,
        **_data_rows(cfg, data),
        "step": f"{cfg.batch.effective} sequences = {cfg.batch}; {tokens:,} tokens",
        "in total": f"{cfg.total_tokens:,} tokens",
        "optimizer": f"{o.optimizer}, beta1 {o.beta1:g}, beta2 {o.beta2:g}, weight_decay "
        f"{o.weight_decay:g}, grad_clip {o.grad_clip:g}",
        "learning rate": rate,
        "evaluation": f"every {asked.eval_interval:,} steps, {counted(windows, 'window')} of the "
        f"validation split{'s' * (len(data.validation) > 1)}",
        "checkpoints": f"at every evaluation and every {asked.checkpoint_minutes:g} minutes; the "
        f"newest {asked.keep_checkpoints} and the best are kept",
        "device": f"{_mesh_prefix(cfg)}{device.device_kind} ({device.platform}), {cfg.dtype}, "
        f"remat {cfg.remat}",
        "attention": compiled.training.attention,
        "memory": f"{need.peak_bytes / GIB:.2f} GiB at the step's peak, compiled; "
        f"{need.host_bytes / GIB:.2f} GiB on the host for a checkpoint",
        "written to": f"{asked.out_dir}: checkpoints/, {METRICS_FILE}, config.json, "
        f"{EVENT_FILES} for TensorBoard",
    }
    print_table(f"jaxgpt {asked.preset}", rows)
    if saved is not None and (changed := changes(cfg, saved)):
        print(f"Changed since the run was saved: {', '.join(changed.values())}")


def _data_rows(cfg: Resolved, data: "Data") -> dict[str, str]:
    """A row for each source, with its share at each stage if there are several, and its epochs."""
    mixture, rows = cfg.asked.mixture, {}
    epochs = data.loader.epochs(cfg.max_iters * cfg.batch.effective)
    for (name, folder), source in zip(mixture.folders.items(), data.loader.loaders, strict=True):
        shares = [(start, float(shares.get(name, 0))) for start, shares in mixture.stages]
        later = "".join(f", {share:.4g} from step {start:,}" for start, share in shares[1:])
        share = f"share {shares[0][1]:.4g}{later}, " if len(epochs) > 1 else ""
        rows[f"data {mixture.labels[name]}" if share else "data"] = (
            f"{folder or 'embedded text'}: {share}{len(source.tokens):,} {cfg.tokenizer} tokens, "
            f"{epochs[name]:.2f} epochs, seed {cfg.asked.seed}"
        )
    return rows


def _source_end(cfg: Resolved) -> str:
    """Why a run is shorter than it was asked to be, if it is."""
    if cfg.end is None:
        return ""
    source = cfg.asked.mixture.labels[cfg.end.source]
    return f" (--at-end stop: {source} ends at step {cfg.end.step:,})"


def _mesh_prefix(cfg: Resolved) -> str:
    return f"{cfg.mesh.devices} x ({cfg.mesh}) " if cfg.mesh.devices > 1 else ""


def print_finished(
    cfg: Resolved, prog: str, argv: Sequence[str], best: tuple[int, float] | None, result: Result
) -> None:
    """Print the result, a sample, and what to do next."""
    loss = f"validation loss {result.val_loss:.4f}{_best(best)}"
    print(f"\nDone: {cfg.max_iters:,} steps{_source_end(cfg)}, {loss}")
    if result.sample:
        print(f"\nA sample of what it writes:\n\n{result.sample.strip()}")
    print(f"\nNext:\n{_next_commands(cfg, prog, argv, cfg.max_iters)}")


def print_finished_before(
    cfg: Resolved,
    prog: str,
    argv: Sequence[str],
    step: int,
    best: tuple[int, float] | None,
    no_effect: Sequence[str],
) -> None:
    """Print the result of a run that had finished before, and how to continue or start anew.

    `no_effect` are the changes that were asked for, for which no step is left.
    """
    records = [r for r in read_metrics(cfg.out_dir / METRICS_FILE) if "val/loss" in r]
    result = f", validation loss {records[-1]['val/loss']:.4f}" if records else ""
    if records and records[-1]["step"] != step:  # stopped at that step, which was not evaluated
        result += f" at step {records[-1]['step']:,}"
    print(f"{cfg.out_dir} is finished: {step:,} steps{_source_end(cfg)}{result}{_best(best)}")
    if no_effect:
        print(f"No step is left to train, so these had no effect: {', '.join(no_effect)}")
    print(f"Next:\n{_next_commands(cfg, prog, argv, step)}")


def _best(best: tuple[int, float] | None) -> str:
    return "" if best is None else f" (best: {best[1]:.4f} at step {best[0]:,})"


def _next_commands(cfg: Resolved, prog: str, argv: Sequence[str], step: int) -> str:
    again = without_flags(argv, "max_iters", "out_dir", "lr_decay_iters")
    if cfg.end is not None:
        again = [*without_flags(again, "at_end"), "--at-end", "repeat"]
    here = [] if without_flags(argv, "out_dir") == list(argv) else ["--out-dir", str(cfg.out_dir)]
    longer = shlex.join([*again, *here, "--max-iters", str(2 * step)])
    anew = shlex.join([*without_flags(argv, "out_dir"), "--out-dir", f"{cfg.out_dir}-2"])
    o = cfg.optimizer
    assert o.lr_decay_iters is not None, "set by `resolve`"
    at_min_lr = o.warmup_iters < o.lr_decay_iters <= step
    commands = {
        f"{prog} {longer}": "train longer"
        + f"; the learning rate stays at min_lr, {o.min_lr:g}" * at_min_lr,
        f"{prog} {longer} --lr-decay-iters {2 * step}": "train longer with a longer decay"
        + ": the learning rate goes up again, and down to min_lr at the new end" * at_min_lr,
    }
    if not o.decay_lr:
        commands = {f"{prog} {longer}": "train longer"}
    elif not o.min_lr:
        del commands[f"{prog} {longer}"]
    commands |= {
        f"{prog} {anew}": "start anew",
        f"tensorboard --logdir {shlex.quote(str(cfg.out_dir.parent))}": (
            "see the curves (pip install tensorboard)"
        ),
        f"python -m jaxgpt.sample --out-dir {shlex.quote(str(cfg.out_dir))} --interactive": (
            "sample from it; jaxgpt.evaluate measures it, jaxgpt.export writes it for transformers"
        ),
    }
    if cfg.asked.vram_gb is None:
        preset = preset_of_this_machine()
        where = "for this machine's GPU" if preset else "on a GPU of 24 GB"
        commands[f"{prog} --preset {preset or '24gb'}"] = f"a real model, {where}"
    return "\n".join(f"  {command}\n      {what}" for command, what in commands.items())
