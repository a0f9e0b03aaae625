import base64
import hashlib
import lzma
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext import openai_public

from jaxgpt.config.architecture import padded_vocab_size
from jaxgpt.data import embedded
from jaxgpt.data.tokenizer import TiktokenTokenizer, Tokenizer, load_tokenizer
from jaxgpt.errors import UserError

WORLD = "naïve 東京  \n\n\t🙂👩‍👩‍👧 'tis 1,234 ----shire"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("a test reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture(params=["gpt2", "byte"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_gpt2_encodes_as_openai_did(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("Hello world")
    assert ids.tolist() == [15496, 995]
    assert ids.dtype == np.uint16
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)


def test_every_gpt2_token_is_the_one_tiktoken_downloads_as_r50k_base(gpt2: Tokenizer) -> None:
    assert gpt2.bpe is not None
    pieces = [gpt2.bpe.decode_single_token_bytes(id) for id in range(gpt2.eot)]
    lines = [b"%s %d\n" % (base64.b64encode(piece), id) for id, piece in enumerate(pieces)]
    # The hash that tiktoken 0.14 demands of r50k_base.tiktoken.
    expected = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert hashlib.sha256(b"".join(lines)).hexdigest() == expected


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(WORLD)) == WORLD
    assert tokenizer.decode(tokenizer.encode("")) == ""


def test_a_literal_end_of_text_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_the_end_of_text_token_decodes_to_its_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


def test_bytes_are_their_own_ids(byte: Tokenizer) -> None:
    assert byte.encode("Aé").tolist() == [0x41, 0xC3, 0xA9]
    assert byte.encode("Aé").dtype == np.uint16
    assert (byte.n_vocab, byte.eot) == (257, 256)


def test_bytes_that_are_not_utf8_decode_to_replacement_characters(byte: Tokenizer) -> None:
    assert byte.decode([0x41, 0xC3, 0x42]) == "A\ufffdB"


def test_a_lone_surrogate_is_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


@pytest.mark.parametrize("foreign", [-1, 50257, 70000])
def test_decoding_an_unknown_id_names_the_id(gpt2: Tokenizer, foreign: int) -> None:
    with pytest.raises(UserError, match=rf"id {foreign} is not one of the 50,257 ids.*'gpt2'"):
        gpt2.decode([464, foreign])


def test_padding_ids_do_not_decode(byte: Tokenizer) -> None:
    with pytest.raises(UserError, match="id 257 is not one of the 257 ids"):
        byte.decode(np.array([257], np.uint16))


def test_vocabularies_differ_in_their_hash(gpt2: Tokenizer, byte: Tokenizer) -> None:
    # Token files name their vocabulary by these: a change here makes every one of them unusable.
    assert gpt2.sha256 == "5303f86568dd8276983271f2b8effed091883acfd8b4f4ccc2cebc1d393c6caa"
    assert byte.sha256 == "4da5e97dc4a8c38208b711e588c6fd30644d06f45fffcff8d99b9726c2d4023d"


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    assert copy.encode(WORLD).tolist() == tokenizer.encode(WORLD).tolist()


@pytest.mark.parametrize(
    "contents",
    [b"", b"not xz", lzma.compress(b"#version: 0.2\nG o\n")],
    ids=["empty", "not xz", "other contents"],
)
def test_a_corrupt_vocabulary_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, contents: bytes
) -> None:
    (tmp_path / "vocab.bpe.xz").write_bytes(contents)
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match=r"vocab\.bpe\.xz is corrupt .*reinstall jaxgpt"):
        load_tokenizer("gpt2")


def test_a_truncated_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = (embedded.files("jaxgpt.data.embedded") / "vocab.bpe.xz").read_bytes()
    (tmp_path / "vocab.bpe.xz").write_bytes(whole[:100_000])
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match=r"vocab\.bpe\.xz is corrupt .*reinstall jaxgpt"):
        load_tokenizer("gpt2")


def test_a_missing_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match=r"vocab\.bpe\.xz is missing; reinstall jaxgpt"):
        load_tokenizer("gpt2")


