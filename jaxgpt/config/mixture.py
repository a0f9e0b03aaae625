"""Which datasets a run reads, how much of each, and where they are.

`--dataset fineweb:0.7,mine:0.3` is a mixture; `fineweb` alone is one of a single source. The shares
are fractions, because a sum of floats would depend on the version of Python.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from jaxgpt.config.checks import ConfigError
from jaxgpt.files import user_path

EMBEDDED = "embedded"  # the text in the package
CYCLE = 100_000  # windows after which the shares are met exactly; no share may be below 1/CYCLE
# Lazy, so that a name may contain ':' and ',' itself.
ITEM = re.compile(r"\s*(.+?)\s*:\s*([\d.]+(?:[eE]-?\d{1,2})?)\s*(?:,|$)")

Shares = Mapping[str, Fraction]  # of each source, by its name; their sum is 1


class Stage(NamedTuple):
    """The shares from a step on."""

    start: int
    shares: Shares


class End(NamedTuple):
    """Where a run ends because a source does."""

    step: int
    source: str  # its name in the mixture


class Mixture(NamedTuple):
    """The sources of a run and their shares."""

    folders: dict[str, Path | None]  # by name, in the order they are named; None: embedded
    stages: list[Stage]  # the first begins at step 0

    @property
    def has_several(self) -> bool:
        """Whether there is more than one source."""
        return len(self.folders) > 1

    @property
    def labels(self) -> dict[str, str]:
        """The name to show for each source: the last part of its path, numbered if two agree."""
        labels = {n: path.absolute().name if path else n for n, path in self.folders.items()}
        if len({*labels.values()}) == len(labels):
            return labels
        return {n: f"{place} {label}" for place, (n, label) in enumerate(labels.items(), 1)}


def make_mixture(
    dataset: str, data_dir: Path | None, mixture_at: Sequence[tuple[int, str]] = ()
) -> Mixture:
    """The mixture that these settings ask for; `data_dir` is where a single `dataset` is.

    Raises:
        ConfigError: with every error.
    """
    errors: list[str] = []
    stages: list[Stage] = []
    for step, text in ((0, dataset), *mixture_at):
        if stages and step <= stages[-1].start:
            errors.append(
                f"mixture_at {step}: stages begin after step 0, each later than the one before"
            )
        try:
            alone = {text: Fraction(1)}
            stages.append(Stage(step, alone if data_dir and not step else parse_shares(text)))
        except ConfigError as error:
            errors.append(str(error))
    if data_dir and data_dir != folder_of(dataset) and "," in dataset and ITEM.match(dataset):
        errors.append(
            f"data_dir {data_dir} is not read with the mixture {dataset!r}; name its folders there"
        )
    if errors:
        raise ConfigError("\n".join(errors))
    names = dict.fromkeys(name for stage in stages for name in stage.shares)
    folders = {name: folder_of(name) for name in names}
    return Mixture(folders | ({dataset: data_dir} if data_dir else {}), stages)


def parse_shares(text: str) -> Shares:
    """The share of each source in `text`, NAME:WEIGHT,NAME:WEIGHT,... or one NAME.

    An existing folder of exactly that name is one source.

    Raises:
        ConfigError: if it is neither, a source is named twice, or a share is below 1/CYCLE.
    """
    if is_one_source(text):
        return {text: Fraction(1)}
    weights: dict[str, Fraction] = {}
    position = 0
    while position < len(text):
        item = ITEM.match(text, position)
        try:
            name, weight = (item[1], Fraction(item[2])) if item else ("", Fraction(0))
        except ValueError:  # such as 1.2.3
            name = ""
        if not item or not name or name in weights:
            raise ConfigError(
                f"mixture {text!r}: expected NAME:WEIGHT,NAME:WEIGHT,... with each name once, and "
                f"{folder_of(text)} is not a folder"
            )
        weights[name] = weight
        position = item.end()
    total = sum(weights.values())
    if low := [name for name, weight in weights.items() if weight * CYCLE < total or not weight]:
        raise ConfigError(
            f"mixture {text!r}: {low[0]} has less than 1/{CYCLE:,} of the windows; leave it "
            "out, or give it a larger weight"
        )
    return {name: weight / total for name, weight in weights.items()}


def is_one_source(dataset: str) -> bool:
    """Whether a --dataset names one source, not a mixture."""
    folder = folder_of(dataset)
    return folder is None or folder.is_dir() or not re.search("[:,]", dataset)


def folder_of(name: str) -> Path | None:
    """A source's folder: data/NAME, or the path NAME if only that exists; None if embedded."""
    if name == EMBEDDED:
        return None
    under_data = Path("data") / name
    if "/" in name and not under_data.is_dir():
        path = user_path(name, "--dataset")
        return path if path.is_dir() else under_data
    return under_data
