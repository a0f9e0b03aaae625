import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.data.sources import load_embedded_documents
from jaxgpt.data.tasks import BenchmarkError, Row, load_benchmark
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.gpt import build_gpt, init_params
from jaxgpt.training.scoring import (
    hellaswag_answers,
    score_hellaswag,
    score_lambada,
    score_rows,
)
from jaxgpt.training.step import make_score_step
from jaxgpt.weights.huggingface import save_model

# Three widths of rows, the last of which is no power of two.
CFG = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=90, vocab_size=320, n_vocab=257, bias=True
)
GRAPHDEF = build_gpt(CFG, "float32", plain_attention)
SCORE_STEP = jax.jit(make_score_step(GRAPHDEF))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def params():
    params = init_params(CFG, jax.random.key(0))
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)  # decided opinions


@pytest.fixture(scope="module")
def logits_of(params):
    """(tokens, 257) logits of one text by one forward pass; jitted in one width, to be quick."""
    forward = jax.jit(lambda tokens_1T: nnx.merge(GRAPHDEF, params)(tokens_1T)[0, :, :257])

    def logits(tokens: list[int]) -> np.ndarray:
        padded = np.array([tokens + [0] * (CFG.block_size - len(tokens))], np.int32)
        return np.asarray(forward(padded))[: len(tokens)]

    return logits


