"""Train a GPT: `python -m jaxgpt.train --preset 24gb`. The same command resumes it.

One pass of the loop is one optimizer step; `step` counts the steps that are done, and is the name
of checkpoints and the x of every curve. JAX is imported after the command line is understood,
because that takes seconds that a typo or `--help` should not cost.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from functools import partial

from jaxgpt.config import command_line as cli
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, flat_values, with_fields
from jaxgpt.config.flag_types import IntIfSet, TextIfSet
from jaxgpt.config.resolve import resolve
from jaxgpt.data.loader import WindowLoader, evaluation_windows, prefetch
from jaxgpt.data.manifest import check_manifest
from jaxgpt.data.shards import TokenStream
from jaxgpt.data.sources import open_split
from jaxgpt.data.tasks import load_benchmarks
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.errors import INTERRUPTED, UserError, explain_out_of_memory, fail, warn
from jaxgpt.files import FolderLock
from jaxgpt.planning.gpus import visible_cards
from jaxgpt.run import device as hardware
from jaxgpt.run import folder as resume
from jaxgpt.run import report
from jaxgpt.run.compile_cache import prepare_compile_cache
from jaxgpt.run.console import RunConsole, unfailing_output, waiting
from jaxgpt.run.processes import Address, StepRequests, StepSync, connect
from jaxgpt.run.signals import StopRequest
from jaxgpt.run.watchdog import StallWatch
from jaxgpt.weights.init_from import load_start, start_from

PROG = "python -m jaxgpt.train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags(cli.TrainFlags):
    """What a run's configuration is made of, and which of its processes this is."""

    # HOST:PORT of process 0, for several processes; not needed under Slurm, Open MPI, Kubernetes
    coordinator_address: TextIfSet = None
    num_processes: IntIfSet = None  # how many processes the run has, likewise
    process_id: IntIfSet = None  # which of them this is: 0, 1, ...


@unfailing_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        cfg, flags, _ = cli.parse_with(
            RunFlags,
            argv,
            prog=PROG,
            description="Train a GPT. The same command resumes a run that was stopped.",
            default_preset=cli.preset_of_this_machine,
        )
        assert cfg.out_dir is not None
        with StopRequest() as stop, FolderLock(cfg.out_dir, "--out-dir") as lock:
            address = Address(flags.coordinator_address, flags.num_processes, flags.process_id)
            return run(cfg, argv, stop, lock, address)
    except UserError as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:  # before anything was begun
        fail(PROG, "interrupted", code=INTERRUPTED)


