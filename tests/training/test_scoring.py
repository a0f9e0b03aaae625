import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.data.sources import load_embedded_documents
from jaxgpt.data.task import Row, pick_choices
from jaxgpt.data.tasks import load_task
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.network import build_model, init_params
from jaxgpt.training.scoring import score_rows, score_tasks
from jaxgpt.training.step import make_score_step
from jaxgpt.weights.huggingface import save_model

# Rows have three widths, the last of which is not a power of two.
CFG = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=90, vocab_size=320, n_vocab=257, bias=True
)
GRAPHDEF = build_model(CFG, "float32", plain_attention)
SCORE_STEP = jax.jit(make_score_step(GRAPHDEF))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def params():
    params = init_params(CFG, jax.random.key(0))
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)  # confident predictions


@pytest.fixture(scope="module")
def logits_of(params):
    """(tokens, 257) logits of one text from one forward pass, padded to compile once."""
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
    """Forty examples in HellaSwag's format, of many lengths."""
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
            "label": str(i % 4) if i % 2 else i % 4,  # a number in the file, text on the Hub
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
    """The loss of each token of each ending: one forward pass for each text, without padding."""
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
    questions = load_task("hellaswag", hellaswag_file, tokenizer, CFG.block_size)
    rows = [row for question in questions for row in question.rows]
    assert len({len(row.tokens) > n for row in rows for n in (33, 65)}) == 2
    scores = score_rows(SCORE_STEP, params, rows, CFG.block_size, batch_size=7)
    by_sum_Q, by_mean_Q = pick_choices(questions, scores)
    expected = [ending_losses(logits_of, example) for example in examples]
    flat = [losses for example in expected for losses in example]
    np.testing.assert_allclose(scores.nats_R, [x.sum() for x in flat], rtol=1e-4)
    np.testing.assert_allclose(scores.means_R, [x.mean() for x in flat], rtol=1e-4)
    assert by_sum_Q.tolist() == [np.argmin([x.sum() for x in e]) for e in expected]
    assert by_mean_Q.tolist() == [np.argmin([x.mean() for x in e]) for e in expected]
    assert by_sum_Q.tolist() != by_mean_Q.tolist()

    labels = np.array([int(example["label"]) for example in examples])
    figures = score_tasks({"hellaswag": questions}, SCORE_STEP, params, CFG.block_size, 16)
    share = (by_sum_Q == labels).mean()
    error = math.sqrt(share * (1 - share) / 40)
    assert figures["hellaswag"]["acc"] == (share, pytest.approx(error))
    assert figures["hellaswag"]["acc_norm"].value == (by_mean_Q == labels).mean()


def test_hellaswag_agrees_example_by_example_with_transformers(
    params, tokenizer, examples, hellaswag_file, tmp_path
) -> None:
    torch = pytest.importorskip("torch", reason="the test above needs neither")
    transformers = pytest.importorskip("transformers", reason="the test above needs neither")
    save_model(tmp_path, CFG, params, tokenizer.eot)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    def logits_of(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return theirs(torch.tensor([tokens])).logits[0].numpy()

    questions = load_task("hellaswag", hellaswag_file, tokenizer, CFG.block_size)
    rows = [row for question in questions for row in question.rows]
    scores = score_rows(SCORE_STEP, params, rows, CFG.block_size, batch_size=16)
    by_sum_Q, by_mean_Q = pick_choices(questions, scores)
    expected = [ending_losses(logits_of, example) for example in examples]
    assert by_sum_Q.tolist() == [np.argmin([x.sum() for x in e]) for e in expected]
    assert by_mean_Q.tolist() == [np.argmin([x.mean() for x in e]) for e in expected]


def test_lambada_counts_the_last_words_that_greedy_decoding_produces(
    params, tokenizer, logits_of, tmp_path
) -> None:
    texts = ["It was", "She had never seen", "He"]
    path = write_lines(tmp_path / "l.jsonl", [{"text": f"{text} was"} for text in texts])
    questions = load_task("lambada", path, tokenizer, CFG.block_size)
    rows = [question.rows[0] for question in questions]
    assert [bytes(row.tokens[-row.scored :].tolist()) for row in rows] == [b" was"] * 3
    scores = score_rows(SCORE_STEP, params, rows, CFG.block_size, batch_size=2)
    figures = score_tasks({"lambada": questions}, SCORE_STEP, params, CFG.block_size, 2)["lambada"]
    assert figures["perplexity"].value == pytest.approx(np.exp(scores.nats_R.mean()))
    assert figures["acc"].value == scores.hits_R.mean()

    def decode_greedily(text: str) -> list[int]:
        tokens = list(text.encode())
        for _ in range(3):
            tokens.append(int(logits_of(tokens)[-1].argmax()))
        return tokens

    greedy = [Row(np.array(decode_greedily(text), np.uint16), 3) for text in texts]
    other = [Row(row.tokens.copy(), 3) for row in greedy]
    for row in other:
        row.tokens[-2] ^= 1
    hits_R = score_rows(SCORE_STEP, params, [*greedy, *other], CFG.block_size, 2).hits_R
    assert hits_R.tolist() == [True] * 3 + [False] * 3
