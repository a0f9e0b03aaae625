"""The evaluation tasks, by name, and how their questions are loaded.

Every module in this package is a task. Flags, tables and logs of `train` and `evaluate` follow from
its `TASK`, so a new task is a new module.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import msgspec

from jaxgpt.config.checks import as_flag
from jaxgpt.data.task import Question, Row, Task
from jaxgpt.errors import UserError, first_line
from jaxgpt.files import FormatError, decode_json, read_file, user_path

if TYPE_CHECKING:
    from jaxgpt.data.tokenizer import Tokenizer

TASKS: dict[str, Task] = {
    module.name: import_module(f"{__name__}.{module.name}").TASK
    for module in iter_modules(__path__)
}
FROM_DATASETS = "datasets"  # in place of a file name: download with the library `datasets`


class TaskError(UserError):
    """A task cannot be loaded; the message names the file, the line and the remedy."""


def load_tasks(
    sources: Mapping[str, str | None], tokenizer: Tokenizer, block_size: int
) -> dict[str, list[Question]]:
    """The questions of the tasks that have a source, by name; raises as `load_task` does."""
    return {
        name: load_task(name, source, tokenizer, block_size)
        for name, source in sources.items()
        if source is not None
    }


def load_task(name: str, source: str, tokenizer: Tokenizer, block_size: int) -> list[Question]:
    """The questions of a task from a jsonl file, or from the Hub if `source` is 'datasets'.

    A row longer than block_size + 1 tokens loses the beginning of its context.

    Raises:
        TaskError: if it cannot be read, or a completion is longer than block_size.
    """
    questions = []
    for where, record in _records(name, source):
        try:
            question = TASKS[name].question(record, tokenizer)
        except ValueError as error:
            raise _not_a_record(name, where, error) from None
        longest = max(row.scored for row in question.rows)
        if longest > block_size:
            raise TaskError(
                f"{where} has {longest} tokens to score, but block_size is {block_size}; use a "
                f"model with a longer context, or leave out {as_flag(name)}"
            )
        rows = [Row(row.tokens[-block_size - 1 :], row.scored) for row in question.rows]
        questions.append(Question(rows, question.label))
    if not questions:
        raise TaskError(f"{as_flag(name)} {source} is empty; download it again")
    return questions


def _records(name: str, source: str) -> Iterator[tuple[str, Any]]:
    """(location for messages, record) of each record."""
    task = TASKS[name]
    if source == FROM_DATASETS:
        for index, values in enumerate(_download(name)):
            where = f"{task.hub['path']}, record {index}"
            try:
                yield where, msgspec.convert(values, task.record)
            except msgspec.ValidationError as error:
                raise _not_a_record(name, where, error) from None
        return
    # Split at "\n" only: a text may contain other characters that str.splitlines splits at.
    for number, line in enumerate(_read_file(name, source).split(b"\n"), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            try:
                yield where, decode_json(line, task.record)
            except FormatError as error:
                raise _not_a_record(name, where, error) from None


def _not_a_record(name: str, where: str, error: Exception) -> TaskError:
    return TaskError(
        f"{where} is not a {name} record: {error}; {TASKS[name].file} is the published file"
    )


def _read_file(name: str, source: str) -> bytes:
    try:
        return read_file(user_path(source, as_flag(name))).removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise TaskError(
            f"{as_flag(name)} {source} cannot be read ({error}); give the published jsonl file, or "
            f"'{FROM_DATASETS}' to download it"
        ) from None


def _download(name: str) -> Iterable[Any]:
    hub = TASKS[name].hub
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"{as_flag(name)} {FROM_DATASETS} needs the library: pip install datasets"
        ) from None
    try:
        return datasets.load_dataset(**hub)
    except Exception as error:  # its own, the Hub's and the HTTP library's
        raise TaskError(
            f"{hub['path']} cannot be downloaded ({type(error).__name__}: {first_line(error)}); "
            f"give the published file instead: {as_flag(name)} {TASKS[name].file}"
        ) from None
