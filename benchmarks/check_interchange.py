"""Check that jaxgpt, llm.c and modded-nanogpt write the same shards and read each other's.

    git clone https://github.com/karpathy/llm.c
    git clone https://github.com/KellerJordan/modded-nanogpt
    python benchmarks/build_fineweb_like.py /tmp/fineweb-like --files 2 --megabytes 0.6
    python benchmarks/check_interchange.py --llmc llm.c --modded modded-nanogpt \
        --text /tmp/fineweb-like --torch-python python --json benchmarks/results/interchange.json

The original scripts tokenize the same parquet files (with a `datasets` that reads them from disk,
because the real one would download FineWeb), and every file must be equal byte for byte, with the
same name. Then each of their readers reads our shards, and ours reads theirs. Needs gcc, and a
Python with torch for modded-nanogpt's reader; its pinned memory, which needs a GPU, is turned off.
"""

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxgpt.data.shards import load_split
from jaxgpt.prepare import main as prepare

SHARD_TOKENS = 30_000

COMMAND = (
    "python benchmarks/build_fineweb_like.py TEXT --files 2 --megabytes 0.6 && "
    "python benchmarks/check_interchange.py --llmc llm.c --modded modded-nanogpt --text TEXT"
)

# Replaces what the originals would download: FineWeb and GPT-2's files.
DATASETS = """
import glob, os
import pyarrow.parquet as pq
def load_dataset(*_, **__):
    for path in sorted(glob.glob(os.environ["TEXT"] + "/*.parquet")):
        yield from ({"text": text} for text in pq.read_table(path)["text"].to_pylist())
"""
SITE = """
import tiktoken
from jaxgpt.data.tokenizer import load_tokenizer
gpt2 = load_tokenizer("gpt2").bpe  # once: llm.c loads it for each document
tiktoken.get_encoding = lambda name: gpt2
"""
C_READER = """
#include "llmc/dataloader.h"
int main(int argc, char **argv) {
    DataLoader loader;
    FILE *out = fopen(argv[2], "wb");
    dataloader_init(&loader, argv[1], 1, 64, 0, 1, 0);
    for (size_t i = 0; i < loader.shard_num_samples; i++) {
        dataloader_next_batch(&loader);
        fwrite(loader.inputs, sizeof(int), 64, out);
    }
    return fclose(out);
}
"""


def run_writer(script: Path, text: Path, work: Path) -> Path:
    """Run an original fineweb.py on `text`; returns the folder of its shards."""
    stand_ins = work / "stand-ins"
    stand_ins.mkdir(exist_ok=True)
    (stand_ins / "datasets.py").write_text(DATASETS)
    (stand_ins / "transformers.py").write_text("AutoTokenizer = None\n")
    (stand_ins / "sitecustomize.py").write_text(SITE)
    environ = {**os.environ, "PYTHONPATH": str(stand_ins), "TEXT": str(text)}
    # A copy, because the script writes into its own folder.
    folder = Path(tempfile.mkdtemp(dir=work)) / "data"
    shutil.copytree(script.parent, folder, ignore=shutil.ignore_patterns("*.bin"))
    command = [sys.executable, str(folder / script.name), "-v", "10B", "-s", str(SHARD_TOKENS)]
    subprocess.run(command, env=environ, check=True, capture_output=True)
    return folder / "fineweb10B"


def functions_of(path: Path, *names: str) -> str:
    """The source of some functions of a file that cannot be imported."""
    tree = ast.parse(path.read_text())
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(wanted) == len(names), (path, names)
    return "\n".join(ast.unparse(node) for node in wanted)


def read_with_llmc_python(llmc: Path) -> Callable[[Path], np.ndarray]:
    """llm.c's train_gpt2.py."""
    namespace: dict = {"np": np}
    source = functions_of(llmc / "train_gpt2.py", "_load_data_shard", "_peek_data_shard")
    exec(source, namespace)

    def read(path: Path) -> np.ndarray:
        tokens = namespace["_load_data_shard"](path)
        assert namespace["_peek_data_shard"](path) == len(tokens)
        return tokens

    return read


