"""Compare the ids of tokenizers that jaxgpt trained with transformers', string by string.

    python benchmarks/compare_tokenizers.py TEXTS/*.txt --json benchmarks/results/tokenizers.json

For each text: train a tokenizer on it, write its files as `export` does, load them with
transformers, and compare the ids on strings cut from the text at random places and on strings that
hypothesis invents; ours must also decode to the string. Needs transformers and hypothesis.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data.tokenizer import EOT_TEXT, Tokenizer
from jaxgpt.data.tokenizer_files import open_tokenizer, write_tokenizer
from jaxgpt.tokenizer.__main__ import main as train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = [compare(path, args.strings, args.vocab_size) for path in args.texts]
    modules = (transformers, tokenizers, hypothesis)
    record = {
        "command": "python benchmarks/compare_tokenizers.py TEXTS/*.txt",
        "versions": {module.__name__: module.__version__ for module in modules},
        "texts": results,
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def compare(path: Path, n_strings: int, vocab_size: int) -> dict[str, Any]:
    """How many of the strings have the same ids in both programs and decode to themselves."""
    with tempfile.TemporaryDirectory() as folder:
        trained, exported = Path(folder, "trained"), Path(folder, "exported")
        flags = [str(path), "--vocab-size", str(vocab_size), "--out", str(trained)]
        assert train_tokenizer(flags) == 0
        ours = open_tokenizer(trained)
        exported.mkdir()
        write_tokenizer(exported, ours, 1024)
        theirs = transformers.AutoTokenizer.from_pretrained(exported)
    text = path.read_text()
    invented: list[str] = []
    alphabet = st.one_of(st.text(max_size=20), st.sampled_from(sorted({*text.split()})))

    @settings(max_examples=n_strings // 10, database=None, derandomize=True, deadline=None)
    @given(st.lists(alphabet, max_size=10).map(" ".join))
    def invent(string: str) -> None:
        invented.append(string)

    invent()
    return {
        "text": path.stem,
        "bytes": len(text.encode()),
        "vocab_size": ours.n_vocab,
        "cut_from_the_text": count(ours, theirs, cuts(text, n_strings)),
        "invented_by_hypothesis": count(ours, theirs, invented),
    }


def cuts(text: str, n: int) -> list[str]:
    """Strings of 1 to 400 characters from random places."""
    generator = random.Random(0)
    starts = [(generator.randrange(len(text)), generator.randint(1, 400)) for _ in range(n)]
    return [text[start : start + length] for start, length in starts]


def count(ours: Tokenizer, theirs: Any, strings: list[str]) -> dict[str, int]:
    """Strings in all, with equal ids, and with an exact round trip; without the end of text."""
    strings = [string for string in strings if EOT_TEXT not in string]  # theirs makes it an id
    ids = [ours.encode(string).tolist() for string in strings]
    others = theirs(strings, add_special_tokens=False)["input_ids"]
    return {
        "strings": len(strings),
        "same_ids": sum(a == b for a, b in zip(ids, others, strict=True)),
        "round_trips": sum(ours.decode(a) == s for a, s in zip(ids, strings, strict=True)),
        "tokens": sum(map(len, ids)),
    }


if __name__ == "__main__":
    main()
