"""Compare the speed of `jaxgpt.prepare` with a bare tokenizing loop over the same text.

    python benchmarks/build_fineweb_like.py /tmp/fineweb-like --files 4 --megabytes 400
    python benchmarks/measure_prepare.py /tmp/fineweb-like --pairs 5
    python benchmarks/measure_prepare.py /tmp/fineweb-like --pairs 5 --tokenizer tok

`tok` is a folder with tokenizer.json, as `python -m jaxgpt.tokenizer` makes it.

The bare loop is only `tiktoken.Encoding.encode_to_numpy`, or `tokenizers.Tokenizer`'s
`encode_batch_fast` on one thread and its ids, over texts in memory. Preparing is the complete
command: starting Python, reading parquet, end-of-text tokens, writing to disk twice,
checksums. The CPU seconds of all processes are compared, because other load on a machine affects
wall time more. The two run in turn, and each pair gives two ratios, including and excluding the CPU
seconds of a start (the same command on short documents, next to each pair), which is negligible for
FineWeb's 45 minutes.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import glob, sys, time
import pyarrow.parquet as pq
from jaxgpt.data.tokenizer import load_tokenizer
tokenizer, texts = load_tokenizer(sys.argv[2]), []
for path in sorted(glob.glob(sys.argv[1] + "/*.parquet")):
    texts += pq.read_table(path, columns=["text"])["text"].to_pylist()
size = sum(len(text.encode()) for text in texts)
if sys.argv[2] == "gpt2":
    bpe = tokenizer.bpe
    encode = lambda text: bpe.encode_to_numpy(text, disallowed_special=())
else:
    library = tokenizer.library
    encode = lambda text: library.encode_batch_fast([text], add_special_tokens=False)[0].ids
cpu, wall = time.process_time(), time.perf_counter()
for text in texts:
    encode(text)
print(size, time.process_time() - cpu, time.perf_counter() - wall)
"""


def bare(text: Path, tokenizer: str) -> tuple[int, float, float]:
    """(bytes of text, CPU seconds, wall seconds) of the bare loop."""
    command = [sys.executable, "-c", BARE, str(text), tokenizer]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size, cpu, wall = done.stdout.split()
    return int(size), float(cpu), float(wall)


def prepare(text: Path, workers: int, own_rule: bool, tokenizer: str) -> tuple[float, float]:
    """(CPU seconds of all processes, wall seconds) of the command."""
    with tempfile.TemporaryDirectory(dir=text.parent) as out:
        flags = ["--out", out + "/out", "--workers", str(workers), "--tokenizer", tokenizer]
        if not own_rule:  # FineWeb's: the first tokens
            flags += ["--val-tokens", "10"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "jaxgpt.prepare", str(text), *flags]
        subprocess.run(command, check=True, capture_output=True)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime), wall


def tiny(text: Path) -> Path:
    """A folder next to `text` with forty short documents."""
    folder = text.with_name(text.name + "-tiny")
    folder.mkdir(exist_ok=True)
    for number in range(40):  # enough for both splits
        (folder / f"{number}.txt").write_text(f"Document {number}.")
    return folder


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument(
        "--own-rule",
        action="store_true",
        help="choose validation documents by hash, as for own text, instead of FineWeb's rule",
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    flags = parser.parse_args()
    pairs = []
    for _ in range(flags.pairs):
        size, bare_cpu, bare_wall = bare(flags.text, flags.tokenizer)
        cpu, wall = prepare(flags.text, flags.workers, flags.own_rule, flags.tokenizer)
        start, _ = prepare(tiny(flags.text), flags.workers, flags.own_rule, flags.tokenizer)
        pair = {
            "bare_mb_per_cpu_second": round(size / bare_cpu / 1e6, 2),
            "prepare_mb_per_cpu_second": round(size / cpu / 1e6, 2),
            "start_cpu_seconds": round(start, 3),
            "ratio": round(bare_cpu / (cpu - start), 4),
            "ratio_with_start": round(bare_cpu / cpu, 4),
            "bare_seconds": round(bare_wall, 2),
            "prepare_seconds": round(wall, 2),
        }
        pairs.append(pair)
        print(pair, flush=True)
    ratios = [pair["ratio"] for pair in pairs]
    result = {
        "command": f"python benchmarks/measure_prepare.py TEXT --pairs {flags.pairs} "
        f"--workers {flags.workers}{' --own-rule' if flags.own_rule else ''}"
        + (" --tokenizer TOK" if flags.tokenizer != "gpt2" else ""),
        "text_bytes": size,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "workers": flags.workers,
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ratio_with_start_median": statistics.median(p["ratio_with_start"] for p in pairs),
        "pairs": pairs,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "pairs"}, indent=1))
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
