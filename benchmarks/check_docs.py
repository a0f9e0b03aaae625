"""Check README and docs: generated tables, paths, the table of faults, and every command.

    python benchmarks/check_docs.py                       # everything, commands in a scratch copy
    python benchmarks/check_docs.py --only tables links   # seconds
    python benchmarks/check_docs.py --write --only tables # update the generated tables
    python benchmarks/check_docs.py --here                # the commands in this folder (.ci/run)

Commands are the lines of fenced `sh` blocks, in the order of the pages. Each one runs, or the
reason why it does not is printed: from RULES, or from a comment before its block, `<!-- check:
skip: reason -->`. Flags of jaxgpt commands that do not run are parsed all the same. Runs of the
demo presets without --max-iters, 1,000 steps, get Ctrl-C after LONG_RUN_LINES.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).absolute().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
README_WORDS = 1050  # besides the table of presets
TIMEOUT = 600  # seconds for one command
NOT_IN_A_CLONE = (".git", ".venv", "runs", "data", "shared")  # at the top

# What a command needs that this check does not have; the first match counts.
RULES: tuple[tuple[str, str | None], ...] = (
    (r"^python3 -m venv|^pytest", ".ci/run does this itself"),
    (r"^pip install -e '\.\[test\]'", ".ci/run does this itself"),
    (r"^pip install -e '", "needs the network"),
    (r"^(sbatch|srun)\b", "needs Slurm"),
    (r"train_two_processes", "takes minutes; tests/run/test_two_processes.py starts two processes"),
    (r"NANOGPT_DIR", "needs a clone of nanoGPT, and PyTorch"),
    (r"quarter_hour\.py (first|second)", "needs a GPU"),
    (r"convert_nanogpt|measure_parity|check_hellaswag", "needs PyTorch"),
    (r"--device cpu", None),  # runs, whatever the preset
    (r"jaxgpt\.prepare (fineweb|fineweb-edu|climbmix|owner/name)\b", "needs the network"),
    (r"--init-from (gpt2|owner/name)", "needs the network"),
    (r"hellaswag_val|lambada_test", "needs the network"),
    (r"jaxgpt\.(train|bench) .*--preset (\d+gb|gpt2|124m|t4)", "needs a GPU"),
    (r"jaxgpt\.train (?!.*(--preset|--help|my_config))|jaxgpt\.plan$", "needs a GPU"),
    (r"--out-dir runs/(24gb|first|tuned)", "needs a run on a GPU"),
    (r"--coordinator-address HOST", "needs two hosts"),
    (r"--interactive|^tensorboard", "runs until somebody ends it"),
    (r"^kill ", "needs a run in progress"),
)
# Runs that take one to two minutes each, and how many lines of progress they may print.
LONG_RUN = re.compile(r"jaxgpt\.train (?!.*--(max-iters|help)).*--preset demo")
LONG_RUN_LINES = 5
STOPPED = "SIGINT: saved step"
# Files that a reader brings: name -> how to make one.
READERS_FILES: dict[str, Callable[[Path], object]] = {
    "book.txt": lambda path: path.write_text(_novel()[:300_000]),
    "prompt.txt": lambda path: path.write_text("It is a truth universally acknowledged"),
    "my.toml": lambda path: path.write_text(
        (ROOT / "configs" / "demo.toml").read_text().replace("max_iters = 1000", "max_iters = 100")
    ),
}


class Command(NamedTuple):
    """One command of a page."""

    page: str
    line: int
    text: str
    skip: str | None  # why it does not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


# ---------------------------------------------------------------- pages


def tables(write: bool = False) -> Iterator[str]:
    """Between `<!-- python COMMAND -->` and `<!-- end -->` is what the command prints."""
    pattern = re.compile(r"<!-- (python benchmarks/[^>]*?) -->\n(.*?)<!-- end -->", re.DOTALL)
    found = 0
    for page in PAGES:
        text = (ROOT / page).read_text()
        for block in pattern.finditer(text):
            found += 1
            command, shown = block.groups()
            printed = _output(command)
            if printed == shown:
                continue
            if write:
                text = text.replace(block[0], f"<!-- {command} -->\n{printed}<!-- end -->")
                (ROOT / page).write_text(text)
            else:
                yield f"{page}: is not what `{command}` prints; --write --only tables updates it"
    if not found:
        yield "no generated table was found"


def links() -> Iterator[str]:
    """Every linked file, and every path in code quotes that looks like ours, exists."""
    names = "jaxgpt|benchmarks|scripts|tests|configs|docs"
    path_like = re.compile(rf"`((?:{names})/[\w./-]+\.\w+)`")
    rooms = "|".join(room.removeprefix("jaxgpt/") for room in _rooms())
    in_package = re.compile(rf"`((?:{rooms})/\w+\.py)`")
    for page in PAGES:
        text = (ROOT / page).read_text()
        here = (ROOT / page).parent
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
            if not (here / target).exists():
                yield f"{page}: links to {target}, which does not exist"
        for path in path_like.findall(text):
            if not (ROOT / path).exists():
                yield f"{page}: names {path}, which does not exist"
        for path in in_package.findall(text):
            if not (ROOT / "jaxgpt" / path).exists():
                yield f"{page}: names jaxgpt/{path}, which does not exist"
    prose = re.sub(r"(?s)<!-- python .*?<!-- end -->", "", (ROOT / "README.md").read_text())
    if (words := len(prose.split())) > README_WORDS:
        yield f"README.md: has {words} words, above {README_WORDS}"


def faults() -> Iterator[str]:
    """Every row of docs/faults.md names tests that exist."""
    text = (ROOT / "docs" / "faults.md").read_text().partition("## The table")[2]
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    rows = [row for row in rows if len(row) == 3 and row[2] not in ("tests", "")]
    if len(rows) < 46:
        yield f"docs/faults.md: has {len(rows)} rows"
    for row, _, tests in rows:
        named = re.findall(r"(\w+): ([^;]+)", tests)
        if not named:
            yield f"docs/faults.md: {row}: names no test"
        for module, names in named:
            paths = list((ROOT / "tests").rglob(f"test_{module}.py"))
            source = "".join(path.read_text() for path in paths)
            if len(paths) != 1:
                yield f"docs/faults.md: {row}: {len(paths)} files are called test_{module}.py"
            for name in names.split(", "):
                if f"def {name}(" not in source:
                    yield f"docs/faults.md: {row}: test_{module}.py has no {name}"


def file_tree() -> str:
    """docs/files.md's lists: every module of every folder with the first line of its docstring."""
    parts = []
    for folder in ("jaxgpt", *sorted(_rooms()), "scripts", "benchmarks", "benchmarks/gpu"):
        files = sorted((ROOT / folder).glob("*.py")) + sorted((ROOT / folder).glob("*.sh"))
        modules = [path for path in files if path.name != "__init__.py"]
        parts += [f"\n`{folder}/`\n"] if modules else []
        for path in modules:
            parts.append(f"- [`{path.name}`](../{folder}/{path.name}): {_purpose(path)}")
    return "\n".join(parts) + "\n"


