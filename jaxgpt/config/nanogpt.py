"""Error messages for settings of nanoGPT and others that have another name here, or none."""

# Settings of nanoGPT that have no effect here, and what to use instead.
NANOGPT_SETTINGS = {
    "compile": "drop it: every step is compiled by XLA",
    "wandb_log": "use --wandb-project NAME, which logs to Weights & Biases too",
    "wandb_run_name": "use --out-dir: a run is named by its folder",
    "always_save_checkpoint": (
        "drop it: every evaluation saves a checkpoint; --keep-checkpoints N says how many of the "
        "newest are kept besides the best"
    ),
    "eval_only": (
        "use python -m jaxgpt.evaluate; every run evaluates at step 0, at each --eval-interval "
        "and at its end"
    ),
    "backend": "drop it: XLA chooses its own collectives",
}


# Settings that other programs have, and their names here.
OTHER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "micro_batch_size": "batch_size",
    "total_batch_size": "effective_batch_size",
    "global_batch_size": "effective_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "steps": "max_iters",
    "max_steps": "max_iters",
    "num_iterations": "max_iters",
    "warmup_steps": "warmup_iters",
    "seq_len": "block_size",
    "max_seq_len": "block_size",
    "context_length": "block_size",
    "output_dir": "out_dir",
    "config": "preset",
}
EPOCHS = ("epochs", "num_epochs", "num_train_epochs")


def nanogpt_answer(setting: str, value: object) -> str | None:
    """What to use instead of a setting of another program; None for one that may exist here."""
    if setting in NANOGPT_SETTINGS:
        return f"is nanoGPT's and has no meaning here; {NANOGPT_SETTINGS[setting]}"
    if setting in OTHER_NAMES:
        return f"is called {OTHER_NAMES[setting]} here"
    if setting in EPOCHS:
        return (
            "is counted in optimizer steps here: max_iters = epochs x tokens of the data / "
            "(effective_batch_size x block_size)"
        )
    if setting == "init_from" and value in ("resume", "scratch"):
        return (
            "is nanoGPT's; drop it: the same command resumes a run from its --out-dir, and a new "
            "--out-dir starts from scratch"
        )
    if setting == "device" and isinstance(value, str) and value.startswith(("cuda", "mps")):
        return (
            "is nanoGPT's; here it is gpu (CUDA_VISIBLE_DEVICES=N chooses among several), cpu or "
            "auto"
        )
    return None
