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
from jaxgpt.console import RunConsole
from jaxgpt.data.loader import WindowLoader, evaluation_windows, fingerprint, prefetch
from jaxgpt.data.shards import TokenStream, load_split
from jaxgpt.data.sources import embedded_tokens
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer, padded_vocab_size
from jaxgpt.errors import UserError
from jaxgpt.hardware import device as hardware
from jaxgpt.hardware.gpus import local_cards
from jaxgpt.presets import preset_for_memory
from jaxgpt.training.lock import RunLock
from jaxgpt.training.metrics import MetricsLog
from jaxgpt.training.stalls import StallWatch
from jaxgpt.training.stopping import LEFT_AT_ONCE, StopRequest

PROG = "python -m jaxgpt.train"
FINGERPRINTED = 256  # windows by which changed training data is noticed


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
    except RuntimeError as fault:  # XLA's among them
        if "RESOURCE_EXHAUSTED" not in str(fault):
            raise
        cli.fail(PROG, out_of_memory(cfg, str(fault)))
    except KeyboardInterrupt:  # before anything was begun
        cli.fail(PROG, "interrupted", code=LEFT_AT_ONCE)


def run(cfg: Config, argv: Sequence[str], stop: StopRequest, lock: RunLock) -> int:
    """Train as `cfg` says, from the start or from the newest checkpoint in its folder."""
    out_dir = cfg.out_dir
    assert out_dir is not None
    saved = resume.load_saved(out_dir, cfg.resume)
    if saved is not None:
        cfg = resume.continue_from(cfg, saved)
    hardware.prepare_environment(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer)
    cfg = resolve(cfg, tokenizer)
    train_tokens, val_tokens = load_tokens(cfg, tokenizer)
    loader = WindowLoader(train_tokens, cfg.model.block_size, tokenizer.n_vocab, cfg.seed)
    windows_WT1 = evaluation_windows(
        val_tokens, cfg.model.block_size, cfg.eval_windows or 1, tokenizer.n_vocab
    )
    data_identity = {
        "train_tokens": len(train_tokens),
        "val_tokens": len(val_tokens),
        "tokenizer_sha256": tokenizer.sha256,
        "sample": fingerprint(loader.windows(0, FINGERPRINTED), windows_WT1),
    }
    accumulation = cfg.gradient_accumulation_steps or 1
    lock.take()  # before JAX takes the card's memory from the run that has the lock
    jax = hardware.import_jax()

    from jaxgpt.model.generate import make_generate
    from jaxgpt.training.build import build_training
    from jaxgpt.training.checkpoint import Checkpoints
    from jaxgpt.training.evaluation import evaluate
    from jaxgpt.training.step import Metrics

    device = hardware.choose_device(cfg)
    cfg = with_fields(cfg, dtype=hardware.compute_dtype(cfg.dtype, device))
    training = build_training(
        cfg.model,
        cfg.optimizer,
        max_iters=cfg.max_iters,
        accumulation=accumulation,
        dtype=cfg.dtype,
        remat=cfg.remat,
        seed=cfg.seed,
        device=device,
        skip_spikes=cfg.skip_spikes,
    )
    generate = make_generate(training.graphdef, cfg.sample_tokens)

    with ExitStack() as stack:
        stack.enter_context(jax.default_device(device))
        checkpoints = stack.enter_context(Checkpoints(out_dir, cfg.keep_checkpoints, cli.warn))
        resumed_step = checkpoints.recover(cli.warn, strict=cfg.resume == "must")
        if resumed_step is not None and resumed_step >= cfg.max_iters:
            report.print_finished_before(cfg, PROG, argv, resumed_step, checkpoints.best)
            return 0
        report.print_run(cfg, loader, len(windows_WT1), device, training.attention, resumed_step)
        report.print_changes(resume.changes(cfg, saved) if saved else [])
        if resumed_step is None:
            state = training.init()
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

        def evaluate_now() -> float:
            loss = evaluate(training.eval_step, state.params, windows_WT1, cfg.batch_size)
            console.say(f"step {step:,}  validation loss {loss:.4f}")
            return loss

        def save_now(val_loss: float | None) -> None:
            log.flush()  # first, so that a checkpoint's metrics are never missing
            checkpoints.save(state, config=flat_values(cfg), data=data_identity, val_loss=val_loss)

        def sample_now() -> str:
            prompt_BP = jax.numpy.full((1, 1), tokenizer.eot)
            key = jax.random.fold_in(state.key, state.step)
            return tokenizer.decode(jax.device_get(generate(state.params, prompt_BP, key))[0, 1:])

        text = ""
        if resumed_step is None:
            val_loss = evaluate_now()
            log.scalars(step, {"val/loss": val_loss})
            save_now(val_loss)
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
                val_loss = evaluate_now()
                log.scalars(step, {**scalars, "val/loss": val_loss})
                if cfg.sample_tokens:
                    text = sample_now()
                    log.text(step, "sample", text)
            else:
                reporter.log_if_due(step, scalars)
            if stop.save_now:
                console.say(f"SIGUSR1: saving step {step:,}")
                stop.save_now = False
            save_now(val_loss if evaluate_due else None)
            reporter.leave_out_pause(evaluate_due)
            watch.begin("step")
        checkpoints.close()  # before anyone is told that it is done
        console.stop()
        report.print_finished(cfg, PROG, argv, val_loss, checkpoints.best, text)
    return 0


def out_of_memory(cfg: Config, fault: str) -> str:
    """What to tell a user whose device is full, from XLA's message of many lines."""
    smaller = f"--batch-size {max(1, cfg.batch_size // 2)} (accumulation doubles by itself)"
    return (
        f"the device's memory is full: {fault.splitlines()[0][:200]}\n"
        f"halve what it holds at a time with {smaller}, compute more again with --remat light or "
        "--remat full, or take a smaller model"
    )


def preset_of_this_machine() -> str | None:
    """The tier of the first card that the driver lists, None without one."""
    cards = local_cards()
    return preset_for_memory(cards[0].memory_bytes / 2**30) if cards else None


def resolve(cfg: Config, tokenizer: Tokenizer) -> Config:
    """`cfg` with the fields that were left to follow from the tokenizer and from each other."""
    return with_fields(
        cfg,
        n_vocab=tokenizer.n_vocab,
        vocab_size=cfg.model.vocab_size or padded_vocab_size(tokenizer.n_vocab),
        lr_decay_iters=cfg.optimizer.lr_decay_iters or cfg.max_iters,
    )


def load_tokens(cfg: Config, tokenizer: Tokenizer) -> tuple[TokenStream, TokenStream]:
    """The training and the validation split, checked."""
    if cfg.dataset == "embedded":
        arrays = embedded_tokens(tokenizer)
        train, val = (TokenStream.from_arrays([arrays[name]]) for name in ("train", "val"))
    else:
        assert cfg.data_dir is not None
        train = load_split(cfg.data_dir, "train", tokenizer.n_vocab)
        val = load_split(cfg.data_dir, "val", tokenizer.n_vocab)
    return train, val


if __name__ == "__main__":
    sys.exit(main())
