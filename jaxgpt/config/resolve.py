"""What a configuration leaves to follow from the tokenizer, filled in once by each command."""

from jaxgpt.config.fields import Config, with_fields
from jaxgpt.data.tokenizer import Tokenizer, padded_vocab_size


def resolve(cfg: Config, tokenizer: Tokenizer) -> Config:
    """`cfg` with the fields that were left to follow from the tokenizer and from each other."""
    return with_fields(
        cfg,
        n_vocab=tokenizer.n_vocab,
        vocab_size=cfg.model.vocab_size or padded_vocab_size(tokenizer.n_vocab),
        lr_decay_iters=cfg.optimizer.lr_decay_iters or cfg.max_iters,
        gradient_accumulation_steps=cfg.effective_batch_size // cfg.held_at_once,
    )
