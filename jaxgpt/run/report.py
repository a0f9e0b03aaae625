"""What a run prints and logs: at its start, at each step, and at its end."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxgpt.config.command_line import without_flags
from jaxgpt.config.optimizer import GROUP_RATES
from jaxgpt.config.resolved import Resolved
from jaxgpt.data.task import Figure
from jaxgpt.planning.gpus import GIB, lookup_gpu
from jaxgpt.planning.speed import peak_of, reached_mfu
from jaxgpt.run import device as hardware
from jaxgpt.run.console import Pace, RunConsole, counted, print_table
from jaxgpt.run.metrics_file import EVENT_FILES, METRICS_FILE, read_metrics
from jaxgpt.run.skipped_steps import DivergedError, SkipCounter

if TYPE_CHECKING:  # JAX and tensorboardX come after the command line
    from jaxgpt.run.metrics import MetricsLog
    from jaxgpt.run.opening import Data
    from jaxgpt.run.preflight import Compiled


class Reporter:
    """Shows each step's metrics on the console and writes them to the log."""

    def __init__(
        self,
        cfg: Resolved,
        device: Any,
        log: "MetricsLog",
        console: RunConsole,
        skips: SkipCounter,
    ):
        self._log, self._console, self._device = log, console, device
        self._skips = skips
        self._log_interval = cfg.asked.log_interval
        self._pace = Pace(cfg.tokens_per_step)
        gpu = lookup_gpu(device.device_kind)
        self._peak_flops = peak_of(gpu, cfg.dtype, cfg.batch.devices)
        self._model = cfg.model

    def read(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Wait for the metrics of `step`, show them, and return what is to be logged.

        Raises:
            DivergedError: if too many steps in a row were skipped.
        """
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        self._pace.lap()
        self._console.step(step, values["train/loss"], self._pace)
        scalars = {**values, **self._speed(), **hardware.memory_in_use(self._device)}
        try:
            if message := self._skips.note(step, values):
                self._console.say(message)
        except DivergedError:
            self._log.scalars(step, scalars)
            raise
        return scalars

    def is_logged(self, step: int) -> bool:
        """Whether the step is one of every log_interval."""
        return step % self._log_interval == 0

    def log_if_due(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log at every log_interval."""
        if self.is_logged(step):
            self._log.scalars(step, scalars)
            self._console.log_line(step, scalars["train/loss"], self._pace)

    def _speed(self) -> dict[str, float]:
        tokens_per_second = self._pace.tokens_per_second
        if tokens_per_second is None:
            return {}
        values = {"speed/tokens_per_second": tokens_per_second}
        if self._peak_flops is not None:
            values["speed/mfu"] = reached_mfu(tokens_per_second, self._model, self._peak_flops)
        return values

    def leave_out_pause(self, evaluated: bool) -> None:
        """Leave the time since the last `read`, for an evaluation or a save, out of the speed."""
        self._pace.leave_out_pause(evaluated)

    def evaluated(
        self, step: int, scores: Mapping[str, float], scalars: Mapping[str, float] | None = None
    ) -> float:
        """Print and log an evaluation, with the step's own `scalars`; returns the loss."""
        others = [f"  {name} {value:.4f}" for name, value in scores.items() if name != "val/loss"]
        self.say(f"step {step:,}  validation loss {scores['val/loss']:.4f}{''.join(others)}")
        self._log.scalars(step, {**(scalars or {}), **scores})
        return scores["val/loss"]

    def sampled(self, step: int, text: str) -> str:
        """Log a sampled text, unless it is empty; returns it."""
        if text:
            self._log.text(step, "sample", text)
        return text

    def stopped(self, step: int, signal: str) -> None:
        """Say that a signal has stopped the run."""
        self.say(f"{signal}: saved step {step:,}; run the same command again to resume")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.say(text)

    def close(self) -> None:
        """Stop updating the bar."""
        self._console.stop()


class Result(NamedTuple):
    """The result of a run."""

    val_loss: float = math.nan
    sample: str = ""


def task_scalars(scores: Mapping[str, Mapping[str, Figure]]) -> dict[str, float]:
    """The figures of evaluation tasks, under their names in the log."""
    return {
        f"{task}/{name}": figure.value
        for task, figures in scores.items()
        for name, figure in figures.items()
    }


def print_run(compiled: "Compiled", data: "Data", resumed_step: int | None) -> None:
    """Print the resolved configuration and what follows from it."""
    cfg, need, device = compiled.cfg, compiled.need, compiled.layout.device
    m, o, asked = cfg.model, cfg.optimizer, cfg.asked
    tokens, windows = cfg.tokens_per_step, sum(map(len, data.validation.values()))
    where = "from the start" if resumed_step is None else f"from step {resumed_step:,}"
    rate = f"{o.learning_rate:g} after {counted(o.warmup_iters, 'step')} of warm-up"
    if cfg.max_iters <= o.warmup_iters:
        rate += ", which is longer than the run"
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


def print_changes(changes: Sequence[str]) -> None:
    """Print the settings that have changed since the run was saved."""
    if changes:
        print(f"Changed since the run was saved: {', '.join(changes)}")


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
    changes: Sequence[str],
) -> None:
    """Print the result of a run that had finished before, and how to continue or start anew.

    `changes` are the settings that were given and differ from the run's.
    """
    records = [r for r in read_metrics(cfg.out_dir / METRICS_FILE) if "val/loss" in r]
    result = f", validation loss {records[-1]['val/loss']:.4f}" if records else ""
    if records and records[-1]["step"] != step:  # stopped at that step, which was not evaluated
        result += f" at step {records[-1]['step']:,}"
    print(f"{cfg.out_dir} is finished: {step:,} steps{_source_end(cfg)}{result}{_best(best)}")
    if changes:
        print(f"No step is left to train, so these had no effect: {', '.join(changes)}")
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
    commands = {
        f"{prog} {longer}": f"train longer; the learning rate stays at min_lr, {o.min_lr:g}",
        f"{prog} {longer} --lr-decay-iters {2 * step}": "train longer with a longer decay: the "
        "learning rate goes up again, and down to min_lr at the new end",
    }
    if not o.decay_lr:
        commands = {f"{prog} {longer}": "train longer"}
    elif not o.min_lr:
        del commands[f"{prog} {longer}"]
    commands |= {
        f"{prog} {anew}": "start anew",
        f"tensorboard --logdir {cfg.out_dir.parent}": "see the curves (pip install tensorboard)",
        f"python -m jaxgpt.sample --out-dir {shlex.quote(str(cfg.out_dir))} --interactive": (
            "sample from it; jaxgpt.evaluate measures it, jaxgpt.export writes it for transformers"
        ),
    }
    if cfg.asked.vram_gb is None:
        commands[f"{prog} --preset 24gb"] = "a real model, on a GPU"
    return "\n".join(f"  {command}\n      {what}" for command, what in commands.items())
