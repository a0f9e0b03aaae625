"""Compare HellaSwag's scores with those of transformers and torch, example by example.

    python -m jaxgpt.train --preset demo --tokenizer gpt2 --block-size 256 --batch-size 4 \
        --effective-batch-size 4 --max-iters 200 --eval-interval 100 --eval-iters 5 \
        --optimizer adamw --warmup-iters 200 --sample-tokens 0 --out-dir runs/bpe
    python -m jaxgpt.export --out-dir runs/bpe --to bpe-hf
    python benchmarks/check_hellaswag.py --model bpe-hf --json benchmarks/results/hellaswag.json

The reference is llm.c's protocol (dev/data/hellaswag.py), with transformers' tokenizer and network
and torch's cross-entropy; of jaxgpt it uses only the exported folder. The examples are made from
the embedded novels in the format of hellaswag_val.jsonl, unless --file names a file. Besides
--model, a GPT-2 with random weights is compared. Needs torch and transformers.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.data.sources import load_embedded_documents
from jaxgpt.data.task import pick_choices
from jaxgpt.data.tasks import load_task
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.data.tokenizer_files import write_tokenizer
from jaxgpt.model.network import init_params
from jaxgpt.training.scoring import score_rows
from jaxgpt.training.step import make_score_step
from jaxgpt.weights.huggingface import save_model
from jaxgpt.weights.source import WeightsFlags, build_network, open_weights

RANDOM = ModelConfig(
    n_layer=2, n_head=2, n_embd=64, block_size=512, vocab_size=50_304, n_vocab=50_257, bias=True
)
# Found in web text, missing from Jane Austen's.
ODDITIES = [
    "naïve café — “so”",
    "東京 😀",
    "two  spaces",
    "it's 50% off!",
    "x\u2028y",
    "e.g. [sic] ...",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="an exported folder with GPT-2's tokenizer")
    parser.add_argument("--examples", type=int, default=300, help="number of made-up examples")
    parser.add_argument("--file", type=Path, help="hellaswag_val.jsonl, in place of made-up ones")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = args.file or Path(scratch) / "made.jsonl"
        if args.file is None:
            write_examples(file, args.examples)
        random_folder = Path(scratch) / "random"
        save_random(random_folder)
        folders = {"random weights": random_folder}
        if args.model:
            folders["--model"] = args.model
        model = f"--model {args.model.name} " if args.model else ""
        result = {
            "command": f"python benchmarks/check_hellaswag.py {model}--examples {args.examples}",
            "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
            "models": {name: compare(folder, file) for name, folder in folders.items()},
        }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


def write_examples(path: Path, count: int) -> None:
    """Write `count` lines in hellaswag_val.jsonl's format, like ActivityNet's and WikiHow's."""
    words = " ".join(load_embedded_documents()).split()
    rng = np.random.default_rng(0)

    def some(least: int, most: int) -> str:
        first = int(rng.integers(0, len(words) - most))
        picked = words[first : first + int(rng.integers(least, most + 1))]
        if rng.random() < 0.2:
            picked.insert(int(rng.integers(len(picked) + 1)), str(rng.choice(ODDITIES)))
        return " ".join(picked)

    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            of_wikihow = index % 2 == 1
            long = (25, 45) if of_wikihow else (5, 25)
            a, b = some(8, 25), "" if of_wikihow else f"{some(1, 3)}"
            if of_wikihow:
                a = f"[header] How to {some(3, 6)} [title] {some(4, 9)}. [step] {some(10, 30)}"
            record = {
                "ind": index,
                "activity_label": some(1, 3),
                "ctx_a": a,
                "ctx_b": b,
                "ctx": f"{a} {b}".strip(),
                "split": "val",
                "split_type": "indomain" if index % 3 else "zeroshot",
                "label": int(rng.integers(4)),
                "endings": [some(*long) for _ in range(4)],
                "source_id": f"{'wikihow' if of_wikihow else 'activitynet'}~v_{index}",
            }
            # Half with \u escapes as in the published file, half without.
            file.write(json.dumps(record, ensure_ascii=index % 4 < 2) + "\n")


