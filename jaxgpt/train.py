"""Train a GPT: `python -m jaxgpt.train --preset 24gb`. The same command resumes it.

One pass of the loop is one optimizer step; `step` counts the steps that are done, and is the name
of checkpoints and the x of every curve. JAX is imported after the command line is understood,
because that takes seconds that a typo or `--help` should not cost.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack

from jaxgpt import cli, report, resume
from jaxgpt.config import Config, flat_values, with_fields
from jaxgpt.console import RunConsole, waiting
from jaxgpt.data.benchmarks import load_benchmarks
from jaxgpt.data.loader import WindowLoader, evaluation_windows, prefetch
from jaxgpt.data.manifest import check_manifest
from jaxgpt.data.shards import TokenStream
from jaxgpt.data.sources import open_split
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.errors import UserError, out_of_memory_in_words
from jaxgpt.hardware import device as hardware
from jaxgpt.hardware.gpus import visible_card
from jaxgpt.presets import preset_for_memory
from jaxgpt.pretrained import load_start, start_from
from jaxgpt.resolve import resolve
from jaxgpt.training.lock import RunLock
from jaxgpt.training.metrics import MetricsLog
from jaxgpt.training.stalls import StallWatch
from jaxgpt.training.stopping import LEFT_AT_ONCE, StopRequest

PROG = "python -m jaxgpt.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        cfg = cli.parse(
            argv,
            prog=PROG,
            description="Train a GPT. The same command resumes a run that was stopped.",
            default_preset=preset_of_this_machine,
        )
        assert cfg.out_dir is not None
        with StopRequest() as stop, RunLock(cfg.out_dir) as lock:
            return run(cfg, argv, stop, lock)
    except UserError as fault:
        cli.fail(PROG, str(fault))
    except KeyboardInterrupt:  # before anything was begun
        cli.fail(PROG, "interrupted", code=LEFT_AT_ONCE)


def run(cfg: Config, argv: Sequence[str], stop: StopRequest, lock: RunLock) -> int:
    """Train as `cfg` says, from the start or from the newest checkpoint in its folder."""
    out_dir = cfg.out_dir
    assert out_dir is not None
    saved = resume.load_saved(out_dir, cfg.resume)
    cfg, pretrained = start_from(cfg, saved, cli.flags_of(argv))
    if saved is not None:
        cfg = resume.continue_from(cfg, saved)
    hardware.prepare_environment(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer)
    cfg = resolve(cfg, tokenizer)
    train_tokens, val_tokens, data_identity = load_tokens(cfg, tokenizer)
    loader = WindowLoader(train_tokens, cfg.model.block_size, tokenizer.n_vocab, cfg.seed)
    windows_WT1 = evaluation_windows(
        val_tokens, cfg.model.block_size, cfg.eval_windows or 1, tokenizer.n_vocab
    )
    sources = {"hellaswag": cfg.hellaswag, "lambada": cfg.lambada}
    questions = load_benchmarks(sources, tokenizer, cfg.model.block_size)
    lock.take()  # before JAX takes the card's memory from the run that has the lock
    jax = hardware.import_jax()

    from jaxgpt.hardware.fit import smaller
    from jaxgpt.hardware.preflight import prepare_to_run
    from jaxgpt.model.attention import compute_capability
    from jaxgpt.model.generate import Generator, Sampling
    from jaxgpt.training.benchmarks import score_benchmarks
    from jaxgpt.training.checkpoint import Checkpoints
    from jaxgpt.training.evaluation import evaluate
    from jaxgpt.training.step import Metrics, make_score_step

    device = hardware.choose_device(cfg)
    dtype = hardware.compute_dtype(cfg.dtype, device.platform, compute_capability(device))
    cfg = with_fields(cfg, dtype=dtype)

    with ExitStack() as stack:
        stack.enter_context(jax.default_device(device))
        checkpoints = stack.enter_context(Checkpoints(out_dir, cfg.keep_checkpoints, cli.warn))
        resumed_step = checkpoints.recover(cli.warn, strict=cfg.resume == "must")
        if resumed_step is not None and resumed_step >= cfg.max_iters:
            report.print_finished_before(cfg, PROG, argv, resumed_step, checkpoints.best)
            return 0
        stack.enter_context(out_of_memory_in_words(lambda: smaller(cfg)))
        with waiting("compiling the training step"):
            cfg, training, need = prepare_to_run(cfg, device)
        accumulation = cfg.gradient_accumulation_steps or 1
        generator = Generator(
            training.graphdef, cfg.model.block_size, Sampling(), chunk=cfg.sample_tokens
        )
        score_step = jax.jit(make_score_step(training.graphdef))
        report.print_run(
            cfg, loader, len(windows_WT1), device, training.attention, need, resumed_step
        )
        report.print_changes(resume.changes(cfg, saved) if saved else [])
        if resumed_step is None:
            state = training.init()
            if pretrained is not None:
                jax.tree.map(lambda x: x.delete(), state.params)  # room for the others
                params = load_start(pretrained, cfg.model.block_size, device)
                state = state._replace(params=params)
        else:
            restored = checkpoints.restore(resumed_step, training.state_like)
            resume.check_config(cfg, restored.config, str(checkpoints.folder))
            resume.check_data(restored.data, data_identity, out_dir)
            state = restored.state

        step = resumed_step or 0
        log = stack.enter_context(MetricsLog(out_dir, resumed_step, cli.warn))
        resume.save_config(cfg, out_dir)
        log.hparams(flat_values(cfg), metrics=("val/loss",))
        batches = stack.enter_context(
            prefetch(lambda i: loader.batch(i, accumulation, cfg.batch_size), step, cfg.max_iters)
        )
        console = stack.enter_context(RunConsole(step, cfg.max_iters, cfg.eval_interval))
        reporter = report.Reporter(cfg, device, log, console, int(state.skipped))
        watch = stack.enter_context(StallWatch())

        def evaluate_now() -> dict[str, float]:
            loss = evaluate(training.eval_step, state.params, windows_WT1, cfg.batch_size)
            scores = score_benchmarks(
                questions, score_step, state.params, cfg.model.block_size, cfg.batch_size
            )
            figures = report.benchmark_scalars(scores)
            said = "".join(f"  {name} {value:.4f}" for name, value in figures.items())
            console.say(f"step {step:,}  validation loss {loss:.4f}{said}")
            return {"val/loss": loss, **figures}

        def save_now(val_loss: float | None) -> None:
            log.flush()  # first, so that a checkpoint's metrics are never missing
            checkpoints.save(state, config=flat_values(cfg), data=data_identity, val_loss=val_loss)

        def sample_now() -> str:
            key = jax.random.fold_in(state.key, state.step)
            prompt, length = [tokenizer.eot], cfg.sample_tokens
            tokens_1L = generator.generate(state.params, prompt, length, key, samples=1)
            return tokenizer.decode(tokens_1L[0])

        text = ""
        if resumed_step is None:
            evaluated = evaluate_now()
            log.scalars(step, evaluated)
            save_now(evaluated["val/loss"])
            checkpoints.wait()  # whoever cannot save is told before hours are spent
        unread: Metrics | None = None
        watch.begin("step")
        for tokens_ABT1 in batches:
            if stop.name and unread is None:  # nothing has been done since the last save
                checkpoints.wait()
                console.say(f"{stop.name}: saved step {step:,}; the same command goes on from here")
                return 0
            state, metrics = training.train_step(state, tokens_ABT1)
            if unread is not None:  # the step before's: reading them now, the device has work
                reporter.log_if_due(step, reporter.read(step, unread))
            step, unread = step + 1, metrics

            evaluate_due = step % cfg.eval_interval == 0 or step == cfg.max_iters
            save_due = checkpoints.minutes_since_save() >= cfg.checkpoint_minutes or stop.save_now
            checkpoints.poll()
            if not (evaluate_due or save_due or stop.name):
                watch.begin("step")
                continue
            watch.begin("evaluation" if evaluate_due else "save")
            scalars, unread = reporter.read(step, unread), None
            if evaluate_due:
                evaluated = evaluate_now()
                log.scalars(step, {**scalars, **evaluated})
                if cfg.sample_tokens:
                    text = sample_now()
                    log.text(step, "sample", text)
            else:
                reporter.log_if_due(step, scalars)
            if stop.save_now:
                console.say(f"SIGUSR1: saving step {step:,}")
                stop.save_now = False
            save_now(evaluated["val/loss"] if evaluate_due else None)
            reporter.leave_out_pause(evaluate_due)
            watch.begin("step")
        checkpoints.close()  # before anyone is told that it is done
        console.stop()
        report.print_finished(cfg, PROG, argv, evaluated["val/loss"], checkpoints.best, text)
    return 0


def preset_of_this_machine() -> str | None:
    """The tier of the card that a run would get, None without one."""
    card = visible_card()
    return preset_for_memory(card.memory_bytes / 2**30) if card else None


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
