"""What a run opens before it trains: its earlier state, its data, its devices.

Shared by `train` and `bench`. Everything but `find_devices` happens before JAX is imported.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config
from jaxgpt.config.mesh_shape import choose_mesh
from jaxgpt.config.resolved import Origin, Resolved, choose_dtype, decay_end, resolve
from jaxgpt.data.loader import WindowLoader, evaluation_windows
from jaxgpt.data.manifest import check_manifest, load_manifest
from jaxgpt.data.sources import open_split
from jaxgpt.data.task import Question
from jaxgpt.data.tasks import load_tasks
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.run import device as hardware
from jaxgpt.run.folder import check_same_run, load_saved
from jaxgpt.weights.init_from import find_origin
from jaxgpt.weights.source import Weights


class Data(NamedTuple):
    """What a run reads."""

    tokenizer: Tokenizer
    loader: WindowLoader  # of the training split
    windows_WT1: np.ndarray  # of the validation split
    tasks: Mapping[str, Sequence[Question]]  # scored at each evaluation
    identity: dict[str, int | str]  # distinguishes this data from other data


def open_run(asked: Config, given: Collection[str]) -> tuple[Origin, Weights | None]:
    """Where the run's model comes from, and the weights to load if it is new.

    Args:
        asked: what argv and TOML say; its out_dir is set.
        given: names of the flags in argv.

    Raises:
        UserError: if out_dir holds another run or cannot be used, there are no such weights, or the
            last steps would have a learning rate of zero.
    """
    assert asked.out_dir is not None
    saved = load_saved(asked.out_dir, asked.resume)
    origin, weights = find_origin(asked, saved, given)
    if weights is None and "tokenizer" not in given:
        name = saved.tokenizer if saved else origin_of_data(asked, given).tokenizer
        origin = dataclasses.replace(origin, tokenizer=name)
    if saved is not None:
        check_same_run(asked, origin)
    _check_decay_end(asked, saved)
    return origin, weights


def _check_decay_end(asked: Config, saved: Resolved | None) -> None:
    """Raises ConfigError if the learning rate falls to zero before the run ends."""
    end = decay_end(asked, saved)
    if asked.optimizer.decay_lr and not asked.optimizer.min_lr and end < asked.max_iters:
        raise ConfigError(
            f"the learning rate is 0 from step {end:,} on (lr_decay_iters, with min_lr 0), so the "
            f"steps up to max_iters {asked.max_iters:,} would train nothing; give "
            f"--lr-decay-iters {asked.max_iters}, or a --min-lr above 0"
        )


def origin_of_data(asked: Config, given: Collection[str]) -> Origin:
    """The origin of a new run: its tokenizer is the data's if no flag names one."""
    origin = Origin.of(asked)
    name = None if "tokenizer" in given else _tokenizer_of_data(asked)
    return origin if name is None else dataclasses.replace(origin, tokenizer=name)


def _tokenizer_of_data(asked: Config) -> str | None:
    """The name of the tokenizer in the data's manifest, None without one."""
    if asked.data_dir is None or asked.dataset == "embedded":
        return None
    manifest = load_manifest(asked.data_dir)
    return manifest.tokenizer.name if manifest else None


def find_tokenizer(asked: Config, origin: Origin) -> Tokenizer:
    """The tokenizer of a run, from the run's folder or the data's if they have a copy of it."""
    folders = [asked.out_dir] if origin.saved and asked.out_dir else []
    if asked.data_dir is not None and _tokenizer_of_data(asked) == origin.tokenizer:
        folders.append(asked.data_dir)
    return load_tokenizer(origin.tokenizer, *folders)


def open_data(asked: Config, origin: Origin, tokenizer: Tokenizer | None = None) -> Data:
    """The training and the validation split and the evaluation tasks, checked.

    `tokenizer`: that of the weights to start from, if there are any.

    Raises:
        UserError: if any of it is missing, damaged, or made with another tokenizer.
    """
    tokenizer = tokenizer or find_tokenizer(asked, origin)
    model = dataclasses.replace(origin.model, n_vocab=tokenizer.n_vocab)
    if errors := model.errors():  # a vocab_size too small for the tokenizer
        raise ConfigError("\n".join(errors))
    identity: dict[str, int | str] = {}
    data_dir = None if asked.dataset == "embedded" else asked.data_dir
    if data_dir is not None and (fingerprint := check_manifest(data_dir, tokenizer)):
        identity["manifest_fingerprint"] = fingerprint
    block_size = model.block_size
    tokens_wanted = asked.effective_batch_size * block_size * asked.max_iters
    train = open_split(data_dir, "train", tokenizer, tokens_wanted)
    val = open_split(data_dir, "val", tokenizer, tokens_wanted)
    identity["tokenizer_sha256"] = tokenizer.sha256
    identity |= {"train_tokens": len(train), "val_tokens": len(val)}
    identity |= {"train_fingerprint": train.fingerprint(), "val_fingerprint": val.fingerprint()}
    saved = origin.saved
    windows = asked.eval_windows if saved is None else saved.eval_windows
    assert windows is not None, "set by the command line"
    return Data(
        tokenizer=tokenizer,
        loader=WindowLoader(train, block_size, tokenizer.n_vocab, asked.seed),
        windows_WT1=evaluation_windows(val, block_size, windows, tokenizer.n_vocab),
        tasks=load_tasks(vars(asked.tasks), tokenizer, block_size),
        identity=identity,
    )


def find_devices(asked: Config, origin: Origin, n_vocab: int) -> tuple[Resolved, Any]:
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
    return resolve(asked, origin, n_vocab=n_vocab, mesh=mesh, dtype=dtype), layout


def load_step(cfg: Resolved, layout: Any, loader: WindowLoader, step: int) -> Any:
    """The tokens of one step on the devices of `layout`: tokens_ABT1."""
    A, B = cfg.batch.accumulation, cfg.batch.global_micro_batch
    shape_ABT1 = (A, B, cfg.model.block_size + 1)
    return layout.load_batch(shape_ABT1, partial(loader.batch, step, A, B))
