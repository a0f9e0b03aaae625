"""Tokenizers of the `tokenizers` library: the library's own ids, and exact round trips."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.data.text_stream import TextStream
from jaxgpt.data.tokenizer import EOT_TEXT, Tokenizer, load_tokenizer
from jaxgpt.data.tokenizer_files import open_tokenizer, write_tokenizer
from jaxgpt.data.tokenizer_json import character_tokenizer, open_json_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation import documents
from jaxgpt.preparation.documents import pieces
from jaxgpt.tokenizer.__main__ import save, train_bpe

ARABIC = "اللغة العربية من أكثر اللغات تحدثا، ونطقا ضمن مجموعة اللغات السامية. "
CHINESE = "汉语是世界上使用人数最多的语言。我们今天去公园玩，明天再去学校。"
HINDI = "हिन्दी विश्व की एक प्रमुख भाषा है, और भारत की राजभाषा भी है। "
CODE = (
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2, 3]}  # ok!\n\n\nif __name__ == '__main__':\n"
)
TEXTS = [ARABIC, CHINESE, HINDI, CODE]
WORDS = [
    *(word for text in TEXTS for word in text.split(" ")),
    "\n\n",
    "  ",
    "!\n\n",
    "<|endoftext|>",
]
STRINGS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(WORDS)), max_size=12).map("".join)
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on the four texts."""
    folder = tmp_path_factory.mktemp("tok")
    save(train_bpe(TEXTS * 20, 600), folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Tokenizer:
    return open_tokenizer(folder)


def of_library(folder: Path) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    return library


@pytest.fixture(scope="module")
def library(folder: Path) -> tokenizers.Tokenizer:
    return of_library(folder)


@settings(max_examples=200, deadline=None)
@given(text=STRINGS)
def test_ids_are_the_librarys_and_the_text_comes_back(
    trained: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    ids = trained.encode(text)
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert trained.decode(ids) == text
    assert trained.eot not in ids
    assert len(trained.decode_bytes(ids)) == len(text.encode())


@settings(max_examples=100, deadline=None)
@given(text=SENTENCES)
@example("'__main__':\n '__main__':\n")  # can be cut after a newline alone
def test_cutting_a_long_document_changes_no_token(trained: Tokenizer, text: str) -> None:
    text *= 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 60)
        parts = list(pieces(text, trained.cut))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 60
    longest = max(map(len, text.split()), default=0)
    if longest < 20:  # else a piece may have no place to cut
        assert [id for part in parts for id in trained.encode(part)] == trained.encode(
            text
        ).tolist()


def test_documents_begin_with_the_eos_of_the_tokenizer(trained: Tokenizer) -> None:
    ids = trained.encode_documents([ARABIC, "<|endoftext|> is text", "a \ud800 surrogate"])
    texts = [trained.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == trained.eot))]
    assert texts == ["", ARABIC, "<|endoftext|> is text", "a \ufffd surrogate"]


def wordpiece(folder: Path) -> Path:
    """A tokenizer whose ids have text only in context, as BERT's."""
    library = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "</s>": 4, "a": 5}, unk_token="[UNK]"
        )
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.decoder = tokenizers.decoders.WordPiece()
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("step", [1, 2, 5])
def test_text_streams_in_any_portions(folder: Path, tmp_path: Path, step: int) -> None:
    for tokenizer, text in (
        (open_tokenizer(folder), HINDI + "🙂👩‍👩‍👧" + CHINESE),
        (open_tokenizer(wordpiece(tmp_path / "wp")), "the cats the cat a cats"),
    ):
        ids, stream = tokenizer.encode(text), TextStream(tokenizer, stop_at=tokenizer.eot)
        told = [stream.feed(ids[start : start + step]) for start in range(0, len(ids), step)]
        assert "".join(told) + stream.end() == text
        assert stream.tokens == len(ids)
        # Without context the first word has a space that begins no text.
        assert tokenizer.byte_lengths()[ids].sum() - len(text.encode()) == (text[0] == "t")
    assert tokenizer.byte_lengths().tolist()[1:4] == [4, 4, 1]