def test_tiktoken_is_never_asked_for_gpt2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    load_tokenizer("gpt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("typo", "hint"), [("gpt-2", "gpt2"), ("bytes", "byte")])
def test_for_a_mistyped_name_the_nearest_one_is_suggested(typo: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"unknown tokenizer '{typo}'; did you mean {hint}"):
        load_tokenizer(typo)


def test_for_an_unknown_name_all_names_are_listed() -> None:
    with pytest.raises(UserError, match="there are byte, char, cl100k_base, gpt2, o200k_base"):
        load_tokenizer("???")


def test_without_a_network_the_message_names_the_missing_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    # The name under which tiktoken caches r50k_base: the SHA-1 of its address.
    cached = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"
    with pytest.raises(UserError, match=f"'r50k_base' could not be downloaded.*{cached}") as error:
        load_tokenizer("r50k_base")
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"'r50k_base' could not be loaded .*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("r50k_base")


def test_other_names_are_loaded_by_tiktoken(
    monkeypatch: pytest.MonkeyPatch, gpt2: Tokenizer
) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", {"r50k_base": gpt2.bpe}.__getitem__)
    r50k = load_tokenizer("r50k_base")
    assert (r50k.name, r50k.sha256) == ("r50k_base", gpt2.sha256)


def test_a_vocabulary_above_65536_is_of_uint32(monkeypatch: pytest.MonkeyPatch) -> None:
    large = tiktoken.Encoding(
        "large",
        pat_str=".",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 65_536},  # cl100k_base has gaps too
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    tokenizer = load_tokenizer("cl100k_base")
    ids = tokenizer.encode_documents(["ab"])
    assert (ids.tolist(), ids.dtype) == ([65_536, 97, 98], np.uint32)


@pytest.mark.parametrize(("n_vocab", "padded"), [(50257, 50304), (257, 320), (64, 64), (1, 64)])
def test_the_vocabulary_is_padded_to_a_multiple_of_64(n_vocab: int, padded: int) -> None:
    assert padded_vocab_size(n_vocab) == padded


def test_importing_the_module_loads_neither_jax_nor_tiktoken() -> None:
    code = (
        "import sys, jaxgpt.data.tokenizer, jaxgpt.data.sources;"
        "print({'jax', 'tiktoken', 'requests'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_documents_are_encoded_each_after_an_end_of_text(
    name: str,
) -> None:
    tokenizer = load_tokenizer(name)
    plain = ["one", "", " two\n\n", "<|endoftext|", "|>three", "<", "ünï ☃ <|endoftext", "\n"]
    for texts in (plain, [*plain, "a <|endoftext|> b"], ["half \ud800 a pair", *plain], ["x"]):
        expected = [id for text in texts for id in (tokenizer.eot, *tokenizer.encode(text))]
        assert tokenizer.encode_documents(texts).tolist() == expected


@pytest.mark.parametrize("character", [" ", "\n", "\t", "\u3000"])
@pytest.mark.parametrize("after", ["x", " x", "\nx", "'s", "\x1c"])
def test_a_million_spaces_are_encoded_as_fewer_are(
    gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch, character: str, after: str
) -> None:
    long = f"Some words {character * 1_020_000}{after} and {character * 1_500_000}"
    assert gpt2.decode(gpt2.encode(long)) == long
    short = f"Some words {character * 400}{after} and {character * 90}, more"
    expected = gpt2.encode(short)
    for size in (2, 7, 100):
        monkeypatch.setattr("jaxgpt.data.tokenizer.SPACE_PROBES", size)
        np.testing.assert_array_equal(gpt2.encode(short), expected)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_a_long_text_is_cut_where_the_newer_patterns_end_a_word(monkeypatch, name: str) -> None:
    """In them a line break belongs to what is before it, such as a full stop or line breaks."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"\n\n", b".\n", b".\n\n", b"  ", b"   "]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    bpe = tiktoken.Encoding(**getattr(openai_public, name)())
    newer = TiktokenTokenizer(name, bpe.n_vocab, bpe.eot_token, "", bpe)
    text = "One.\n\nTwo.\n  Three    four\n\n\n\nfive. \n six\r\n\r\n  seven \n\n" * 3
    expected = bpe.encode(text)
    for size in range(2, 40):
        monkeypatch.setattr("jaxgpt.data.tokenizer.SPACE_PROBES", size)
        np.testing.assert_array_equal(newer.encode(text), expected)
