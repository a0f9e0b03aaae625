"""Check that llama.cpp loads exported models and writes what `sample --temperature 0` writes.

    pip install xllamacpp
    python benchmarks/check_llama_cpp.py --json benchmarks/results/llama-cpp.json

Trains small models on the embedded text, exports each to GGUF in every dtype, and has llama.cpp
tokenize and continue texts, on the CPU. Token ids must be equal, and in float32 the continuations;
the largest difference between the log-probabilities of its tokens and ours is recorded.
"""

import argparse
import contextlib
import io
import json
import tempfile
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
import xllamacpp
from flax import nnx
from tokenizers import pre_tokenizers

from jaxgpt import export, sample, train
from jaxgpt.config.architecture import ModelConfig
from jaxgpt.data.embedded import load_embedded
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.model.network import init_params
from jaxgpt.weights.gguf_file import PATTERNS, save_gguf
from jaxgpt.weights.source import Weights, WeightsFlags, build_network, open_weights

PROMPTS = ("It is a truth", '"I am', "Elizabeth  had never been")
NEW_TOKENS = 30
# Accents, emoji, digits, runs of spaces and newlines, contractions.
TEXTS = (
    "naïve café – “Señor” Ångström Žižek 東京 привет",
    "🙂🚀 👩‍👩‍👧 ½ ①②③ 1234567890 3.14159 1,000,000",
    "two  spaces   three\ttab\n\nnewlines \n  indented \r\n end  ",
    "don't we'll I'VE they're <endoftext> |endoftext| a_b-c",
)
SMALL = [
    *("--preset", "demo", "--optimizer", "adamw", "--n-layer", "2", "--n-embd", "32"),
    *("--block-size", "64", "--batch-size", "8", "--effective-batch-size", "8"),
    *("--max-iters", "60", "--eval-interval", "60", "--eval-iters", "1", "--sample-tokens", "0"),
    *("--learning-rate", "3e-3", "--min-lr", "3e-4", "--warmup-iters", "10"),
]
GROUPED = ["--n-head", "4", "--n-kv-head", "2", "--head-dim", "16"]
MODELS = {
    "gpt2, GPT-2's tokens": ["--n-head", "2", "--tokenizer", "gpt2"],
    "gpt2 with biases, bytes": ["--n-head", "2", "--bias=True"],
    "qwen3 tied, GPT-2's tokens": [*GROUPED, "--arch", "qwen3", "--tokenizer", "gpt2"],
    "qwen3 untied with embedding norm, bytes": [
        *(*GROUPED, "--arch", "qwen3", "--tied-head=False", "--embedding-norm=True"),
        *("--zero-init=True", "--rope-theta", "50000"),
    ],
    "llama, bytes": [*GROUPED, "--arch", "llama"],
}


class Server:
    """llama.cpp's server for one file; it stops when it is deleted."""

    def __init__(self, path: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = 1
        params.n_ctx = 256
        params.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(params)

    def ask(self, endpoint: str, **body: Any) -> dict[str, Any]:
        """The answer to a request."""
        address = f"{self.server.listening_address}/{endpoint}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)


def check_split(name: str, folder: Path) -> int:
    """A new tokenizer that splits a text as llama.cpp's `name`; returns its number of ids.

    Raises AssertionError where llama.cpp makes other ids.
    """
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")
    before = pre_tokenizers.Digits(individual_digits=True)
    if name != "smollm":
        (pattern,) = (pattern for pattern, known in PATTERNS.items() if known == name)
        before = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([before, by_bytes])
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([load_embedded("austen.txt.xz").decode(), *TEXTS], trainer)
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 64}
    cfg = ModelConfig(arch="qwen3", **shape, vocab_size=tokenizer.n_vocab)
    path = folder / "m.gguf"
    save_gguf(path, cfg, init_params(cfg, jax.random.key(0)), tokenizer, "f32")
    server = Server(path)
    for text in TEXTS:
        ids = server.ask("tokenize", content=text)["tokens"]
        assert ids == tokenizer.encode(text).tolist(), (name, text)
    return tokenizer.n_vocab


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = {
            name: check(name, flags, Path(scratch) / str(number))
            for number, (name, flags) in enumerate(MODELS.items())
        }
        splits = ("smollm", *PATTERNS.values())
        vocabularies = {name: check_split(name, Path(scratch) / name) for name in splits}
    result = {
        "command": "python benchmarks/check_llama_cpp.py",
        "versions": {name: version(name) for name in ("jax", "xllamacpp", "gguf")},
        "models": models,
        "ids_of_new_tokenizers_with_the_split": vocabularies,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def check(name: str, flags: list[str], folder: Path) -> dict[str, Any]:
    """One model in every dtype; raises AssertionError where ids or float32 texts differ."""
    run = folder / "run"
    quiet(train.main, *SMALL, *flags, "--out-dir", run)
    weights = open_weights(WeightsFlags(out_dir=run))
    logprobs = logprobs_of(weights)
    flags = ["--out-dir", run, "--dtype", "float32", "--max-new-tokens", NEW_TOKENS]
    ours = [quiet(sample.main, *flags, "--temperature", 0, "--prompt", p) for p in PROMPTS]
    result: dict[str, Any] = {}
    for dtype in ("f32", "f16", "bf16", "q8_0"):
        path = folder / f"{dtype}.gguf"
        quiet(export.main, "--out-dir", run, "--to", path, "--dtype", dtype)
        server = Server(path)
        for text in TEXTS:
            ids = server.ask("tokenize", content=text)["tokens"]
            assert ids == weights.tokenizer.encode(text).tolist(), (name, text)
        result[dtype] = compare(weights, logprobs, ours, server)
    assert result["f32"]["equal_texts"] == len(PROMPTS), (name, result)
    return result


def compare(
    weights: Weights, logprobs: Callable, ours: list[str], server: Server
) -> dict[str, Any]:
    """How many greedy continuations are equal, and how far log-probabilities differ."""
    equal, difference = 0, 0.0
    for prompt, text in zip(PROMPTS, ours, strict=True):
        request = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0, "n_probs": 1}
        answer = server.ask("completion", **request, return_tokens=True, ignore_eos=False)
        ids = answer["tokens"]
        equal += text.removesuffix("\n") == prompt + weights.tokenizer.decode(ids)
        start = weights.tokenizer.encode(prompt).tolist()
        found = logprobs([*start, *ids])[len(start) - 1 : -1]
        expected = [token["logprob"] for token in answer["completion_probabilities"]]
        mine = np.take_along_axis(found, np.array(ids)[:, None], 1)[:, 0]
        difference = max(difference, float(np.abs(mine[: len(expected)] - expected).max()))
    return {"equal_texts": equal, "of": len(PROMPTS), "largest_logprob_difference": difference}


def logprobs_of(weights: Weights) -> Callable[[list[int]], np.ndarray]:
    """A function from (T,) ids to the (T, V) log-probabilities of the next token, in float32."""
    device = jax.devices("cpu")[0]
    model = nnx.merge(build_network(weights, device, "float32"), weights.load(device))

    def logprobs(ids: list[int]) -> np.ndarray:
        logits_TV = model(np.array([ids]))[0, :, : weights.tokenizer.n_vocab]
        return np.asarray(jax.nn.log_softmax(logits_TV))

    return logprobs


def quiet(command: Callable[[list[str]], int], *argv: object) -> str:
    """Run a command of jaxgpt; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert command([str(argument) for argument in argv]) == 0
    return out.getvalue()


if __name__ == "__main__":
    main()