def test_gpt2s_own_file_is_opened_as_gpt2_and_has_its_ids(tmp_path: Path) -> None:
    gpt2 = load_tokenizer("gpt2")
    write_tokenizer(tmp_path, gpt2, 64)
    assert load_tokenizer(str(tmp_path)) == gpt2
    as_json = open_json_tokenizer(tmp_path, "x")
    for text in (*TEXTS, "it's 1,234 <|endoftext|>  \n\n x"):
        np.testing.assert_array_equal(as_json.encode(text), gpt2.encode(text))
    np.testing.assert_array_equal(as_json.byte_lengths(), gpt2.byte_lengths())


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_more_tokens_than_gpt2s_make_another_tokenizer(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path, load_tokenizer(name), 64)
    library = of_library(tmp_path)
    library.add_special_tokens(["<|pad|>"])  # which no text has
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).name == name
    library.add_tokens(["        "])
    library.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(str(tmp_path)).encode("a        b").tolist()
    assert ids == library.encode("a        b").ids
    assert len(ids) == 3


def test_the_identity_is_the_content_not_the_layout(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    trained = open_tokenizer(folder)
    assert open_tokenizer(tmp_path / "tokenizer.json").sha256 == trained.sha256
    values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert open_tokenizer(tmp_path).sha256 == trained.sha256
    values["model"]["merges"][5:7] = reversed(values["model"]["merges"][5:7])
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert open_tokenizer(tmp_path).sha256 != trained.sha256


@pytest.mark.parametrize(
    ("files", "eot"),
    [
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, 4),
        ({"special_tokens_map.json": {"eos_token": "cat"}}, 2),
        ({"generation_config.json": {"eos_token_id": [3, 4]}}, 3),
        ({"generation_config.json": {"eos_token_id": 50256}}, 4),  # which it does not have
        ({}, 4),
    ],
)
def test_the_end_of_text_is_the_eos_that_the_files_name(
    tmp_path: Path, files: dict[str, object], eot: int
) -> None:
    folder = wordpiece(tmp_path / "wp")
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    assert open_tokenizer(folder).eot == eot


def test_mistakes_are_answered_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"its tokenizer\.json cannot be read"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"no such folder or file; name a folder with"):
        load_tokenizer(f"{tmp_path}/gone/")
    write_tokenizer(tmp_path, load_tokenizer("byte"), 64)
    for text in ("{", "[]", "\ud800"):
        (tmp_path / "generation_config.json").write_text(text, errors="surrogatepass")
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"its generation_config\.json cannot be read"):
            open_json_tokenizer(tmp_path, "x")
    deep, huge, lacking = (tmp_path / name for name in ("deep", "huge", "lacking"))
    for folder in (deep, huge, lacking):
        folder.mkdir()
        write_tokenizer(folder, load_tokenizer("byte"), 64)
        (folder / "vocab.json").unlink()
    (deep / "tokenizer.json").write_text('{"a":' * 100_000)
    values = json.loads((huge / "tokenizer.json").read_text())
    values["model"]["vocab"]["zz"] = 2**32 - 1
    (huge / "tokenizer.json").write_text(json.dumps(values))
    values["model"] = {"type": "WordLevel", "vocab": {EOT_TEXT: 0}, "unk_token": "?"}
    (lacking / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"deep': its tokenizer\.json cannot be read"):
        load_tokenizer(str(deep))
    with pytest.raises(UserError, match=r"huge': .* id 4,294,967,295"):
        load_tokenizer(str(huge))
    with pytest.raises(UserError, match=r"lacking': .*UNK"):
        load_tokenizer(str(lacking)).encode("a")
    with pytest.raises(UserError, match=r"is made of a text: .* --tokenizer char"):
        load_tokenizer("char")


def test_added_tokens_may_be_left_out(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("ab<>")
    values = json.loads(tokenizer.files["tokenizer.json"])
    del values["added_tokens"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<"}')
    assert open_tokenizer(tmp_path).encode("ab").tolist() == tokenizer.encode("ab").tolist()


def test_characters_have_the_ids_of_the_library_and_others_are_unknown(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(set("".join(TEXTS)) - {"!"})
    tokenizer.save(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.tolist() == of_library(tmp_path).encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text.replace("!", "\ufffd")
