"""The novels and the GPT-2 vocabulary that are part of the package, for runs without a network.

`benchmarks/build_embedded_data.py` makes both files. The hashes are of the decompressed bytes,
because two releases of xz may compress the same bytes differently.
"""

import hashlib
import lzma
from importlib.resources import files

from jaxgpt.errors import UserError

SHA256 = {
    "austen.txt.xz": "d2747065002714ed3bd993ebf65388e743094407f8f39e192ecdfd1ba2fc6f8b",
    "vocab.bpe.xz": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
REMEDY = "reinstall jaxgpt, or restore the file with `git checkout`"


def load_embedded(name: str) -> bytes:
    """The decompressed bytes of the file `name` in this folder.

    Raises UserError if the file is missing or has other bytes than the release.
    """
    path = files(__package__) / name
    try:
        contents = lzma.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {REMEDY}") from None
    except lzma.LZMAError as error:
        raise UserError(f"{path} is corrupt ({error}); {REMEDY}") from None
    found = hashlib.sha256(contents).hexdigest()
    if found != SHA256[name]:
        raise UserError(
            f"{path} is corrupt (its contents have SHA-256 {found}, not {SHA256[name]}); {REMEDY}"
        )
    return contents
