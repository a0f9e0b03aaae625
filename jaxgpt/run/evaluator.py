"""A run's evaluations: validation loss, tasks, and a sampled text."""

from typing import TYPE_CHECKING

import jax

from jaxgpt.model.generate import Generator, Sampling
from jaxgpt.run.report import task_scalars
from jaxgpt.training.evaluation import evaluate
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
        self._micro_batch = cfg.batch.global_micro_batch
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
        """The validation loss, as 'val/loss', and the tasks' figures."""
        data, params = self._data, state.params
        loss = evaluate(self._eval_step, params, data.windows_WT1, self._micro_batch)
        scores = score_tasks(
            data.tasks, self._score_step, params, self._block_size, self._micro_batch
        )
        return {"val/loss": loss, **task_scalars(scores)}

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