def write_lines(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def examples() -> list[dict]:
    """Forty examples in HellaSwag's form, of many lengths."""
    words = load_embedded_documents()[0].split()
    rng = np.random.default_rng(0)

    def some(least: int, most: int) -> str:
        first = rng.integers(0, len(words) - 50)
        return " ".join(words[first : first + rng.integers(least, most)])

    return [
        {
            "ind": i,
            "ctx": some(1, 9),
            "endings": [some(1, 6) for _ in range(4)],
            "label": str(i % 4) if i % 2 else i % 4,  # the file has numbers, the Hub text
        }
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def hellaswag_file(examples, tmp_path_factory) -> str:
    return write_lines(tmp_path_factory.mktemp("hellaswag") / "val.jsonl", examples)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def ending_losses(logits_of, example: dict) -> list[np.ndarray]:
    """The loss of each token of each ending: one text, one forward pass, nothing padded."""
    losses = []
    for ending in example["endings"]:
        context, after = example["ctx"].encode(), f" {ending}".encode()
        tokens = list(context + after)
        log_p = log_softmax(logits_of(tokens).astype(np.float64))
        targets = range(len(context), len(tokens))
        losses.append(np.array([-log_p[t - 1, tokens[t]] for t in targets]))
    return losses


def test_hellaswag_agrees_example_by_example_with_one_text_at_a_time(
    params, tokenizer, examples, hellaswag_file, logits_of
) -> None:
    questions = load_benchmark("hellaswag", hellaswag_file, tokenizer, CFG.block_size)
    rows = [row for question in questions for row in question.rows]
    assert len({len(row.tokens) > n for row in rows for n in (33, 65)}) == 2
    scores = score_rows(SCORE_STEP, params, rows, CFG.block_size, batch_size=7)
    by_sum_Q, by_mean_Q = hellaswag_answers(questions, scores)
    expected = [ending_losses(logits_of, example) for example in examples]
    flat = [losses for example in expected for losses in example]
    np.testing.assert_allclose(scores.nats_R, [x.sum() for x in flat], rtol=1e-4)
    np.testing.assert_allclose(scores.means_R, [x.mean() for x in flat], rtol=1e-4)
    assert by_sum_Q.tolist() == [np.argmin([x.sum() for x in e]) for e in expected]
    assert by_mean_Q.tolist() == [np.argmin([x.mean() for x in e]) for e in expected]
    assert by_sum_Q.tolist() != by_mean_Q.tolist()

    labels = np.array([int(example["label"]) for example in examples])
    result = score_hellaswag(SCORE_STEP, params, questions, CFG.block_size, batch_size=16)
    assert result["acc"] == (by_sum_Q == labels).mean()
    assert result["acc_norm"] == (by_mean_Q == labels).mean()
    assert result["examples"] == 40


def test_hellaswag_agrees_example_by_example_with_transformers(
    params, tokenizer, examples, hellaswag_file, tmp_path
) -> None:
    torch = pytest.importorskip("torch", reason="the other test needs neither")
    transformers = pytest.importorskip("transformers", reason="the other test needs neither")
    save_model(tmp_path, CFG, params, tokenizer.eot)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    def logits_of(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return theirs(torch.tensor([tokens])).logits[0].numpy()

    questions = load_benchmark("hellaswag", hellaswag_file, tokenizer, CFG.block_size)
    rows = [row for question in questions for row in question.rows]
    scores = score_rows(SCORE_STEP, params, rows, CFG.block_size, batch_size=16)
    by_sum_Q, by_mean_Q = hellaswag_answers(questions, scores)
    expected = [ending_losses(logits_of, example) for example in examples]
    assert by_sum_Q.tolist() == [np.argmin([x.sum() for x in e]) for e in expected]
    assert by_mean_Q.tolist() == [np.argmin([x.mean() for x in e]) for e in expected]


def test_lambada_is_right_where_greedy_decoding_writes_the_last_word(
    params, tokenizer, logits_of, tmp_path
) -> None:
    texts = ["It was", "She had never seen", "He"]
    path = write_lines(tmp_path / "l.jsonl", [{"text": f"{text} was"} for text in texts])
    questions = load_benchmark("lambada", path, tokenizer, CFG.block_size)
    rows = [question.rows[0] for question in questions]
    assert [bytes(row.tokens[-row.scored :].tolist()) for row in rows] == [b" was"] * 3
    scores = score_rows(SCORE_STEP, params, rows, CFG.block_size, batch_size=2)
    result = score_lambada(SCORE_STEP, params, questions, CFG.block_size, batch_size=2)
    assert result["perplexity"] == pytest.approx(np.exp(scores.nats_R.mean()))
    assert (result["acc"], result["examples"]) == (scores.hits_R.mean(), 3)

    def as_greedy_decoding_goes_on(text: str) -> list[int]:
        tokens = list(text.encode())
        for _ in range(3):
            tokens.append(int(logits_of(tokens)[-1].argmax()))
        return tokens

    liked = [Row(np.array(as_greedy_decoding_goes_on(text), np.uint16), 3) for text in texts]
    spoilt = [Row(row.tokens.copy(), 3) for row in liked]
    for row in spoilt:
        row.tokens[-2] ^= 1
    hits_R = score_rows(SCORE_STEP, params, [*liked, *spoilt], CFG.block_size, 2).hits_R
    assert hits_R.tolist() == [True] * 3 + [False] * 3


def test_a_line_ends_where_json_lines_end(tokenizer, tmp_path) -> None:
    text = "one\u2028two\x85 three"  # both end a line for str.splitlines
    path = tmp_path / "raw.jsonl"
    path.write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n\n")
    (question,) = load_benchmark("lambada", str(path), tokenizer, 40)
    assert bytes(question.rows[0].tokens.tolist()).decode() == text


def test_a_context_loses_its_beginning_and_an_ending_nothing(tokenizer, tmp_path) -> None:
    path = write_lines(tmp_path / "l.jsonl", [{"text": "x" * 100 + " word"}, {"text": " word"}])
    long, short = load_benchmark("lambada", path, tokenizer, 20)
    assert bytes(long.rows[0].tokens.tolist()) == b"x" * 16 + b" word"
    assert short.rows[0].tokens.tolist() == [tokenizer.eot, *b" word"]
    with pytest.raises(BenchmarkError, match=r"line 1 has 5 tokens to score, .* sees 4 at a time"):
        load_benchmark("lambada", path, tokenizer, 4)


@pytest.mark.parametrize(
    ("name", "line", "answer"),
    [
        ("hellaswag", '{"ctx": "a"}', "line 1 is not a hellaswag record"),
        ("hellaswag", '{"ctx": "a", "endings": ["b"], "label": 4}', "line 1 is not a hellaswag"),
        ("hellaswag", '{"ctx": "a", "endings": "bcde", "label": 1}', "line 1 is not a hellaswag"),
        ("hellaswag", "[1, 2]", "line 1 is not a hellaswag record"),
        ("hellaswag", "{", "line 1 is no JSON"),
        ("hellaswag", "", "holds no record of hellaswag"),
        ("lambada", '{"text": "word"}', "line 1 is not a lambada record"),
        ("lambada", '{"text": 3}', "line 1 is not a lambada record"),
    ],
)
def test_a_file_of_something_else_is_refused(tokenizer, tmp_path, name, line, answer) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(BenchmarkError, match=answer):
        load_benchmark(name, str(tmp_path / "x.jsonl"), tokenizer, 90)


def test_a_missing_file_is_answered_with_where_there_is_one(tokenizer) -> None:
    with pytest.raises(BenchmarkError, match=r"--hellaswag no.jsonl cannot be read .*'datasets'"):
        load_benchmark("hellaswag", "no.jsonl", tokenizer, 90)


def test_datasets_gives_the_same_questions_as_the_file(
    tokenizer, examples, hellaswag_file, monkeypatch
) -> None:
    asked = []

    def load_dataset(**kwargs) -> list[dict]:
        asked.append(kwargs)
        return examples

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    fetched = load_benchmark("hellaswag", "datasets", tokenizer, CFG.block_size)
    read = load_benchmark("hellaswag", hellaswag_file, tokenizer, CFG.block_size)
    assert asked == [{"path": "Rowan/hellaswag", "split": "validation"}]
    assert [q.label for q in fetched] == [q.label for q in read]
    for a, b in zip(fetched, read, strict=True):
        for row, expected in zip(a.rows, b.rows, strict=True):
            np.testing.assert_array_equal(row.tokens, expected.tokens)

    def fail(**_: object) -> None:
        raise OSError("no network\nmuch more")

    library.load_dataset = fail
    with pytest.raises(
        BenchmarkError, match=r"Rowan/hellaswag cannot be fetched \(OSError: no net"
    ):
        load_benchmark("hellaswag", "datasets", tokenizer, CFG.block_size)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BenchmarkError, match="pip install datasets"):
        load_benchmark("hellaswag", "datasets", tokenizer, CFG.block_size)