def _rooms() -> list[str]:
    packages = [path.parent.relative_to(ROOT) for path in ROOT.glob("jaxgpt/*/**/__init__.py")]
    return [package.as_posix() for package in packages]


def _purpose(path: Path) -> str:
    """The first sentence of a module's docstring or of a script's comment."""
    text = path.read_text()
    if path.suffix == ".sh":
        comment = text.partition("\n#\n")[0].splitlines()[1:]
        paragraph = " ".join(line.removeprefix("# ") for line in comment)
    else:
        paragraph = text.split('"""')[1].partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.)\s|:$|: *(?=#)", paragraph.strip(), maxsplit=1)[0]


def _output(command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


# ---------------------------------------------------------------- commands


def commands_of(page: str, text: str) -> Iterator[Command]:
    """The commands in a page's fenced `sh` blocks, continued lines joined, comments dropped."""
    block = re.compile(r"(?:<!-- check: skip: ([^>]*) -->\n)?```sh\n(.*?)```", re.DOTALL)
    for found in block.finditer(text):
        number = text[: found.start(2)].count("\n") + 1
        joined = found[2].replace("\\\n", "\0")
        for line in joined.splitlines():
            command = re.sub(r"\s+#\s.*$", "", re.sub(r"\0\s*", "", line)).strip()
            if command and not command.startswith("#"):
                yield Command(page, number, command, found[1] or _reason(command))
            number += 1 + line.count("\0")


def _reason(command: str) -> str | None:
    return next((reason for pattern, reason in RULES if re.search(pattern, command)), None)


def commands(here: bool) -> Iterator[str]:
    """Run what can run, in order, from a fresh copy."""
    listed = [c for page in PAGES for c in commands_of(page, (ROOT / page).read_text())]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path.cwd() if here else Path(scratch) / "jaxgpt"
        if not here:
            shutil.copytree(ROOT, folder, ignore=_not_in_a_clone)
        for name, make in READERS_FILES.items():
            make(folder / name)
        ran = 0
        for command in listed:
            begin = time.monotonic()
            text, what = _as_run(command, here)
            code, output = _run(text, folder) if text else (0, "")
            what += ", and stopped with Ctrl-C" if STOPPED in output else ""
            seconds = time.monotonic() - begin
            what += f", {seconds:.0f} s" if text else ""
            print(f"{command}\n    {what}", flush=True)
            ran += what.startswith("ran")
            if code:
                print(f"    exit code {code}\n{output[-2000:]}", flush=True)
                yield f"{command}: exit code {code}"
        print(f"{ran} of {len(listed)} commands ran")
    if not ran:
        yield "no command ran"


def _as_run(command: Command, here: bool) -> tuple[str | None, str]:
    """(what to run in its place, what to print about it)."""
    install, _, rest = command.text.partition(" && ")
    if install.startswith("pip install -e .") and rest and not command.skip:
        if here:
            return None, "skipped: .ci/run ran it in this folder"
        return rest, f"ran without `{install}`"
    if not command.skip:
        return command.text, "ran"
    if flags := re.match(r"python -m jaxgpt\.(\w+ .*)", command.text):
        parse = f"python benchmarks/parse_flags.py {flags[1]}"
        return parse, f"skipped: {command.skip}; its flags were checked"
    return None, f"skipped: {command.skip}"


def _run(text: str, folder: Path) -> tuple[int, str]:
    """(exit code, output) of a command; a long run, which must be a command alone, gets Ctrl-C."""
    hidden = ("XLA_FLAGS", "COLUMNS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"PATH": path, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    lines_left = LONG_RUN_LINES if LONG_RUN.search(text) else 0
    # Otherwise timeout signals its process group too: a second Ctrl-C, which exits without saving.
    options = ["--foreground"] if lines_left else []
    output = []
    with subprocess.Popen(
        ["timeout", *options, str(TIMEOUT), "bash", "-c", text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # .ci/run starts this script in the background, where Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout
        for line in process.stdout:
            output.append(line)
            if lines_left and re.match(r"step [\d,]+/", line):
                lines_left -= 1
                if not lines_left:
                    process.send_signal(signal.SIGINT)
    return process.returncode, "".join(output)


def _not_in_a_clone(folder: str, names: list[str]) -> list[str]:
    top = Path(folder) == ROOT
    return [
        name
        for name in names
        if name == "__pycache__" or name.endswith("_cache") or (top and name in NOT_IN_A_CLONE)
    ]


def _novel() -> str:
    from jaxgpt.data.embedded import load_embedded

    return load_embedded("austen.txt.xz").decode()


CHECKS = ("tables", "links", "faults", "commands")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS)
    parser.add_argument("--write", action="store_true", help="update the generated tables")
    parser.add_argument("--here", action="store_true", help="run commands in the current folder")
    parser.add_argument("--files", action="store_true", help="print the lists of docs/files.md")
    args = parser.parse_args(argv)
    if args.files:
        print(file_tree(), end="")
        return 0
    checks: dict[str, Callable[[], Iterator[str]]] = {
        "tables": lambda: tables(args.write),
        "links": links,
        "faults": faults,
        "commands": lambda: commands(args.here),
    }
    errors = [error for name in args.only for error in checks[name]()]
    print("\n".join(errors) or f"docs: {', '.join(args.only)} checked")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
