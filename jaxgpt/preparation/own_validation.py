"""`prepare --val`: validation text that the user names, instead of a part of the training text."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.files import user_path
from jaxgpt.preparation.flags import VAL_RULES, PrepareFlags
from jaxgpt.preparation.inputs import Input, find_inputs, has_splits, saved_dataset, splits_of
from jaxgpt.preparation.work_files import Plan

VAL_SPLITS = ("validation", "valid", "val", "test")


def named_validation(flags: PrepareFlags, old: Plan | None) -> str | None:
    """The validation text that the flags name, else the folder's plan."""
    if old is None or any(getattr(flags, name) is not None for name in ("val", *VAL_RULES)):
        return flags.val
    return old.settings.val


def unused_split(arguments: Sequence[str]) -> Path | None:
    """A validation split beside the split 'train' of an input, if there is one."""
    splits = (Path(a) / name for a in arguments for name in VAL_SPLITS if has_splits(Path(a)))
    return next((path for path in splits if path.is_dir()), None)


def find_text(arguments: Sequence[str], val: str | None) -> list[Input]:
    """The inputs of `find_inputs`, after those of `val`, which are validation and not trained on.

    `val` is a path or pattern, or a split of a save_to_disk folder among the arguments. Raises
    UserError.
    """
    if val is None:
        return find_inputs(arguments)
    dicts = [path for path in (user_path(a, "input") for a in arguments) if has_splits(path)]
    own = [saved_dataset(path / val) for path in dicts if (path / val / "state.json").is_file()]
    if dicts and not own and not user_path(val, "--val").exists():
        raise UserError(
            f"--val {val}: {dicts[0]} has no such split ({', '.join(splits_of(dicts[0]))}), and "
            "there is no such file"
        )
    own = own or find_inputs([val])
    names = {item.path for item in own}
    others = [item for item in find_inputs(arguments) if item.path not in names]
    if not others:
        raise UserError(f"--val {val}: is all of the text; name other text to train on")
    return [*(replace(item, split="val") for item in own), *others]
