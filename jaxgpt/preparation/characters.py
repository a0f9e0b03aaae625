"""`--tokenizer char`: the vocabulary is the characters of the text, as in nanoGPT's first exercise.

It is a tokenizer.json beside the shards, and travels on with the run.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from jaxgpt.data.tokenizer import EOT_TEXT, Tokenizer, load_tokenizer
from jaxgpt.data.tokenizer_json import MAIN_FILE, tokenizer_from_files
from jaxgpt.errors import UserError
from jaxgpt.preparation.documents import LongText, ReadOptions, Skip
from jaxgpt.preparation.flags import PrepareFlags
from jaxgpt.preparation.inputs import Input, Slice
from jaxgpt.preparation.make_plan import find_text
from jaxgpt.preparation.output_folder import OutputFolder, is_hub_name
from jaxgpt.preparation.readers import read_slice
from jaxgpt.preparation.work_files import nothing_finished

UNKNOWN = "\ufffd"  # what a character becomes that the text did not have


def tokenizer_of_flags(flags: PrepareFlags, folder: OutputFolder) -> Tokenizer:
    """The tokenizer that the flags name; 'char' is made of the text. Raises UserError."""
    if flags.tokenizer != "char":
        return load_tokenizer(flags.tokenizer)
    if not nothing_finished(folder.work) and (folder.out / MAIN_FILE).is_file():
        return load_tokenizer("char", folder.out)
    if is_hub_name(flags.inputs):
        raise UserError(
            "--tokenizer char reads the text twice, so it needs files; use --tokenizer byte for a "
            "data set of the Hub"
        )
    return character_tokenizer(
        characters_of(find_text(flags.inputs, flags.val), flags.read_options)
    )


def characters_of(inputs: Sequence[Input], options: ReadOptions) -> set[str]:
    """Every character in the inputs; reads all of them."""
    found = set[str]()
    for item in inputs:
        for batch in read_slice(Slice(item, item.path, 0, 1), options):
            for document in batch.documents:
                if isinstance(document, LongText):
                    found.update(*document.chunks())
                elif not isinstance(document, Skip):
                    found.update(document)
    return found


def character_tokenizer(characters: Iterable[str]) -> Tokenizer:
    """A tokenizer with an id for each character, in their order, for others and for end of text."""
    known = {c for c in characters if not "\ud800" <= c <= "\udfff"} - {UNKNOWN}
    vocabulary = [*sorted(known), UNKNOWN]
    eot = {"id": len(vocabulary), "content": EOT_TEXT, "special": True, "normalized": False}
    values: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**eot, "single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: id for id, character in enumerate(vocabulary)},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOT_TEXT,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": json.dumps(values, indent=1).encode(),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
    }
    return tokenizer_from_files(files, "char")