def save_random(folder: Path) -> None:
    """Export a GPT-2 with random weights, scaled up so that its logits differ."""
    folder.mkdir()
    params = init_params(RANDOM, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    save_model(folder, RANDOM, params, eot=50_256)
    write_tokenizer(folder, load_tokenizer("gpt2"), RANDOM.block_size)


def compare(folder: Path, file: Path) -> dict:
    """The differences of losses over all endings, and the number of examples that differ."""
    sums_Q4, means_Q4, picked_Q2 = ours(folder, file)
    logits_of, encode = their_model(folder)
    examples = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    theirs_Q24 = np.array([their_losses(example, encode, logits_of) for example in examples])
    their_picked_Q2 = theirs_Q24.argmin(-1)
    labels_Q = np.array([int(example["label"]) for example in examples])
    ours_Q24 = np.stack([sums_Q4, means_Q4], axis=1)
    likeliest_Q22 = np.sort(theirs_Q24, axis=-1)[..., :2]
    result: dict = {
        "examples": len(examples),
        "largest_relative_difference": float((np.abs(ours_Q24 - theirs_Q24) / theirs_Q24).max()),
        "least_gap_of_the_two_likeliest": float(
            (likeliest_Q22[..., 1] / likeliest_Q22[..., 0] - 1).min()
        ),
    }
    for i, name in enumerate(("acc", "acc_norm")):
        mine_Q, theirs_Q = picked_Q2[:, i], their_picked_Q2[:, i]
        result[name] = {
            "ours": float((mine_Q == labels_Q).mean()),
            "theirs": float((theirs_Q == labels_Q).mean()),
            "examples_that_pick_another_ending": int((mine_Q != theirs_Q).sum()),
        }
    return result


def ours(folder: Path, file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sums_Q4, means_Q4, picked_Q2): losses of the endings, and the ending that each chooses."""
    weights = open_weights(WeightsFlags(init_from=str(folder)))
    device = jax.devices("cpu")[0]
    score_step = jax.jit(make_score_step(build_network(weights, device, "float32")))
    questions = load_task("hellaswag", str(file), weights.tokenizer, weights.model.block_size)
    rows = [row for question in questions for row in question.rows]
    scores = score_rows(score_step, weights.load(device), rows, weights.model.block_size, 8)
    picked_Q2 = np.stack(pick_choices(questions, scores), axis=1)
    return scores.nats_R.reshape(-1, 4), scores.means_R.reshape(-1, 4), picked_Q2


Encode = Callable[[str], list[int]]
Logits = Callable[[torch.Tensor], torch.Tensor]


def their_model(folder: Path) -> tuple[Logits, Encode]:
    """transformers' network and tokenizer for a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda tokens_4T: model(tokens_4T).logits, lambda text: tokenizer(text)["input_ids"]


@torch.no_grad()
def their_losses(example: dict, encode: Encode, logits_of: Logits) -> tuple[list, list]:
    """(sums, means) of the four endings' losses: one batch, zero-padded and masked."""
    context = encode(example["ctx"])
    rows = [(context, encode(" " + ending)) for ending in example["endings"]]
    T = max(len(context) + len(ending) for context, ending in rows)
    tokens_4T = torch.zeros((4, T), dtype=torch.long)
    mask_4T = torch.zeros((4, T))
    for row, (before, after) in enumerate(rows):
        tokens_4T[row, : len(before) + len(after)] = torch.tensor(before + after)
        mask_4T[row, len(before) : len(before) + len(after)] = 1
    logits_4TV = logits_of(tokens_4T)[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits_4TV.flatten(0, 1), tokens_4T[:, 1:].flatten(), reduction="none"
    ).view(4, -1)
    sums_4 = (losses * mask_4T[:, 1:]).sum(1)
    return sums_4.tolist(), (sums_4 / mask_4T[:, 1:].sum(1)).tolist()


if __name__ == "__main__":
    main()
