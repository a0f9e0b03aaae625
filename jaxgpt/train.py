"""Train a language model: `python -m jaxgpt.train --preset 24gb`. The same command resumes it.

One pass of the loop is one optimizer step; `step` counts the completed steps, and is the name of
checkpoints and the x-axis of every curve. JAX is imported after the command line is parsed: the
import takes seconds, and a typo or `--help` should be answered at once.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxgpt.config.command_line import RunFlags, parse_run
from jaxgpt.config.flag_types import IntIfSet, TextIfSet
from jaxgpt.config.resolved import Resolved
from jaxgpt.data.loader import prefetch
from jaxgpt.errors import make_main, warn
from jaxgpt.files import FolderLock
from jaxgpt.planning.local_gpus import count_visible_cards, preset_of_this_machine
from jaxgpt.run import device as hardware
from jaxgpt.run import folder, report
from jaxgpt.run.compile_cache import note_new_entries, prepare_compile_cache
from jaxgpt.run.console import unfailing_output
from jaxgpt.run.opening import Data, find_devices, load_step, open_data, open_run
from jaxgpt.run.processes import Address, Processes, StepRequests, StepSync, connect
from jaxgpt.run.reporter import Reporter, SkipCounter
from jaxgpt.run.signals import StopRequest
from jaxgpt.run.watchdog import StallWatch
from jaxgpt.weights.init_from import load_initial_params
from jaxgpt.weights.source import Weights

if TYPE_CHECKING:  # they import JAX
    from jaxgpt.run.checkpoint import Checkpoints
    from jaxgpt.run.evaluator import Evaluator
    from jaxgpt.run.metrics import MetricsLog
    from jaxgpt.run.preflight import Compiled
    from jaxgpt.training.step import TrainState

PROG = "python -m jaxgpt.train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags(RunFlags):
    """The run's configuration, and which of its processes this is."""

    # HOST:PORT of process 0, for several processes; not needed under Slurm, Open MPI, Kubernetes
    coordinator_address: TextIfSet = None
    num_processes: IntIfSet = None  # number of processes; given with --coordinator-address
    process_id: IntIfSet = None  # index of this process: 0, 1, ...


def run(argv: Sequence[str]) -> int:
    """Train as argv says, from the start or from the newest checkpoint. Raises UserError."""
    asked, flags, given = parse_run(
        TrainFlags,
        argv,
        prog=PROG,
        description="Train a language model. The same command resumes a run that was stopped.",
        default_preset=preset_of_this_machine,
    )
    assert asked.out_dir is not None
    address = Address(flags.coordinator_address, flags.num_processes, flags.process_id)
    with (
        StopRequest() as stop,
        FolderLock(asked.out_dir, "--out-dir") as lock,
        ExitStack() as stack,
    ):
        origin, weights = open_run(asked, given)
        hardware.prepare_environment(asked)
        prepare_compile_cache(warn)
        data = open_data(asked, origin, weights.tokenizer if weights else None)
        processes = stack.enter_context(connect(address, hardware.import_jax, count_visible_cards))
        tell = start_process(processes, lock, stack)
        jax = hardware.import_jax()

        from jaxgpt.run.checkpoint import Checkpoints
        from jaxgpt.run.metrics import MetricsLog, NoLog
        from jaxgpt.run.preflight import compile_to_fit
        from jaxgpt.run.wandb_log import WandbLog

        cfg, layout = find_devices(asked, origin, data.tokenizer.n_vocab, data.end)
        stack.enter_context(jax.default_device(layout.device))
        checkpoints = stack.enter_context(
            Checkpoints(asked.out_dir, asked.keep_checkpoints, tell, processes, lock.renew)
        )
        resumed_step = folder.find_checkpoint(cfg, data.identity, checkpoints, tell)
        if resumed_step is not None and resumed_step >= cfg.max_iters:
            changes = folder.changes(cfg, origin.saved) if origin.saved else {}
            no_effect = [changes[name] for name in changes if name in given - asked.open_choices]
            report.print_finished_before(cfg, PROG, argv, resumed_step, checkpoints.best, no_effect)
            return 0
        compiled = stack.enter_context(compile_to_fit(cfg, asked.open_choices, layout, processes))
        note_new_entries()
        report.print_run(compiled, data, resumed_step, origin.saved)
        state = start_or_restore(compiled, weights, checkpoints, resumed_step)
        log_type = partial(WandbLog, asked.wandb_project) if asked.wandb_project else MetricsLog
        main_log = partial(log_type, asked.out_dir, resumed_step, tell, lock.is_held)
        log = stack.enter_context(main_log() if processes.is_main else NoLog())
        overflows = int(state.loss_scale.overflows) if state.loss_scale else 0
        skips = SkipCounter(int(state.skipped), overflows)
        training = open_training(compiled, data, checkpoints, resumed_step, skips, log, stack)
        result = train(training, state, resumed_step, StepSync(processes, layout), stop)
        if result is None:
            return 0
        checkpoints.close()  # before reporting success
        training.reporter.stop()
        report.print_finished(cfg, PROG, argv, checkpoints.best, result)
    return 0


def start_process(
    processes: Processes, lock: FolderLock, stack: ExitStack
) -> Callable[[str], object]:
    """Lock the run's folder in the main process, silence the others; returns how to warn."""
    processes.in_main(lock.take)  # before JAX takes a card's memory from the run that has the lock
    if processes.is_main:
        return warn
    nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115 (the stack closes it)
    stack.enter_context(redirect_stdout(nowhere))
    return lambda message: None


