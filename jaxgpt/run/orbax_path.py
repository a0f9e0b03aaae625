"""A path that Orbax takes literally, whatever the name of the run's folder.

Orbax finds the files of each process with a glob of its own path. In `runs/lr[1e-3]` it finds none
and writes a checkpoint that cannot be read. TensorStore needs UTF-8, and takes `gs://` in a path
for another file system.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxgpt.errors import UserError

SPECIAL = re.compile(r"[\[\]*?{}%#\\\x00-\x1f\x7f]|:/")


def is_literal(folder: Path) -> bool:
    """Whether Orbax and TensorStore take the path literally."""
    text = str(folder)
    # In a locale that is not UTF-8 they would encode it to another name.
    is_utf8 = text.encode(errors="replace") == os.fsencode(folder)
    return is_utf8 and SPECIAL.search(text) is None


@contextmanager
def orbax_path(folder: Path, processes: int = 1) -> Iterator[Path]:
    """`folder` or, if Orbax would not take that literally, a symlink to it in a temporary folder.

    Several processes must all see the same path, so for them it is always `folder`.

    Raises:
        UserError: if the path cannot be used.
    """
    if is_literal(folder):
        yield folder
        return
    if processes > 1:
        raise UserError(
            f"--out-dir {folder.parent}: a run of several processes cannot save under a path "
            "with brackets, wildcards, control characters or bytes that are not UTF-8; choose "
            "another --out-dir"
        )
    with TemporaryDirectory(prefix="jaxgpt-", ignore_cleanup_errors=True) as temporary:
        link = Path(temporary) / "checkpoints"
        try:
            if not is_literal(link):
                raise OSError(f"{temporary} has such characters too")
            link.symlink_to(folder, target_is_directory=True)
        except OSError as error:
            raise UserError(
                f"--out-dir {folder.parent}: a path with brackets, wildcards, control "
                f"characters or bytes that are not UTF-8 needs a link in a temporary folder, which "
                f"failed ({error}); choose another --out-dir"
            ) from None
        yield link
