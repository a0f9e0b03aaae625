"""The model card of an exported run: README.md in the folder."""

import json
from pathlib import Path
from typing import Any

from jaxgpt.config.fields import names_with
from jaxgpt.config.resolved import Resolved
from jaxgpt.config.roles import Role
from jaxgpt.data.tokenizer_files import SAME_AS_GPT2
from jaxgpt.weights.source import Weights

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, jaxgpt]
---

# A GPT-2 trained with jaxgpt

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


def model_card(weights: Weights, run: Resolved, data: dict[str, Any]) -> str:
    """What the model is, its training data, its validation loss, and every setting of the run.

    `data` is the checkpoint's record of the token files: train_tokens and val_tokens.
    """
    m, step = weights.model, weights.step or 0
    loss = "not evaluated at this step"
    if weights.val_loss is not None:
        windows = min(run.eval_windows, (data["val_tokens"] - 1) // m.block_size)
        loss = f"{weights.val_loss:.4f} nats per token on {windows:,} windows"
    dataset, source = run.asked.dataset, "the four Jane Austen novels that come with jaxgpt"
    if run.asked.data_dir is not None:  # `dataset` may still be the preset's
        dataset = run.asked.data_dir.absolute().name
        source = f"{dataset} (token files)"
    rows = {
        "parameters": f"{m.parameter_count(padding=False):,}",
        "architecture": f"GPT-2: {m.n_layer} layers, {m.n_head} heads, width {m.n_embd}, context "
        f"{m.block_size}, biases {'yes' if m.bias else 'no (exported as zeros)'}, "
        f"{m.gelu} GELU",
        "started from": _without_folder(run.init_from) or "random weights",
        "data": f"{source}, {data['train_tokens']:,} {run.tokenizer} tokens",
        "trained on": f"{step * run.tokens_per_step:,} tokens in {step:,} steps",
        "validation loss": loss,
    }
    if weights.tokenizer.name in SAME_AS_GPT2:
        rows["tokenizer"] = "GPT-2's, by OpenAI under its Modified MIT License"
    settings = {k: v for k, v in run.flat().items() if k not in names_with(Role.LOCAL)}
    settings |= {name: _without_folder(settings[name]) for name in ("preset", "init_from")}
    settings["dataset"] = dataset
    return CARD.format(
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        settings=json.dumps(settings, indent=2),
    )


def _without_folder(name: str | None) -> str | None:
    # The folders of this machine mean nothing to a reader.
    return Path(name).name if name and Path(name).is_absolute() else name
