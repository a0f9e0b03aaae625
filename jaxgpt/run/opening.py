"""What a run opens before it trains: its earlier state, its data, its devices.

Shared by `train` and `bench`. Everything but `find_devices` happens before JAX is imported.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config
from jaxgpt.config.mesh_shape import choose_mesh
from jaxgpt.config.mixture import End
from jaxgpt.config.resolved import (
    Origin,
    Resolved,
    choose_dtype,
    decay_end,
    last_step,
    resolve,
)
from jaxgpt.data.loader import evaluation_windows
from jaxgpt.data.manifest import check_manifest, load_manifest
from jaxgpt.data.mixture import MixtureLoader
from jaxgpt.data.shards import TokenStream, Wanted
from jaxgpt.data.sources import open_split
from jaxgpt.data.task import Question
from jaxgpt.data.tasks import load_tasks
from jaxgpt.data.token_file import PREPARE, DataError
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.run import device as hardware
from jaxgpt.run.folder import check_same_run, load_saved
from jaxgpt.weights.init_from import find_origin
from jaxgpt.weights.source import Weights


class Data(NamedTuple):
    """What a run reads."""

    tokenizer: Tokenizer
    loader: MixtureLoader  # of the training splits
    end: End | None  # where a source ends, with --at-end stop
    validation: Mapping[str, np.ndarray]  # windows_WT1 of each source's validation split
    tasks: Mapping[str, Sequence[Question]]  # scored at each evaluation
    identity: dict[str, int | str]  # distinguishes this data from other data


def open_run(asked: Config, given: Collection[str]) -> tuple[Origin, Weights | None]:
    """Where the run's model comes from, and the weights to load if it is new.

    Args:
        asked: what argv and TOML say; its out_dir is set.
        given: names of the flags in argv.

    Raises:
        UserError: if out_dir holds another run or cannot be used, or there are no such weights.
    """
    assert asked.out_dir is not None
    saved = load_saved(asked.out_dir, asked.resume)
    origin, weights = find_origin(asked, saved, given)
    if weights is None and "tokenizer" not in given:
        name = saved.tokenizer if saved else origin_of_data(asked, given).tokenizer
        origin = dataclasses.replace(origin, tokenizer=name)
    if saved is not None:
        check_same_run(asked, origin)
    return origin, weights


def origin_of_data(asked: Config, given: Collection[str]) -> Origin:
    """The origin of a new run: its tokenizer is the data's if no flag names one."""
    origin = Origin.of(asked)
    name = None if "tokenizer" in given else _tokenizer_of_data(asked)
    return origin if name is None else dataclasses.replace(origin, tokenizer=name)


def _tokenizer_of_data(asked: Config) -> str | None:
    """The name of the tokenizer in the manifests of the data, None without one.

    Raises:
        DataError: if they have several tokenizers.
    """
    folders = [folder for folder in asked.mixture.folders.values() if folder]
    manifests = {folder: load_manifest(folder) for folder in folders}
    found = {folder: manifest.tokenizer for folder, manifest in manifests.items() if manifest}
    for folder, tokenizer in found.items():
        first, expected = next(iter(found.items()))
        if tokenizer.sha256 != expected.sha256:
            raise DataError(
                f"{folder}: was made with tokenizer {tokenizer.name!r}, but {first} with "
                f"{expected.name!r}, and a mixture needs one for all; prepare one of them again "
                f"with {PREPARE} --tokenizer"
            )
    return next((tokenizer.name for tokenizer in found.values()), None)


def find_tokenizer(asked: Config, origin: Origin) -> Tokenizer:
    """The tokenizer of a run, from the run's folder or the data's if they have a copy of it."""
    folders = [asked.out_dir] if origin.saved and asked.out_dir else []
    if _tokenizer_of_data(asked) == origin.tokenizer:
        folders += [folder for folder in asked.mixture.folders.values() if folder]
    return load_tokenizer(origin.tokenizer, *folders)


