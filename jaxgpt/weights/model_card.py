"""The model card of an exported run: README.md in the folder or in the Hub's repository."""

import json
from pathlib import Path
from typing import Any

from jaxgpt.config.fields import names_with
from jaxgpt.config.mixture import Mixture
from jaxgpt.config.resolved import Resolved
from jaxgpt.config.roles import Role
from jaxgpt.data.tokenizer_files import SAME_AS_GPT2
from jaxgpt.weights.huggingface import format_of
from jaxgpt.weights.source import Weights

CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [{model_type}, jaxgpt]
---

# A {title} trained with jaxgpt

| | |
|---|---|
{rows}

A language model that continues text. It has not been trained to follow instructions, and repeats \
the errors and biases of its training text.

## Training configuration

```json
{settings}
```
"""


def model_card(
    weights: Weights, run: Resolved, data: dict[str, Any], library: str = "transformers"
) -> str:
    """What the model is, its training data, its validation loss, and every setting of the run.

    `data` is the checkpoint's record of the token files: train_tokens and val_tokens. `library` is
    what the Hub shows as the way to load the model.
    """
    m, step, tokenizer = weights.model, weights.step or 0, _without_folder(run.tokenizer)
    form = format_of(m)
    loss = "not evaluated at this step"

    def counts(kind: str) -> list[int]:
        return [count for name, count in data.items() if name.endswith(kind)]  # of each source

    if weights.val_loss is not None:
        windows = sum(min(run.eval_windows, (n - 1) // m.block_size) for n in counts("val_tokens"))
        loss = f"{weights.val_loss:.4f} nats per token on {windows:,} windows"
    stages = _stages(run.asked.mixture)
    source = "; ".join(f"from step {at:,} {text}" if at else text for at, text in stages)
    source += " (token files)"
    if not any(run.asked.mixture.folders.values()):
        source = "the four Jane Austen novels that come with jaxgpt"
    rows = {
        "parameters": f"{m.parameter_count(padding=False):,}",
        "architecture": f"{form.title}: {m.n_layer} layers, {m.n_head} heads, width {m.n_embd}, "
        f"context {m.block_size}, {form.describe(m)}",
        "started from": _without_folder(run.init_from) or "random weights",
        "data": f"{source}, {sum(counts('train_tokens')):,} {tokenizer} tokens",
        "trained on": f"{step * run.tokens_per_step:,} tokens in {step:,} steps",
        "validation loss": loss,
    }
    if weights.tokenizer.name in SAME_AS_GPT2:
        rows["tokenizer"] = "GPT-2's, by OpenAI under its Modified MIT License"
    settings = {k: v for k, v in run.flat().items() if k not in names_with(Role.LOCAL)}
    settings |= {name: _without_folder(settings[name]) for name in ("preset", "init_from")}
    settings["tokenizer"] = tokenizer
    settings |= {"dataset": stages[0][1], "mixture_at": stages[1:]}
    return CARD.format(
        library=library,
        model_type=form.model_type,
        title=form.title,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        settings=json.dumps(settings, indent=2),
    )


def _stages(mixture: Mixture) -> list[tuple[int, str]]:
    """The steps at which stages begin, and their mixtures without folders of this machine."""
    labels = mixture.labels
    return [
        (start, ",".join(f"{labels[name]}:{float(x):.4g}" for name, x in shares.items()))
        if len(shares) > 1
        else (start, labels[next(iter(shares))])
        for start, shares in mixture.stages
    ]


def _without_folder(name: str | None) -> str | None:
    # The folders of this machine mean nothing to a reader.
    return Path(name).name if name and Path(name).is_absolute() else name
