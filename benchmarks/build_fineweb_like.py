"""Write parquet files with FineWeb's columns and real English, for tests and measurements.

    python benchmarks/build_fineweb_like.py /tmp/fineweb-like --files 4 --megabytes 100

The text is jaxgpt's embedded novels (Debian's r-cran-janeaustenr): consecutive paragraphs, drawn
with a seed, with lengths like those of FineWeb's documents (about 3,000 characters on average, a
few very long). `token_count` is the number of GPT-2 tokens, as in FineWeb.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxgpt.data.sources import load_embedded_documents
from jaxgpt.data.tokenizer import load_tokenizer

ROW_GROUP = 1000  # rows, as in FineWeb


def draw_documents(n_bytes: int, seed: int) -> Iterator[str]:
    """Documents of `n_bytes` in total: consecutive paragraphs, across chapters if needed."""
    draw = random.Random(seed)
    paragraphs = [p for chapter in load_embedded_documents() for p in chapter.split("\n\n")]
    written = 0
    while written < n_bytes:
        wanted = int(draw.lognormvariate(7.4, 1.1))
        start = draw.randrange(len(paragraphs))
        document = paragraphs[start]
        while len(document) < wanted and start + 1 < len(paragraphs):
            start += 1
            document += "\n" + paragraphs[start]
        written += len(document)
        yield document


def build(out: Path, files: int, n_bytes: int, seed: int = 0, row_group: int = ROW_GROUP) -> None:
    """Write `files` parquet files into `out`, with `n_bytes` of text in total."""
    tokenizer = load_tokenizer("gpt2")
    out.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        texts = list(draw_documents(n_bytes // files, seed * 1000 + number))
        n = len(texts)
        table = pa.table(
            {
                "text": texts,
                "id": [f"<urn:uuid:{number:04d}-{row:08d}>" for row in range(n)],
                "dump": ["CC-MAIN-2013-20"] * n,
                "url": [f"http://example.com/{number}/{row}" for row in range(n)],
                "date": ["2013-05-18T07:24:47Z"] * n,
                "file_path": ["s3://commoncrawl/crawl-data/CC-MAIN-2013-20/x.warc.gz"] * n,
                "language": ["en"] * n,
                "language_score": [0.95] * n,
                "token_count": [len(tokenizer.encode(text)) for text in texts],
            }
        )
        pq.write_table(table, out / f"{number:03d}_00000.parquet", row_group_size=row_group)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--megabytes", type=float, default=100, help="of text in total")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    build(flags.out, flags.files, int(flags.megabytes * 1e6), flags.seed)


if __name__ == "__main__":
    main()
