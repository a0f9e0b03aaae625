"""What a preparation needs of disk and time, estimated from a sample of the text."""

from contextlib import suppress
from dataclasses import dataclass

from rich.filesize import decimal

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.archives import open_input
from jaxgpt.preparation.documents import ReadOptions, read_chunks
from jaxgpt.preparation.inputs import TEXT_BYTES_PER_TOKEN, Input, Slice
from jaxgpt.preparation.readers import read_slice
from jaxgpt.preparation.work_files import HubSource, Plan
from jaxgpt.preparation.workers import AHEAD
from jaxgpt.run.console import counted, duration

# GPT-2's BPE on one core of a server; benchmarks/results/prepare-throughput.json has a smaller
# machine's.
TEXT_BYTES_PER_CORE_SECOND = 18e6
SAMPLED_FILES, SAMPLED_CHARACTERS = 8, 100_000  # the latter of each file


@dataclass(frozen=True)
class Estimate:
    """What a complete preparation needs, roughly."""

    input_bytes: int
    needed_bytes: int  # of the input, until the limit is reached
    tokens: int
    shard_bytes: int
    temporary_bytes: int  # in addition, while it runs
    core_seconds: float

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the input for each token."""
        return self.needed_bytes / max(self.tokens, 1)


def estimate_work(
    plan: Plan, tokenizer: Tokenizer, limit_tokens: int | None, workers: int
) -> Estimate:
    """What preparing the inputs of `plan` needs, all of them or up to the limit."""
    s, inputs = plan.settings, plan.inputs
    n_bytes = needed = sum(item.size for item in inputs)
    text = sum(item.text_bytes for item in inputs)
    on_hub = isinstance(plan.source, HubSource)
    per_token = 1.0 if s.tokenizer == "byte" else TEXT_BYTES_PER_TOKEN
    sample = None if on_hub else sample_tokens(plan, tokenizer)
    tokens = int(text / per_token if sample is None else n_bytes * sample)
    text = int(tokens * per_token)
    if limit_tokens is not None:
        fraction = min(1.0, (limit_tokens + (s.val_tokens or 0)) / max(tokens, 1))
        tokens, text = int(tokens * fraction), int(text * fraction)
        needed = int(n_bytes * fraction)
    on_disk = downloads_ahead(workers) + 2  # those being read
    unit_tokens = min(s.unit_bytes / per_token, tokens)
    waiting = min(tokens, s.shard_tokens + workers * AHEAD * unit_tokens)
    largest = max((item.size for item in inputs), default=0) if on_hub else 0
    item = tokenizer.dtype.itemsize
    return Estimate(
        input_bytes=n_bytes,
        needed_bytes=needed,
        tokens=tokens,
        shard_bytes=item * tokens,
        temporary_bytes=int(item * waiting) + min(on_disk, len(inputs)) * largest,
        core_seconds=text / TEXT_BYTES_PER_CORE_SECOND,
    )


def downloads_ahead(workers: int) -> int:
    """The number of files to download while others are read: one feeds about eight workers."""
    return max(2, workers // 8)


def estimate_rows(
    estimate: Estimate, plan: Plan, limited: bool, workers: int, free: str
) -> dict[str, str]:
    """The estimate as rows of a table; `free` is the free space of the disk."""
    s, n_inputs = plan.settings, len(plan.inputs)
    on_hub = plan.source if isinstance(plan.source, HubSource) else None
    return {
        "input": f"{counted(n_inputs, 'file')}, {decimal(estimate.input_bytes)}"
        + (f" of {on_hub.repo} {on_hub.name}, downloaded when needed" if on_hub else "")
        + (f"; limit reached after about {decimal(estimate.needed_bytes)}" if limited else ""),
        "tokens": f"about {estimate.tokens:,} of tokenizer {s.tokenizer!r}, in shards of "
        f"{s.shard_tokens:,}",
        "disk": f"about {decimal(estimate.shard_bytes)}, plus {decimal(estimate.temporary_bytes)} "
        f"while this runs; {free} free",
        "time": f"about {duration(estimate.core_seconds / max(workers, 1))} with "
        + (counted(workers, "worker") if workers else "one of the workers")
        + (", unless the download takes longer" if on_hub else ""),
    }


def sample_tokens(plan: Plan, tokenizer: Tokenizer) -> float | None:
    """Tokens per byte of the inputs, from the beginnings of a few files; None without a document.

    File sizes alone are a poor guide: how far parquet and gzip compress depends on the text.
    """
    inputs = [item for item in plan.inputs if item.size]
    tokens, n_bytes = 0.0, 0
    for item in inputs[:: -(-len(inputs) // SAMPLED_FILES) or 1]:
        with suppress(UserError, OSError):  # the worker that reads all of it says what is wrong
            texts, size = _beginning_of(item, plan.settings.options)
            text = "".join(texts)
            sampled = text[:SAMPLED_CHARACTERS]
            tokens += len(tokenizer.encode(sampled)) * len(text) / max(len(sampled), 1)
            tokens += len(texts)  # of the end of text
            n_bytes += size
    return tokens / n_bytes if tokens else None


def _beginning_of(item: Input, options: ReadOptions) -> tuple[list[str], int]:
    """The first documents of a file, and the bytes of the file that they take."""
    if item.kind == "text":  # a document may be all of a long file
        with open_input(item.path) as file:
            chunk = next(read_chunks(file, item.path), b"")
            return [chunk.decode(errors="replace")], file.tell()
    batch = next(iter(read_slice(Slice(item, item.path, 0, 1), options)), None)
    if batch is None:
        return [], 0
    return [text for text in batch.documents if isinstance(text, str)], batch.bytes
