"""What the stand-in Hub serves, and the command `prepare` connected to it."""

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.hub_server import Hub
from helpers.preparing import build
from jaxgpt.data.token_file import write_shard

SMALL = ("--shard-tokens", "20K", "--unit-bytes", "60K", "--val-tokens", "20K")
CARD = """\
---
configs:
- config_name: plain
  data_files:
  - split: train
    path: plain/*.jsonl
  - split: test
    path: other/*.jsonl
- config_name: second
  data_files: other/*.jsonl
---
"""


NAMED = {
    "HuggingFaceFW/fineweb-2": "---\nconfigs:\n- config_name: arb_Arab\n  data_files: data/*\n---",
    "mlfoundations/dclm-baseline-1.0-parquet": "",
    "OptimalScale/ClimbMix": "",
}


TOKEN_ROWS = [[*range(first, first + 40)] for first in range(0, 50_000, 200)]


def build_hub(folder: Path) -> None:
    """Write the files of the stand-in Hub."""
    sample = folder / "HuggingFaceFW" / "fineweb" / "sample"
    build(sample / "10BT", files=3, n_bytes=450_000, row_group=20)
    build(sample / "100BT", files=1, n_bytes=20_000, seed=1)
    plain = folder / "someone" / "jokes" / "plain"
    plain.mkdir(parents=True)
    (plain.parent / "README.md").write_text(CARD)
    for number in range(2):
        lines = [json.dumps({"joke": f"joke {number} {line} " * 9}) for line in range(300)]
        (plain / f"{number}.jsonl").write_text("\n".join(lines))
    (plain.parent / "other").mkdir()
    (plain.parent / "other" / "0.jsonl").write_text(json.dumps({"joke": "one more"}))
    for repo, card in NAMED.items():
        (folder / repo / "data").mkdir(parents=True)
        (folder / repo / "README.md").write_text(card)
        lines = [json.dumps({"text": f"{repo} {line} " * 9}) for line in range(300)]
        (folder / repo / "data" / "0.jsonl").write_text("\n".join(lines))
    rows = [{"cluster_id": 1, "tokens": ids, "token_count": len(ids)} for ids in TOKEN_ROWS]
    climbmix = folder / "nvidia" / "Nemotron-ClimbMix"
    (climbmix / "climbmix_small").mkdir(parents=True)
    (climbmix / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---"
    )
    (climbmix / "part_0.tokenized.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, climbmix / "climbmix_small" / "shard_0.tokenized.parquet")
    pictures = folder / "someone" / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"png")
    (folder / "someone" / "scripted").mkdir()
    (folder / "someone" / "scripted" / "scripted.py").write_text("import datasets")
    ready = folder / "kjj0" / "fineweb10B-gpt2"
    ready.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("val_000000", "train_000001", "train_000002", "train_000003"):
        write_shard(ready / f"fineweb_{name}.bin", random.integers(0, 50257, 5000))


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxgpt.prepare", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def shards(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.bin"))}


def kill_at_first_file(hub: Hub, environment: dict[str, str], *arguments: str) -> None:
    """Run a command until it asks for a file."""
    hub.hold.clear()
    hub.requests.clear()
    command = [sys.executable, "-m", "jaxgpt.prepare", *arguments]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for_request(hub, "GET /datasets/")
    finally:
        child.kill()
        child.wait()
        hub.hold.set()


def wait_for_request(hub: Hub, pattern: str) -> None:
    deadline = time.monotonic() + 30
    while not any(re.search(pattern, request) for request in hub.requests):
        assert time.monotonic() < deadline, hub.requests
        time.sleep(0.01)
