"""`--tokenizer char`: the vocabulary is the characters of the text, as in nanoGPT's first exercise.

It is a tokenizer.json beside the shards, and travels on with the run.
"""

from collections.abc import Iterable, Sequence

from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.data.tokenizer_json import MAIN_FILE, bpe_json, tokenizer_from_files, with_config
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
    ids = {character: id for id, character in enumerate(vocabulary)}
    main = bpe_json(ids, len(ids), unk_token=UNKNOWN, decoder={"type": "Fuse"})
    return tokenizer_from_files(with_config(main, unk_token=UNKNOWN), "char")