def run(
    cfg: Config, argv: Sequence[str], stop: StopRequest, lock: FolderLock, address: Address
) -> int:
    """Train as `cfg` says, from the start or from the newest checkpoint in its folder."""
    out_dir = cfg.out_dir
    assert out_dir is not None
    saved = resume.load_saved(out_dir, cfg.resume)
    cfg, pretrained = start_from(cfg, saved, cli.flags_of(argv))
    if saved is not None:
        cfg = resume.continue_from(cfg, saved)
    hardware.prepare_environment(cfg)
    prepare_compile_cache(warn)
    tokenizer = load_tokenizer(cfg.tokenizer)
    cfg = resolve(cfg, tokenizer)
    train_tokens, val_tokens, data_identity = load_tokens(cfg, tokenizer)
    loader = WindowLoader(train_tokens, cfg.model.block_size, tokenizer.n_vocab, cfg.seed)
    windows_WT1 = evaluation_windows(
        val_tokens, cfg.model.block_size, cfg.eval_windows or 1, tokenizer.n_vocab
    )
    sources = {"hellaswag": cfg.hellaswag, "lambada": cfg.lambada}
    questions = load_benchmarks(sources, tokenizer, cfg.model.block_size)
    with ExitStack() as stack:
        processes = stack.enter_context(connect(address, hardware.import_jax, visible_cards))
        if processes.is_main:
            lock.take()  # before JAX takes the card's memory from the run that has the lock
        else:  # one process speaks
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        tell = warn if processes.is_main else say_nothing
        jax = hardware.import_jax()

        from jaxgpt.model.attention import compute_capability
        from jaxgpt.model.generate import Generator, Sampling
        from jaxgpt.planning.fit import smaller
        from jaxgpt.run.checkpoint import Checkpoints
        from jaxgpt.run.metrics import MetricsLog, NoLog
        from jaxgpt.run.preflight import prepare_to_run
        from jaxgpt.training.evaluation import evaluate
        from jaxgpt.training.scoring import score_benchmarks
        from jaxgpt.training.sharding import choose_layout
        from jaxgpt.training.step import Metrics

        cfg, layout = choose_layout(cfg, hardware.choose_devices(cfg))
        device = layout.device
        dtype = hardware.compute_dtype(cfg.dtype, device.platform, compute_capability(device))
        cfg = with_fields(cfg, dtype=dtype)

        stack.enter_context(jax.default_device(device))
        checkpoints = stack.enter_context(
            Checkpoints(out_dir, cfg.keep_checkpoints, tell, processes)
        )
        resumed_step = checkpoints.recover(tell, strict=cfg.resume == "must")
        if resumed_step is not None and resumed_step >= cfg.max_iters:
            report.print_finished_before(cfg, PROG, argv, resumed_step, checkpoints.best)
            return 0
        stack.enter_context(explain_out_of_memory(lambda: smaller(cfg)))
        with waiting("compiling the training step"):
            cfg, training, need = prepare_to_run(cfg, device, layout, processes)
        accumulation, held = cfg.gradient_accumulation_steps or 1, cfg.held_at_once
        eval_step = layout.from_host(training.eval_step)
        score_step = layout.from_host(training.score_step)
        generator = Generator(
            training.graphdef,
            cfg.model.block_size,
            Sampling(),
            chunk=cfg.sample_tokens,
            results=layout.results(None),
        )
        report.print_run(
            cfg, loader, len(windows_WT1), device, training.attention, need, resumed_step
        )
        report.print_changes(resume.changes(cfg, saved) if saved else [])
        if resumed_step is None:
            state = training.init()
            if pretrained is not None:
                jax.tree.map(lambda x: x.delete(), state.params)  # room for the others
                params = load_start(pretrained, device, training.state_like.params)
                state = state._replace(params=params)
        else:
            restored = checkpoints.restore(resumed_step, training.state_like)
            resume.check_config(cfg, restored.config, str(checkpoints.folder))
            resume.check_data(restored.data, data_identity, out_dir)
            state = restored.state

        step = resumed_step or 0
        log = stack.enter_context(
            MetricsLog(out_dir, resumed_step, tell) if processes.is_main else NoLog()
        )
        if processes.is_main:
            resume.save_config(cfg, out_dir)
        log.hparams(flat_values(cfg), metrics=("val/loss",))
        shape_ABT1 = (accumulation, held, cfg.model.block_size + 1)
        batches = stack.enter_context(
            prefetch(
                lambda i: layout.load(shape_ABT1, partial(loader.batch, i, accumulation, held)),
                step,
                cfg.max_iters,
            )
        )
        console = stack.enter_context(RunConsole(step, cfg.max_iters, cfg.eval_interval))
        reporter = report.Reporter(cfg, device, log, console, int(state.skipped))
        watch = stack.enter_context(StallWatch())

        def evaluate_now() -> dict[str, float]:
            loss = evaluate(eval_step, state.params, windows_WT1, held)
            scores = score_benchmarks(
                questions, score_step, state.params, cfg.model.block_size, held
            )
            figures = report.benchmark_scalars(scores)
            said = "".join(f"  {name} {value:.4f}" for name, value in figures.items())
            console.say(f"step {step:,}  validation loss {loss:.4f}{said}")
            return {"val/loss": loss, **figures}

        def begin_save() -> None:
            checkpoints.begin(state, config=flat_values(cfg), data=data_identity)
            if processes.is_main and not (out_dir / resume.CONFIG_FILE).exists():
                with suppress(ConfigError):  # somebody deleted it; what fails now may not next time
                    resume.save_config(cfg, out_dir)

        def finish_save(val_loss: float | None) -> None:
            log.flush()  # first, so that a checkpoint's metrics are never missing
            checkpoints.finish(val_loss)

        def sample_now() -> str:
            key = jax.random.fold_in(state.key, state.step)
            prompt, length = [tokenizer.eot], cfg.sample_tokens
            tokens_1L = generator.generate(state.params, prompt, length, key, samples=1)
            return tokenizer.decode(tokens_1L[0])

        text = ""
        if resumed_step is None:
            begin_save()
            evaluated = evaluate_now()
            log.scalars(step, evaluated)
            finish_save(evaluated["val/loss"])
            checkpoints.wait()  # whoever cannot save is told before hours are spent
        unread: Metrics | None = None
        sync, requests = StepSync(processes, layout), StepRequests()
        watch.begin("step")
        for tokens_ABT1 in batches:
            if unread is None:  # nothing has been done since the last save
                requests = sync.exchange(stop.name, save=False, now=True)
                if requests.stop:
                    checkpoints.wait()
                    done = f"{requests.stop}: saved step {step:,}"
                    console.say(f"{done}; the same command goes on from here")
                    return 0
            state, metrics = training.train_step(state, tokens_ABT1)
            if unread is not None:  # the step before's: reading them now, the device has work
                reporter.log_if_due(step, reporter.read(step, unread))
            step, unread = step + 1, metrics

            evaluate_due = step % cfg.eval_interval == 0 or step == cfg.max_iters
            save_due = checkpoints.due(cfg.checkpoint_minutes) or stop.save_now
            requests = sync.exchange(stop.name, save_due)
            checkpoints.poll()
            if not (evaluate_due or requests.save or requests.stop):
                watch.begin("step")
                continue
            watch.begin("evaluation" if evaluate_due else "save")
            scalars, unread = reporter.read(step, unread), None
            if stop.save_now:
                console.say(f"SIGUSR1: saving step {step:,}")
                stop.save_now = False
            begin_save()  # and evaluate while it is written
            if evaluate_due:
                evaluated = evaluate_now()
                log.scalars(step, {**scalars, **evaluated})
            else:
                reporter.log_if_due(step, scalars)
            finish_save(evaluated["val/loss"] if evaluate_due else None)
            if evaluate_due and cfg.sample_tokens:  # after the save, which it must not take along
                text = sample_now()
                log.text(step, "sample", text)
            if evaluate_due and step < cfg.max_iters and not requests.stop:
                watch.begin("save")
                checkpoints.settle()  # before the next interval, or a kill would cost two
            reporter.leave_out_pause(evaluate_due)
            watch.begin("step")
        checkpoints.close()  # before anyone is told that it is done
        console.stop()
        report.print_finished(cfg, PROG, argv, evaluated["val/loss"], checkpoints.best, text)
    return 0


def say_nothing(message: str) -> None:
    """What a process of several says that is not the main one."""


def load_tokens(
    cfg: Config, tokenizer: Tokenizer
) -> tuple[TokenStream, TokenStream, dict[str, int | str]]:
    """The training and the validation split, checked, and what tells them from other data."""
    identity: dict[str, int | str] = {}
    data_dir = None if cfg.dataset == "embedded" else cfg.data_dir
    if data_dir is not None and (fingerprint := check_manifest(data_dir, tokenizer)):
        identity["manifest_fingerprint"] = fingerprint
    tokens_wanted = cfg.tokens_per_step * cfg.max_iters
    train = open_split(data_dir, "train", tokenizer, tokens_wanted)
    val = open_split(data_dir, "val", tokenizer, tokens_wanted)
    identity["tokenizer_sha256"] = tokenizer.sha256
    identity |= {"train_tokens": len(train), "val_tokens": len(val)}
    identity |= {"train_fingerprint": train.fingerprint(), "val_fingerprint": val.fingerprint()}
    return train, val, identity


if __name__ == "__main__":
    sys.exit(main())