def start_or_restore(
    compiled: "Compiled",
    weights: Weights | None,
    checkpoints: "Checkpoints",
    resumed_step: int | None,
) -> "TrainState":
    """The state before the first step of this process."""
    import jax

    training = compiled.training
    if resumed_step is not None:
        return checkpoints.restore(resumed_step, training.state_like)
    state = training.init()
    if weights is None:
        return state
    jax.tree.map(lambda x: x.delete(), state.params)  # makes room for the loaded ones
    params = load_initial_params(weights, compiled.layout.device, training.state_like.params)
    return state._replace(params=params)


class Training(NamedTuple):
    """Everything that the loop uses."""

    cfg: Resolved
    train_step: Callable[..., Any]
    batches: Iterator[Any]  # tokens_ABT1 of each step
    checkpoints: "Checkpoints"
    begin_save: Callable[["TrainState"], None]  # whose arrays may then be donated
    finish_save: Callable[[float | None], None]  # with the validation loss, if it was evaluated
    evaluator: "Evaluator"
    reporter: Reporter
    log: "MetricsLog"
    watch: StallWatch


def open_training(
    compiled: "Compiled",
    data: Data,
    checkpoints: "Checkpoints",
    resumed_step: int | None,
    skips: SkipCounter,
    log: "MetricsLog",
    stack: ExitStack,
) -> Training:
    """Open everything that the loop uses; `stack` closes it. Raises ConfigError."""
    from jaxgpt.run.evaluator import Evaluator

    cfg, layout = compiled.cfg, compiled.layout
    step, is_main = resumed_step or 0, checkpoints.processes.is_main

    def begin_save(state: "TrainState") -> None:
        checkpoints.begin(state, config=cfg.flat(), data=data.identity)
        if is_main:
            folder.restore_config(cfg)

    def finish_save(val_loss: float | None) -> None:
        log.flush()  # first, so that a checkpoint's metrics are never missing
        checkpoints.finish(val_loss)

    if is_main:
        folder.save_config(cfg)
        data.tokenizer.save(cfg.out_dir)
    log.hparams(cfg.flat(), metrics=("val/loss",))
    batches = prefetch(partial(load_step, cfg, layout, data.loader), step, cfg.max_iters)
    return Training(
        cfg=cfg,
        train_step=compiled.training.train_step,
        batches=stack.enter_context(batches),
        checkpoints=checkpoints,
        begin_save=begin_save,
        finish_save=finish_save,
        evaluator=Evaluator(compiled, data),
        reporter=stack.enter_context(Reporter(cfg, layout.device, log, skips, step)),
        log=log,
        watch=stack.enter_context(StallWatch()),
    )


class Due(NamedTuple):
    """What to do after a step."""

    evaluate: bool
    save: bool  # evaluations save as well
    stop: bool


def due_after(step: int, cfg: Resolved, requests: StepRequests) -> Due:
    """What is due after `step` completed steps."""
    evaluate = step % cfg.asked.eval_interval == 0 or step == cfg.max_iters
    stop = requests.stop is not None
    return Due(evaluate, evaluate or requests.save or stop, stop)


def train(
    run: Training, state: "TrainState", resumed_step: int | None, sync: StepSync, stop: StopRequest
) -> report.Result | None:
    """Train to the end: the loop. None if a signal stopped it, with everything saved."""
    cfg, reporter, checkpoints = run.cfg, run.reporter, run.checkpoints
    result = report.Result()
    step = resumed_step or 0
    if resumed_step is None:
        run.begin_save(state)
        result = report.Result(reporter.evaluated(step, run.evaluator.scores(state)))
        run.finish_save(result.val_loss)
        checkpoints.wait()  # a run that cannot save fails now, not after hours
    # The newest step's metrics, not read yet: that would wait for the device.
    unread: Mapping[str, Any] | None = None
    run.watch.begin("step")
    for tokens_ABT1 in run.batches:
        if unread is None:  # nothing has changed since the last save
            requests = sync.exchange(stop.name, save=False, now=True)
            if requests.stop:
                checkpoints.wait()
                reporter.say(
                    f"{requests.stop}: saved step {step:,}; run the same command again to resume"
                )
                return None
        is_logged = reporter.is_logged(step + 1)
        by_source = run.evaluator.losses_of_step(state, step) if is_logged else {}
        state, metrics = run.train_step(state, tokens_ABT1)
        if unread is not None:  # from the step before, while the device computes this one
            reporter.log_if_due(step, reporter.read(step, unread))
        step, unread = step + 1, {**metrics, **by_source}

        save_now = checkpoints.due(cfg.asked.checkpoint_minutes) or stop.save_now
        requests = sync.exchange(stop.name, save_now)
        checkpoints.poll()
        due = due_after(step, cfg, requests)
        if not due.save:
            run.watch.begin("step")
            continue
        run.watch.begin("evaluation" if due.evaluate else "save")
        scalars, unread = reporter.read(step, unread), None
        if stop.save_now:
            reporter.say(f"SIGUSR1: saving step {step:,}")
            stop.save_now = False
        run.begin_save(state)  # and evaluate while it is written
        if due.evaluate:
            result = report.Result(reporter.evaluated(step, run.evaluator.scores(state), scalars))
        else:
            reporter.log_if_due(step, scalars)
        run.finish_save(result.val_loss if due.evaluate else None)
        if due.evaluate:  # after `finish_save`, so that a failure here cannot lose the save
            result = result._replace(sample=run.evaluator.sample(state))
            run.log.text(step, "sample", result.sample)
        if due.evaluate and step < cfg.max_iters and not due.stop:
            run.watch.begin("save")
            checkpoints.settle()  # before the next interval, or a kill could lose two
        reporter.pace.leave_out_pause(due.evaluate)
        run.watch.begin("step")
    return result


main = unfailing_output()(make_main(PROG, run))

if __name__ == "__main__":
    sys.exit(main())
