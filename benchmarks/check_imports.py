"""Check that imports between the rooms of jaxgpt/ point down, as docs/architecture.md shows them.

    python benchmarks/check_imports.py

A module may import its own room, rooms on the same line and rooms below. None imports a command.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
PACKAGE = ROOT / "jaxgpt"
PAGE = ROOT / "docs" / "architecture.md"
EVERYWHERE = {"jaxgpt.run.console"}  # terminal output; imports no room


def main() -> int:
    errors = list(upward_imports(levels_of(PAGE.read_text())))
    print("\n".join(errors) or "imports: all point down")
    return 1 if errors else 0


def levels_of(page: str) -> dict[str, int]:
    """room -> line in the page's drawing of the layers, the commands on line 0."""
    drawing = page.partition("```text\ncommands\n")[2].partition("```")[0]
    rooms = {room: n for n, line in enumerate(drawing.splitlines(), 1) for room in line.split()}
    found = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} | {
        "errors",
        "files",
    }
    if rooms.keys() != found:
        raise SystemExit(f"{PAGE.name} draws {sorted(rooms)}, jaxgpt/ has {sorted(found)}")
    return rooms


def upward_imports(levels: dict[str, int]) -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        level = levels.get(room_of(name), 0)
        for imported in imports_of(path):
            below = levels.get(room_of(imported), 0)
            if below < level and imported not in EVERYWHERE:
                yield f"{name} imports {imported}, which is above it"


def room_of(module: str) -> str:
    """jaxgpt.run.folder -> run; jaxgpt.train -> train."""
    return module.split(".")[1]


def imports_of(path: Path) -> Iterator[str]:
    """The modules of jaxgpt that a file imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jaxgpt."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgpt"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT / inner.replace(".", "/")).with_suffix(".py").exists()
                is_room = (ROOT / inner.replace(".", "/") / "__init__.py").exists()
                yield inner if is_module or is_room else str(node.module)


if __name__ == "__main__":
    sys.exit(main())
