"""How fast `jaxgpt.prepare` tokenizes, beside a bare loop over the same text on the same machine.

    python benchmarks/build_fineweb_like.py /tmp/fineweb-like --files 4 --megabytes 400
    python benchmarks/measure_prepare.py /tmp/fineweb-like --pairs 5

The bare loop is `tiktoken.Encoding.encode_to_numpy` over texts that are in memory, and nothing
else. Preparing is the whole command: starting Python, reading parquet, the end-of-text tokens,
writing to disk twice, checksums. CPU seconds are compared, of all its processes, because other
work on a machine moves wall time more; the two take turns, and each pair gives two ratios, with and
without the CPU seconds of a start (the same command on one short document, beside each pair), which
a second of FineWeb's 45 minutes would not show.
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
bpe, texts = load_tokenizer("gpt2").bpe, []
for path in sorted(glob.glob(sys.argv[1] + "/*.parquet")):
    texts += pq.read_table(path, columns=["text"])["text"].to_pylist()
size = sum(len(text.encode()) for text in texts)
cpu, wall = time.process_time(), time.perf_counter()
for text in texts:
    bpe.encode_to_numpy(text, disallowed_special=())
print(size, time.process_time() - cpu, time.perf_counter() - wall)
"""


def bare(text: Path) -> tuple[int, float, float]:
    """Bytes of text, CPU seconds and seconds of the bare loop."""
    command = [sys.executable, "-c", BARE, str(text)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size, cpu, wall = done.stdout.split()
    return int(size), float(cpu), float(wall)


def prepare(text: Path, workers: int, own_rule: bool) -> tuple[float, float]:
    """CPU seconds of all processes and seconds of the whole command."""
    with tempfile.TemporaryDirectory(dir=text.parent) as out:
        flags = ["--out", out + "/out", "--workers", str(workers)]
        if not own_rule:  # FineWeb's: the first tokens
            flags += ["--val-tokens", "10"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "jaxgpt.prepare", str(text), *flags]
        subprocess.run(command, check=True, capture_output=True)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime), wall


def tiny(text: Path) -> Path:
    """A folder beside `text` with hardly anything to do in it."""
    folder = text.with_name(text.name + "-tiny")
    folder.mkdir(exist_ok=True)
    for number in range(40):  # enough for both splits
        (folder / f"{number}.txt").write_text(f"Document {number}.")
    return folder


def main() -> None:
    """Read the flags, measure in turns, and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--own-rule",
        action="store_true",
        help="validation by a hash of each document, as of own text, instead of FineWeb's rule",
    )
    parser.add_argument("--json", type=Path, help="where to record the result")
    flags = parser.parse_args()
    pairs = []
    for _ in range(flags.pairs):
        size, bare_cpu, bare_wall = bare(flags.text)
        cpu, wall = prepare(flags.text, flags.workers, flags.own_rule)
        start, _ = prepare(tiny(flags.text), flags.workers, flags.own_rule)
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
        f"--workers {flags.workers}{' --own-rule' if flags.own_rule else ''}",
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