def open_data(asked: Config, origin: Origin, tokenizer: Tokenizer | None = None) -> Data:
    """The training and validation splits of every source and the evaluation tasks, checked.

    `tokenizer`: that of the weights to start from, if there are any.

    Raises:
        UserError: if any of it is missing, damaged, or made with another tokenizer; if it ends
            before the first step; or if the last steps would have a learning rate of zero.
    """
    tokenizer = tokenizer or find_tokenizer(asked, origin)
    model = dataclasses.replace(origin.model, n_vocab=tokenizer.n_vocab)
    if errors := model.errors():  # a vocab_size too small for the tokenizer
        raise ConfigError("\n".join(errors))
    identity: dict[str, int | str] = {"tokenizer_sha256": tokenizer.sha256}
    block_size = model.block_size
    saved = origin.saved
    windows = asked.eval_windows if saved is None else saved.eval_windows
    assert windows is not None, "set by the command line"
    streams: dict[str, TokenStream] = {}
    validation: dict[str, np.ndarray] = {}
    for name, folder in asked.mixture.folders.items():
        # The first source's entries have no prefix, so that a run can add sources later.
        prefix = f"{name}: " if streams else ""
        streams[name], val, facts = _open_source(asked, folder, tokenizer)
        validation[name] = evaluation_windows(val, block_size, windows, tokenizer.n_vocab)
        identity |= {prefix + fact: value for fact, value in facts.items()}
    loader = make_loader(asked, streams, block_size, tokenizer.n_vocab)
    end = _find_end(asked, loader)
    _check_decay_end(asked, saved, end)
    return Data(
        tokenizer=tokenizer,
        loader=loader,
        end=end,
        validation=validation,
        tasks=load_tasks(vars(asked.tasks), tokenizer, block_size),
        identity=identity,
    )


def _find_end(asked: Config, loader: MixtureLoader) -> End | None:
    """Where the run ends because a source does; raises ConfigError if that is before one step."""
    if asked.at_end == "repeat":
        return None
    end = loader.end(asked.effective_batch_size, asked.max_iters)
    if end is not None and not end.step:
        raise ConfigError(
            f"at_end stop: {asked.mixture.labels[end.source]} ends within the first step; use "
            "--at-end repeat, prepare more text, or lower --effective-batch-size"
        )
    return end


def _check_decay_end(asked: Config, saved: Resolved | None, end: End | None) -> None:
    """Raises ConfigError if the learning rate falls to zero before the run ends."""
    decayed, last = decay_end(asked, saved, end), last_step(asked, end)
    if asked.optimizer.decay_lr and not asked.optimizer.min_lr and decayed < last:
        raise ConfigError(
            f"the learning rate is 0 from step {decayed:,} on (lr_decay_iters, with min_lr 0), so "
            f"the steps up to {last:,} would train nothing; give --lr-decay-iters {last}, or a "
            "--min-lr above 0"
        )


def _open_source(
    asked: Config, folder: Path | None, tokenizer: Tokenizer
) -> tuple[TokenStream, TokenStream, dict[str, int | str]]:
    """The training and the validation split of a source, and what distinguishes them."""
    facts: dict[str, int | str] = {}
    if folder is not None and (fingerprint := check_manifest(folder, tokenizer)):
        facts["manifest_fingerprint"] = fingerprint
    wanted = Wanted(asked.tokens_per_step * asked.max_iters, asked.mixture.has_several)
    train = open_split(folder, "train", tokenizer, wanted)
    val = open_split(folder, "val", tokenizer, wanted)
    facts |= {"train_tokens": len(train), "val_tokens": len(val)}
    facts |= {"train_fingerprint": train.fingerprint(), "val_fingerprint": val.fingerprint()}
    return train, val, facts


def make_loader(
    asked: Config, streams: Mapping[str, TokenStream], block_size: int, n_vocab: int
) -> MixtureLoader:
    """The training windows of a run, from the sources' streams."""
    windows = asked.effective_batch_size
    stages = [(step * windows, shares) for step, shares in asked.mixture.stages]
    return MixtureLoader(streams, stages, block_size, n_vocab, asked.seed)


def find_devices(
    asked: Config, origin: Origin, n_vocab: int, end: End | None = None
) -> tuple[Resolved, Any]:
    """The run resolved for the devices there are, and their layout; imports JAX.

    Raises:
        ConfigError: if there are none of the kind asked for, or the run does not divide over them.
    """
    devices = hardware.choose_devices(asked)
    from jaxgpt.model.attention import compute_capability
    from jaxgpt.training.sharding import make_layout

    processes = len({device.process_index for device in devices})
    mesh = choose_mesh(asked.mesh, len(devices), processes)
    layout = make_layout(devices, mesh)
    device = layout.device
    dtype = choose_dtype(asked.dtype, device.platform, compute_capability(device))
    return resolve(asked, origin, n_vocab=n_vocab, mesh=mesh, dtype=dtype, end=end), layout


def load_step(cfg: Resolved, layout: Any, loader: MixtureLoader, step: int) -> Any:
    """The tokens of one step on the devices of `layout`: tokens_ABT1."""
    A, B = cfg.batch.accumulation, cfg.batch.global_micro_batch
    shape_ABT1 = (A, B, cfg.model.block_size + 1)
    return layout.load_batch(shape_ABT1, partial(loader.batch, step, A, B))
