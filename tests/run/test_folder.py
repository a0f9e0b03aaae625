import dataclasses
import os
from pathlib import Path

import pytest
from helpers.checkpoints import sign
from helpers.configs import parse, resolved

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, flat_fields, names_with, with_fields
from jaxgpt.config.mesh_shape import parse_mesh
from jaxgpt.config.resolved import Origin, Resolved, resolve
from jaxgpt.config.roles import Role
from jaxgpt.run.folder import (
    CONFIG_FILE,
    changes,
    check_checkpoint,
    check_data,
    check_same_run,
    check_stages,
    load_saved,
    save_config,
)
from jaxgpt.run.integrity import MANIFEST

# What was asked of a run, and what became of it.
ASKED = with_fields(
    Config(preset="mine", max_iters=100, batch_size=6, effective_batch_size=12, seed=7),
    **dict(n_layer=2, n_head=4, n_embd=16, block_size=8),
    **dict(tokenizer="byte", eval_windows=600),
    **dict(out_dir=Path("runs/mine"), data_dir=Path("data/fineweb")),
)
SAVED = resolved(ASKED, n_vocab=50, vocab_size=64)
# Another value than above for each field that is part of a run's identity.
OTHER_RUN = dict(n_layer=3, n_head=2, n_embd=32, block_size=16, bias=True, vocab_size=128)
OTHER_RUN |= dict(dataset="other", tokenizer="gpt2", seed=8, effective_batch_size=24, eval_iters=3)
OTHER_RUN |= dict(gelu="erf", init_from="gpt2", state_dtype="bfloat16", optimizer="muon")
# The same for fields that only the modern networks have, and a run of these.
OTHER_MODERN_RUN = dict(
    arch="llama", n_kv_head=2, head_dim=8, mlp_width=96, rope_theta=5e5, norm_eps=1e-5
)
OTHER_MODERN_RUN |= dict(tied_head=True, zero_init=True, embedding_norm=True)
ASKED_MODERN = with_fields(ASKED, arch="qwen3", tied_head=False)
SAVED_MODERN = resolved(ASKED_MODERN, n_vocab=50, vocab_size=64)
# And for each that may change.
SAME_RUN = (
    dict(preset="my.toml", max_iters=200, lr_decay_iters=150, decay_lr=False, learning_rate=2e-3)
    | dict(min_lr=1e-5, warmup_iters=5, weight_decay=0.2, beta1=0.8, beta2=0.95, grad_clip=0.5)
    | dict(embedding_lr=0.01, head_lr=2e-3, vector_lr=0.02, schedule="wsd", cooldown_fraction=0.4)
    | dict(weight_decay_schedule="lr", cautious_weight_decay=True, momentum_warmup_iters=30)
    | dict(dropout=0.1, batch_size=4, eval_interval=7, log_interval=2, scan_layers=True)
    | dict(mesh="data=2", skip_spikes=6.0, resume="must", deterministic=True)
    | dict(checkpoint_minutes=1.0, keep_checkpoints=5, sample_tokens=0, out_dir=Path("moved"))
    | dict(wandb_project="books", at_end="stop")
    | dict(data_dir=Path("there"), device="cpu", dtype="bfloat16", remat="full", vram_gb=24)
    | dict(hellaswag="val.jsonl", lambada="datasets", mixture_at=[[40, "a:1,b:1"]])
)


def origin_of(asked: Config, saved: Resolved = SAVED) -> Origin:
    return dataclasses.replace(Origin.of(asked), init_from=asked.init_from, saved=saved)


def resume(asked: Config, saved: Resolved = SAVED) -> Resolved:
    """The run that is resumed, after the check."""
    origin = origin_of(asked, saved)
    check_same_run(asked, origin)
    n_vocab = saved.model.n_vocab or 0
    mesh = parse_mesh(asked.mesh)
    return resolve(asked, origin, n_vocab=n_vocab, mesh=mesh, dtype="float32")


