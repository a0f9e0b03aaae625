"""Tokens to train on: the embedded text, or the shards in a folder.

The end-of-text token is *before* each document (llm.c's convention), so that it marks where a
document begins, and sampling can start from it.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jaxgpt.data.embedded import load_embedded
from jaxgpt.data.shards import SAMPLE, TokenStream, Wanted, load_split
from jaxgpt.data.tokenizer import Tokenizer

# Between two documents of the embedded text. The novels contain no form feed.
DOCUMENT_SEPARATOR = "\n\f\n"


def load_embedded_documents() -> list[str]:
    """The 166 chapters of four novels by Jane Austen, one document each; 2.2 MB of ASCII.

    Pride and Prejudice (61 chapters), Sense and Sensibility (50), Persuasion (24) and Northanger
    Abbey (31), in this order. A document is its heading, "Chapter 1", and its paragraphs, one line
    each, separated by blank lines; a novel's first chapter begins with its title and author.
    Source and licence: THIRD_PARTY_NOTICES.md.
    """
    return load_embedded("austen.txt.xz").decode().split(DOCUMENT_SEPARATOR)


def split_documents(documents: list[str]) -> dict[str, list[str]]:
    """Every tenth document is 'val', the others are 'train'.

    Complete documents, so that no sentence of a validation chapter is trained on, and from all of
    the text, so that each novel is in both splits. The loss on 'val' therefore measures how well
    the model knows these novels, not English.
    """
    val = documents[9::10]
    train = [document for index, document in enumerate(documents) if index % 10 != 9]
    return {"train": train, "val": val}


def embedded_tokens(tokenizer: Tokenizer) -> dict[str, NDArray[np.uint16]]:
    """The embedded novels as 'train' and 'val', each an array of shape (tokens,).

    With 'gpt2' 461,390 and 48,199 tokens, with 'byte' 2,036,526 and 212,867.
    """
    splits = split_documents(load_embedded_documents())
    return {name: tokenizer.encode_documents(documents) for name, documents in splits.items()}


def open_split(
    data_dir: Path | None,
    split: Literal["train", "val"],
    tokenizer: Tokenizer,
    wanted: Wanted = SAMPLE,
) -> TokenStream:
    """A split of the shards in a folder, checked, or of the embedded text if there is no folder.

    Raises:
        DataError: as `shards.load_split` does.
    """
    if data_dir is not None:
        return load_split(data_dir, split, tokenizer.n_vocab, wanted)
    documents = split_documents(load_embedded_documents())[split]
    tokens = tokenizer.encode_documents(documents)
    return TokenStream.from_arrays([tokens], f"the embedded text ({split})")
