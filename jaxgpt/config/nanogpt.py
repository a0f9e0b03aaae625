"""Answers to settings that only nanoGPT has, or that it spells differently."""

# Settings of nanoGPT that mean nothing here, and what to use instead.
NANOGPT_SETTINGS = {
    "compile": "drop it: every step is compiled by XLA",
    "wandb_log": "drop it: curves go to TensorBoard files and metrics.jsonl in the run's folder",
    "wandb_project": "drop it: curves go to TensorBoard files in the run's folder",
    "wandb_run_name": "use --out-dir: a run is named by its folder",
    "always_save_checkpoint": (
        "drop it: every evaluation saves a checkpoint; --keep-checkpoints N says how many of the "
        "newest are kept besides the best"
    ),
    "eval_only": "drop it: every run evaluates at step 0, at each --eval-interval and at its end",
    "backend": "drop it: XLA chooses its own collectives",
}


def nanogpt_answer(setting: str, value: object) -> str | None:
    """What to use instead of a setting that only nanoGPT has; None for one that exists here."""
    if setting in NANOGPT_SETTINGS:
        return f"is nanoGPT's and has no meaning here; {NANOGPT_SETTINGS[setting]}"
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


def config_file_answer(argument: str) -> str | None:
    """What to use instead of one of nanoGPT's config files; None for any other argument."""
    if not argument.endswith(".py"):
        return None
    return f"{argument}: nanoGPT's config files are Python; here they are TOML: --preset my.toml"
