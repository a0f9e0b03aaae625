"""The windows of a run that mixes sources: which source each one is from.

As in `loader.py`, there is no state: the source of window k, and which of that source's windows it
is, are a function of k and the shares. Each source is shuffled on its own.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.config.mixture import CYCLE, End, Shares
from jaxgpt.data.loader import GOLDEN, Loader, WindowLoader
from jaxgpt.data.shards import TokenStream


class Cycle(NamedTuple):
    """The sources of CYCLE consecutive windows, which are then repeated."""

    quotas_S: np.ndarray  # windows of each source
    source_C: np.ndarray  # of each window
    rank_C: np.ndarray  # how many windows of the same source are before it

    @classmethod
    def of(cls, shares: Shares, names: Sequence[str]) -> "Cycle":
        """Each source's windows evenly spaced, with quotas that are its share of CYCLE, rounded.

        Among the first n windows a source with share w has w * n, give or take (sources + 1) / 2.
        """
        exact = [shares.get(name, 0) * CYCLE for name in names]
        quotas = [int(x) for x in exact]
        by_remainder = sorted(range(len(names)), key=lambda s: quotas[s] - exact[s])
        for source in by_remainder[: CYCLE - sum(quotas)]:
            quotas[source] += 1
        places = np.concatenate([(np.arange(quota) + 0.5) / max(quota, 1) for quota in quotas])
        order = np.argsort(places, kind="stable")
        ranks = np.concatenate([np.arange(quota) for quota in quotas])
        return cls(np.array(quotas), np.repeat(np.arange(len(names)), quotas)[order], ranks[order])

    def among(self, windows: int) -> np.ndarray:
        """(S,): how many of the first `windows` are of each source."""
        cycles, rest = divmod(windows, CYCLE)
        return cycles * self.quotas_S + np.bincount(
            self.source_C[:rest], minlength=len(self.quotas_S)
        )


class MixtureLoader(Loader):
    """The windows of a run from one source or several, each read as `WindowLoader` reads it.

    A source that ends begins its next epoch.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        stages: Sequence[tuple[int, Shares]],
        block_size: int,
        n_vocab: int,
        seed: int,
    ):
        """`stages`: the window at which each begins, and its shares.

        Raises DataError if a stream is shorter than one window.
        """
        self.names = list(streams)
        self.block_size = block_size
        # The first source is read as if it were the only one, so that others can be added later.
        self.loaders = [
            WindowLoader(tokens, block_size, n_vocab, seed + source * GOLDEN)
            for source, tokens in enumerate(streams.values())
        ]
        self._starts = np.array([start for start, _ in stages], np.uint64)
        self._cycles = [Cycle.of(shares, self.names) for _, shares in stages]
        self._before = [self.count(start) for start, _ in stages]

    def read(self, k: np.ndarray) -> np.ndarray:
        source_W, index_W = self.locate(k)
        some = {s: self.loaders[s].read(index_W[source_W == s]) for s in np.unique(source_W)}
        windows = np.empty((len(k), self.block_size + 1), next(iter(some.values())).dtype)
        for source, read in some.items():
            windows[source_W == source] = read
        return windows

    def locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(W,), (W,): the sources of windows `k` (W,), and which of their windows they are."""
        k = k.astype(np.uint64)
        source_W, index_W = np.empty(len(k), np.int64), np.empty(len(k), np.uint64)
        stage_W = np.searchsorted(self._starts, k, side="right") - 1
        for stage in np.unique(stage_W):
            here, cycle = stage_W == stage, self._cycles[stage]
            turn, place = np.divmod((k[here] - self._starts[stage]).astype(np.int64), CYCLE)
            source = source_W[here] = cycle.source_C[place]
            before = self._before[stage] + turn[:, None] * cycle.quotas_S
            index_W[here] = before[np.arange(len(source)), source] + cycle.rank_C[place]
        return source_W, index_W

    def count(self, windows: int) -> np.ndarray:
        """(S,): how many of the run's first `windows` are of each source."""
        total = np.zeros(len(self.names), np.int64)
        ends = [*self._starts[1:].tolist(), windows]
        for start, end, cycle in zip(self._starts.tolist(), ends, self._cycles, strict=True):
            total += cycle.among(max(0, min(end, windows) - start))
        return total

    def end(self, batch: int, max_iters: int) -> End | None:
        """The last step of `batch` windows before a source repeats; None if none does."""
        limits_S = np.array([loader.windows_per_epoch for loader in self.loaders])

        def repeated_S(steps: int) -> np.ndarray:
            return self.count(steps * batch) > limits_S

        steps = bisect_left(range(max_iters + 1), True, key=lambda n: bool(repeated_S(n).any()))
        if steps > max_iters:
            return None
        return End(steps - 1, self.names[repeated_S(steps).argmax()])

    def epochs(self, windows: int) -> dict[str, float]:
        """How often the run's first `windows` pass through each source, by name."""
        counts = zip(self.names, self.count(windows).tolist(), self.loaders, strict=True)
        return {name: count / loader.windows_per_epoch for name, count, loader in counts}
