"""A path that Orbax takes literally, whatever the name of the run's folder.

Orbax finds the files of each process with a glob of its own path. In `runs/lr[1e-3]` it finds none
and writes a checkpoint that cannot be read. TensorStore needs UTF-8, and takes `gs://` in a path
for another file system.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Self

from jaxgpt.errors import UserError

SPECIAL = re.compile(r"[\[\]*?{}%#\\\x00-\x1f\x7f]|:/")


def is_literal(folder: Path) -> bool:
    """Whether Orbax and TensorStore take the path literally."""
    text = str(folder)
    # In a locale that is not UTF-8 they would encode it to another name.
    is_utf8 = text.encode(errors="replace") == os.fsencode(folder)
    return is_utf8 and SPECIAL.search(text) is None


class OrbaxPath:
    """`with OrbaxPath(folder) as orbax:` has `orbax.path`, `folder` or a symlink to it.

    The symlink is in a private temporary folder. Several processes must all see the same path, so
    for them it is always `folder`.
    """

    def __init__(self, folder: Path, processes: int = 1):
        """Raises UserError if the path cannot be used."""
        self.path = folder
        self._temporary: str | None = None
        if is_literal(folder):
            return
        if processes > 1:
            raise UserError(
                f"--out-dir {folder.parent}: a run of several processes cannot save under a path "
                "with brackets, wildcards, control characters or bytes that are not UTF-8; choose "
                "another --out-dir"
            )
        self._temporary = tempfile.mkdtemp(prefix="jaxgpt-")
        self.path = Path(self._temporary) / "checkpoints"
        try:
            if not is_literal(self.path):
                raise OSError(f"the temporary folder {self._temporary} has them too")
            self.path.symlink_to(folder, target_is_directory=True)
        except OSError as error:
            self.close()
            raise UserError(
                f"--out-dir {folder.parent}: checkpoints cannot be saved under a path with such "
                f"characters ({error}); choose another --out-dir"
            ) from None

    def close(self) -> None:
        """Remove the symlink."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
