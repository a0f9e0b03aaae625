"""A run's evaluations: validation loss, tasks, and a sampled text."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxgpt.data.loader import window_numbers
from jaxgpt.model.generate import Generator, Sampling
from jaxgpt.training.evaluation import evaluate, window_losses
from jaxgpt.training.scoring import score_tasks

if TYPE_CHECKING:
    from jaxgpt.run.opening import Data
    from jaxgpt.run.preflight import Compiled
    from jaxgpt.training.step import TrainState


class Evaluator:
    """Evaluates a run's state on its own data, on all of its devices."""

    def __init__(self, compiled: "Compiled", data: "Data"):
        cfg, training, layout = compiled.cfg, compiled.training, compiled.layout
        self._data, self._block_size = data, cfg.model.block_size
        self._micro_batch, self._effective_batch = cfg.batch.global_micro_batch, cfg.batch.effective
        self._shares, self._labels = cfg.asked.mixture.stages[0].shares, cfg.asked.mixture.labels
        self._eval_step = layout.with_sharded_batch(training.eval_step)
        self._score_step = layout.with_sharded_batch(training.score_step)
        self._sample_tokens = cfg.asked.sample_tokens
        self._generator = Generator(
            training.graphdef,
            self._block_size,
            Sampling(),
            chunk=self._sample_tokens,
            jit_options=layout.jit_options(),
        )

    def scores(self, state: "TrainState") -> dict[str, float]:
        """The validation loss, as 'val/loss', and the tasks' figures.

        Of a mixture, 'val/loss' is the mean over the sources of its first stage by their shares,
        and 'val/loss/NAME' each one's own.
        """
        data, params = self._data, state.params
        losses = {
            name: evaluate(self._eval_step, params, windows_WT1, self._micro_batch)
            for name, windows_WT1 in data.validation.items()
        }
        # Of the first stage, so that the losses of all stages can be compared.
        mean = sum(float(share) * losses[name] for name, share in self._shares.items())
        by_source = {f"val/loss/{self._labels[name]}": x for name, x in losses.items()}
        scores = score_tasks(
            data.tasks, self._score_step, params, self._block_size, self._micro_batch
        )
        by_source = by_source if len(losses) > 1 else {}
        figures = {
            f"{task}/{name}": figure.value
            for task, of_task in scores.items()
            for name, figure in of_task.items()
        }
        return {"val/loss": mean, **by_source, **figures}

    def losses_of_step(self, state: "TrainState", step: int) -> dict[str, float]:
        """The loss of each source's windows in a mixture's step, by 'loss/NAME', before the step.

        It costs a forward pass, without dropout. Nothing for a single source, whose loss the step
        returns.
        """
        loader = self._data.loader
        if len(loader.names) == 1:
            return {}
        numbers = window_numbers(step, 1, self._effective_batch)[0]
        losses_W = window_losses(
            self._eval_step, state.params, loader.read(numbers), self._micro_batch
        )
        source_W, _ = loader.locate(numbers)
        return {
            f"loss/{self._labels[loader.names[source]]}": float(losses_W[source_W == source].mean())
            for source in np.unique(source_W)
        }

    def sample(self, state: "TrainState") -> str:
        """A text of sample_tokens tokens, different at each step; '' if sample_tokens is 0."""
        if not self._sample_tokens:
            return ""
        key = jax.random.fold_in(state.key, state.step)
        tokenizer = self._data.tokenizer
        tokens_1L = self._generator.generate(
            state.params, [tokenizer.eot], self._sample_tokens, key, samples=1
        )
        return tokenizer.decode(tokens_1L[0])