def read_with_llmc_c(llmc: Path, work: Path) -> Callable[[Path], np.ndarray]:
    """llm.c's llmc/dataloader.h, compiled."""
    (work / "reader.c").write_text(C_READER)
    command = ["gcc", "-O1", "-w", "-I", str(llmc), str(work / "reader.c"), "-o"]
    subprocess.run([*command, str(work / "reader"), "-lm"], check=True)

    def read(path: Path) -> np.ndarray:
        subprocess.run([work / "reader", path, work / "read"], check=True)
        return np.fromfile(work / "read", np.int32)

    return read


def read_with_modded(modded: Path, torch_python: str, work: Path) -> Callable[[Path], np.ndarray]:
    """modded-nanogpt's train_gpt.py, in a Python that has torch."""
    source = functions_of(modded / "train_gpt.py", "_load_data_shard")
    source = source.replace("pin_memory=True", "pin_memory=False")
    lines = ["import sys, torch", "from pathlib import Path", "from torch import Tensor", source]
    lines.append("sys.stdout.buffer.write(_load_data_shard(Path(sys.argv[1])).numpy().tobytes())")
    (work / "read_modded.py").write_text("\n".join(lines))

    def read(path: Path) -> np.ndarray:
        command = [torch_python, str(work / "read_modded.py"), str(path)]
        raw = subprocess.run(command, check=True, capture_output=True).stdout
        return np.frombuffer(raw, np.uint16)

    return read


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each shard, by name."""
    paths = sorted(folder.glob("*.bin"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def our_tokens(path: Path) -> np.ndarray:
    """A shard as jaxgpt reads it."""
    split = "val" if "_val_" in path.name else "train"
    link = Path(tempfile.mkdtemp(dir=path.parent)) / path.name
    link.symlink_to(path.resolve())
    tokens = load_split(link.parent, split, 50_257)
    return np.array(tokens.window(0, len(tokens)))


def commit_of(folder: Path) -> str:
    """The commit of a checkout, or the contents of a file COMMIT in its folder."""
    if (folder / "COMMIT").exists():
        return (folder / "COMMIT").read_text().strip()
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def check(flags: argparse.Namespace, work: Path) -> dict:
    """Run all comparisons; returns the record. Raises AssertionError at the first difference."""
    out = work / "fineweb"
    arguments = [flags.text, "--out", out, "--val-tokens", SHARD_TOKENS]
    prepare([str(a) for a in (*arguments, "--shard-tokens", SHARD_TOKENS)])
    ours = hashes(out)
    writers = {
        "llm.c dev/data/fineweb.py": flags.llmc / "dev" / "data" / "fineweb.py",
        "modded-nanogpt data/fineweb.py": flags.modded / "data" / "fineweb.py",
    }
    for name, script in writers.items():
        folder = run_writer(script, flags.text, work)
        assert hashes(folder) == ours, name
        for path in sorted(folder.glob("*.bin")):
            np.testing.assert_array_equal(our_tokens(path), our_tokens(out / path.name))
    readers = {
        "llm.c train_gpt2.py _load_data_shard": read_with_llmc_python(flags.llmc),
        "llm.c llmc/dataloader.h": read_with_llmc_c(flags.llmc, work),
        "modded-nanogpt train_gpt.py _load_data_shard": read_with_modded(
            flags.modded, flags.torch_python, work
        ),
    }
    for name, read in readers.items():
        for path in sorted(out.glob("*.bin")):
            theirs, mine = read(path), our_tokens(path)
            # The C reader returns complete windows of 64 inputs, the last of which needs a target.
            wanted = len(mine) if "dataloader.h" not in name else (len(mine) - 1) // 64 * 64
            assert len(theirs) == wanted, (name, path, len(theirs), wanted)
            np.testing.assert_array_equal(theirs, mine[:wanted])
    return {
        "command": COMMAND,
        "shard_tokens": SHARD_TOKENS,
        "originals": {"llm.c": commit_of(flags.llmc), "modded-nanogpt": commit_of(flags.modded)},
        "writers_whose_files_are_equal_byte_for_byte": list(writers),
        "readers_that_read_the_same_tokens": list(readers),
        "shards": ours,
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llmc", type=Path, required=True, help="a checkout of llm.c")
    parser.add_argument("--modded", type=Path, required=True, help="a checkout of modded-nanogpt")
    parser.add_argument("--text", type=Path, required=True, help="a folder of parquet files")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--json", type=Path, help="file for the result")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = check(flags, Path(work))
    print(json.dumps(result, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
