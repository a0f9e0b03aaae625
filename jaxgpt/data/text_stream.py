"""Turns token ids into text while they are generated."""

import codecs
from itertools import takewhile

import numpy as np

from jaxgpt.data.tokenizer import Tokenizer


class TextStream:
    """Decodes one text, a few ids at a time, and buffers the bytes of an incomplete character."""

    def __init__(self, tokenizer: Tokenizer, stop_at: int | None):
        self.tokens = 0  # decoded so far, without `stop_at`
        self._tokenizer, self._stop_at = tokenizer, stop_at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids_C: np.ndarray) -> str:
        """The text that the (C,) ids complete; ids from `stop_at` on are dropped."""
        ids = list(takewhile(lambda id: id != self._stop_at, ids_C.tolist()))
        self.tokens += len(ids)
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def end(self) -> str:
        """A replacement character if the text ends within a character, else nothing."""
        return self._decoder.decode(b"", final=True)
