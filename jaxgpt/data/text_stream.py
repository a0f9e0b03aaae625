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
        # For a tokenizer whose ids have bytes only in context: the last ids, and how many of them
        # are in the text that was returned.
        self._ids: list[int] = []
        self._returned = 0

    def feed(self, ids_C: np.ndarray) -> str:
        """The text that the (C,) ids complete; ids from `stop_at` on are dropped."""
        ids = list(takewhile(lambda id: id != self._stop_at, ids_C.tolist()))
        self.tokens += len(ids)
        if self._tokenizer.decodes_bytes:
            return self._decoder.decode(self._tokenizer.decode_bytes(ids))
        self._ids += ids
        text = self._new_text()
        if text.endswith("\ufffd"):  # the next id may complete the character
            return ""
        self._ids, self._returned = self._ids[self._returned :], len(self._ids) - self._returned
        return text

    def end(self) -> str:
        """What `feed` has kept: an incomplete character, as a replacement character."""
        if self._tokenizer.decodes_bytes:
            return self._decoder.decode(b"", final=True)
        return self._new_text()

    def _new_text(self) -> str:
        # Decoded after ids that came before, because a tokenizer may drop a text's first space.
        before = self._tokenizer.decode(self._ids[: self._returned])
        return self._tokenizer.decode(self._ids)[len(before) :]