def refusal(asked: Config, saved: Resolved = SAVED) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        resume(asked, saved)
    return str(refused.value).splitlines()


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has got to a checkpoint."""
    out_dir = tmp_path / "run"
    save_config(moved_to(out_dir))
    add_checkpoint(out_dir, 10, moved_to(out_dir))
    return out_dir


def moved_to(out_dir: Path, **fields) -> Resolved:
    """SAVED in another folder."""
    return dataclasses.replace(SAVED, asked=with_fields(SAVED.asked, out_dir=out_dir, **fields))


def add_checkpoint(out_dir: Path, step: int, cfg: Resolved = SAVED) -> Path:
    """What a checkpoint is without its arrays."""
    folder = out_dir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    sign(folder, **cfg.flat())
    return folder


# ---------------------------------------------------------------- the same run or another


def test_every_field_either_may_change_or_makes_another_run():
    found = {"n_vocab", "eval_windows", "gradient_accumulation_steps"}
    other = OTHER_RUN.keys() | OTHER_MODERN_RUN.keys()
    assert other | SAME_RUN.keys() | found == flat_fields().keys()
    assert other == names_with(Role.FIXED) - {"n_vocab"}
    assert SAME_RUN.keys() == names_with(Role.TUNABLE) - {"gradient_accumulation_steps"}


def test_a_run_resumes_with_the_same_configuration():
    assert resume(ASKED).flat() == SAVED.flat()


@pytest.mark.parametrize("name", sorted(SAME_RUN.keys() - {"dtype"}))
def test_what_may_change_is_taken_from_the_command_line(name):
    changed = resume(with_fields(ASKED, **{name: SAME_RUN[name]})).flat()
    value = SAME_RUN[name] if name != "mesh" else "data=2,fsdp=1"
    assert changed[name] == (str(value) if isinstance(value, Path) else value)
    assert changed[name] != SAVED.flat()[name]


@pytest.mark.parametrize("name", sorted(OTHER_RUN.keys() | OTHER_MODERN_RUN.keys()))
def test_what_makes_another_run_is_refused_with_both_values(name):
    asked, saved = (ASKED, SAVED) if name in OTHER_RUN else (ASKED_MODERN, SAVED_MODERN)
    value = (OTHER_RUN | OTHER_MODERN_RUN)[name]
    first, columns, *rows = refusal(with_fields(asked, **{name: value}), saved)
    assert first.startswith("runs/mine has another run; ")
    assert "--out-dir" in first
    assert columns.split() == ["the", "run", "asked", "for"]
    assert [row.split() for row in rows] == [[name, str(saved.flat()[name]), str(value)]]


def test_every_difference_is_in_the_table():
    rows = refusal(with_fields(ASKED, **OTHER_RUN))[2:]
    assert sorted(row.split()[0] for row in rows) == sorted(OTHER_RUN)


# ---------------------------------------------------------------- what a run keeps


def test_training_longer_keeps_the_end_of_the_decay_unless_the_flag_moves_it():
    argv = ["--preset=demo", "--max-iters=4000"]
    saved = resolved(parse(["--preset=demo"]), n_vocab=257, lr_decay_iters=2000)
    assert resume(parse(argv), saved).optimizer.lr_decay_iters == 2000
    moved = resume(parse([*argv, "--lr-decay-iters=4000"]), saved)
    assert (moved.optimizer.lr_decay_iters, moved.asked.max_iters) == (4000, 4000)


def test_a_run_keeps_its_vocabulary_unless_it_is_given():
    saved = resolved(parse(["--preset=demo", "--vocab-size=512"]), n_vocab=257)
    assert resume(parse(["--preset=demo"]), saved).model.vocab_size == 512
    (row,) = refusal(parse(["--preset=demo", "--vocab-size=320"]), saved)[2:]
    assert row.split() == ["vocab_size", "512", "320"]


def test_a_run_keeps_its_evaluation_windows_whatever_is_given():
    saved = resolved(parse(["--preset=demo"]), n_vocab=257)
    assert saved.eval_windows == 50 * 12
    cfg = resume(parse(["--preset=demo", "--batch-size=6"]), saved)
    assert (cfg.eval_windows, cfg.batch.batch_size) == (600, 6)
    (row,) = refusal(parse(["--preset=demo", "--eval-iters=2"]), saved)[2:]
    assert row.split() == ["eval_iters", "50", "2"]


def test_a_smaller_batch_size_resumes_with_the_same_effective_batch():
    cfg = resume(parse(["--preset=24gb", "--batch-size=8"]), resolved(parse(["--preset=24gb"])))
    assert (cfg.batch.effective, cfg.batch.accumulation) == (512, 64)


def test_other_accumulation_alone_is_another_effective_batch_and_refused():
    asked = parse(["--preset=24gb", "--gradient-accumulation-steps=8"])
    (row,) = refusal(asked, resolved(parse(["--preset=24gb"])))[2:]
    assert row.split() == ["effective_batch_size", "512", "256"]


def test_a_run_resumes_under_another_preset_of_the_same_shape(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("vocab_size = 50304\nmax_iters = 60000\nbatch_size = 64\nbeta1 = 0.9")
    asked = parse(["--preset", str(path), "--out-dir=x"])
    assert resume(asked, resolved(parse(["--preset=80gb"]))).asked.preset == str(path)


# ---------------------------------------------------------------- the run's folder


def test_what_is_saved_is_loaded_again(run):
    assert load_saved(run).flat() == moved_to(run).flat()
    assert [path.name for path in run.iterdir() if path.is_file()] == [CONFIG_FILE]


def test_a_run_without_its_file_is_known_by_its_newest_checkpoint_that_can_be_read(run):
    (run / CONFIG_FILE).unlink()
    assert load_saved(run).flat() == moved_to(run).flat()
    newer = add_checkpoint(run, 20, moved_to(run, max_iters=300))
    assert load_saved(run).asked.max_iters == 300
    (newer / MANIFEST).write_text("{}")
    assert load_saved(run).flat() == moved_to(run).flat()


def test_a_checkpoint_of_another_run_than_the_file_beside_it_is_refused():
    check_checkpoint(SAVED, SAVED.flat(), "checkpoints")
    with pytest.raises(ConfigError, match=r"seed +8 +7"):
        check_checkpoint(SAVED, {**SAVED.flat(), "seed": 8}, "checkpoints")


def test_only_stages_that_a_run_has_not_reached_may_change():
    asked = with_fields(ASKED, mixture_at=((40, "a:1,b:1"), (60, "a")))
    saved = dataclasses.replace(SAVED, asked=asked)
    same = dataclasses.replace(SAVED, asked=with_fields(asked, mixture_at=((40, "a:5,b:5"),)))
    check_stages(same, saved.flat(), 60)
    assert [*changes(same, saved).values()] == [
        "mixture_at [[40, 'a:1,b:1'], [60, 'a']] -> [[40, 'a:5,b:5']]"
    ]
    reordered = dataclasses.replace(SAVED, asked=with_fields(asked, mixture_at=((40, "b:1,a:1"),)))
    for step, cfg in ((61, same), (41, SAVED), (41, reordered)):
        with pytest.raises(ConfigError, match=f"at step {step}, and stages before that cannot"):
            check_stages(cfg, saved.flat(), step)


def test_must_needs_a_run_and_never_a_folder_without_one(run, tmp_path):
    assert load_saved(run, "must").flat() == moved_to(run).flat()
    assert load_saved(tmp_path / "new", "never") is None
    with pytest.raises(ConfigError, match="has a run, saved at step 10, which '--resume never'"):
        load_saved(run, "never")
    with pytest.raises(ConfigError, match="has no finished checkpoint, but '--resume must'"):
        load_saved(tmp_path / "new", "must")


def test_what_has_changed_is_told_with_both_values():
    cfg = resume(with_fields(ASKED, max_iters=200, learning_rate=1e-4, out_dir=Path("moved")))
    assert changes(SAVED, SAVED) == {}
    assert changes(cfg, SAVED) == {
        "max_iters": "max_iters 100 -> 200",
        "learning_rate": "learning_rate 0.0006 -> 0.0001",
    }


@pytest.mark.parametrize("name", ["demo", "24gb"])
def test_a_parsed_configuration_is_saved_whole(tmp_path, name):
    asked = parse(["--preset", name, "--out-dir", str(tmp_path), "--n-layer=3", "--beta2=0.9"])
    cfg = resolved(asked)
    save_config(cfg)
    add_checkpoint(tmp_path, 0)
    assert load_saved(tmp_path).flat() == cfg.flat()


def test_there_is_no_run_before_its_first_checkpoint(tmp_path):
    assert load_saved(tmp_path / "not" / "there") is None
    save_config(moved_to(tmp_path))
    assert load_saved(tmp_path) is None
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)  # half-written
    assert load_saved(tmp_path) is None


def test_a_save_replaces_the_file_and_one_that_fails_leaves_it_and_says_why(run, monkeypatch):
    saved = moved_to(run, max_iters=200)
    save_config(saved)
    assert load_saved(run).flat() == saved.flat()

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        save_config(moved_to(run, max_iters=300))
    assert load_saved(run).flat() == saved.flat()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"n_layers": 3}', '{"n_layer": 0}'])
def test_a_damaged_file_is_answered_with_its_path_and_two_ways_out(run, content):
    (run / CONFIG_FILE).write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_saved(run)
    message = str(refused.value)
    assert message.startswith(str(run / CONFIG_FILE))
    assert f"Delete {run / CONFIG_FILE}" in message
    assert "--out-dir" in message


# ---------------------------------------------------------------- the run's data


def test_other_data_is_refused_with_what_changed(tmp_path):
    saved = {"train_tokens": 1000, "val_tokens": 100}
    check_data({**saved, "more": 3}, saved, tmp_path)
    with pytest.raises(ConfigError) as refused:
        check_data(saved, {"train_tokens": 2000, "val_tokens": 100}, tmp_path)
    message = str(refused.value)
    assert "(train_tokens 1000 -> 2000)" in message
    assert "--data-dir" in message
    assert str(tmp_path) in message
