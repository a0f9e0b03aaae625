import codecs
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import jaxgpt
from jaxgpt.data.task import Question, Row, RowScores, multiple_choice_figures
from jaxgpt.data.tasks import TaskError, load_task
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer

EXAMPLES = [
    {"ctx": "It is", "endings": ["a truth", "not", "so", "here"], "label": 2},
    {"ctx": "He was", "endings": ["an", "gone"], "label": "1"},  # text on the Hub
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


def write_lines(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_choice_is_picked_by_summed_and_by_mean_loss() -> None:
    tokens = np.zeros(3, np.uint16)
    rows = [[Row(tokens, 1), Row(tokens, 2)], [Row(tokens, 2), Row(tokens, 2), Row(tokens, 1)]]
    questions = [Question(rows[0], 0), Question(rows[1], 2)]
    nats_R = np.array([3.0, 4.0, 4.0, 5.0, 3.0])
    scores = RowScores(nats_R, nats_R / [1, 2, 2, 2, 1], np.zeros(5, bool))
    figures = multiple_choice_figures(questions, scores)
    assert figures == {"acc": (1.0, 0.0), "acc_norm": (0.0, 0.0)}
    half = multiple_choice_figures([questions[0], questions[1]._replace(label=0)], scores)
    assert half["acc"] == (0.5, pytest.approx(0.5 / np.sqrt(2)))


def test_a_new_task_is_one_new_file(tmp_path: Path) -> None:
    package = Path(jaxgpt.__file__).parent
    shutil.copytree(package, tmp_path / "jaxgpt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package.parent / "configs", tmp_path / "configs")
    (tmp_path / "jaxgpt" / "data" / "tasks" / "arc_easy.py").write_text("""
import msgspec
from jaxgpt.data.task import Question, Task, multiple_choice_figures, tokenize_row

class Choices(msgspec.Struct):
    text: list[str]
    label: list[str]

class Record(msgspec.Struct):
    question: str
    choices: Choices
    answerKey: str

def question(record, tokenizer):
    context = f"Question: {record.question}\\nAnswer:"
    rows = [tokenize_row(context, " " + text, tokenizer) for text in record.choices.text]
    return Question(rows, record.choices.label.index(record.answerKey))

TASK = Task(
    file="arc_easy.jsonl",
    hub={"path": "allenai/ai2_arc", "name": "ARC-Easy", "split": "test"},
    record=Record,
    question=question,
    figures=multiple_choice_figures,
)
""")
    code = """
from jaxgpt import evaluate
from jaxgpt.config.command_line import RunFlags, parse_run
from jaxgpt.config.fields import flat_values
from jaxgpt.data.tasks import load_tasks
from jaxgpt.data.tokenizer import load_tokenizer
argv = ["--preset", "demo", "--arc-easy", "arc.jsonl"]
asked, *_ = parse_run(RunFlags, argv, prog="train", description="", default_preset=str)
assert flat_values(asked)["arc_easy"] == "arc.jsonl"
(question,) = load_tasks(vars(asked.tasks), load_tokenizer("byte"), 64)["arc_easy"]
assert bytes(question.rows[question.label].tokens.tolist()).decode().endswith("Answer: B")
evaluate.main(["--help"])
"""
    choices = {"text": ["A", "B"], "label": ["1", "2"]}
    write_lines(
        tmp_path / "arc.jsonl", [{"question": "Which?", "choices": choices, "answerKey": "2"}]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={}
    )
    assert done.returncode == 0, done.stderr
    assert "--arc-easy FILE" in done.stdout
    assert "arc_easy.jsonl, or 'datasets'" in done.stdout


def test_lines_end_at_newlines_only_and_may_follow_a_byte_order_mark(tokenizer, tmp_path) -> None:
    text = "one\u2028two\x85 three"  # both end a line for str.splitlines
    path = tmp_path / "raw.jsonl"
    line = json.dumps({"text": text}, ensure_ascii=False).encode()
    path.write_bytes(codecs.BOM_UTF8 + line + b"\r\n\n")  # as Notepad writes it
    (question,) = load_task("lambada", str(path), tokenizer, 40)
    assert bytes(question.rows[0].tokens.tolist()).decode() == text


def test_a_long_context_loses_its_beginning(tokenizer, tmp_path) -> None:
    path = write_lines(tmp_path / "l.jsonl", [{"text": "x" * 100 + " word"}, {"text": " word"}])
    long, short = load_task("lambada", path, tokenizer, 20)
    assert bytes(long.rows[0].tokens.tolist()) == b"x" * 16 + b" word"
    assert short.rows[0].tokens.tolist() == [tokenizer.eot, *b" word"]
    with pytest.raises(TaskError, match=r"line 1 has 5 tokens to score, but block_size is 4"):
        load_task("lambada", path, tokenizer, 4)


@pytest.mark.parametrize(
    ("name", "line", "answer"),
    [
        ("hellaswag", '{"ctx": "a"}', "line 1 is not a hellaswag record"),
        (
            "hellaswag",
            '{"ctx": "a", "endings": ["b"], "label": 4}',
            "label 4 is not one of the 1 endings",
        ),
        ("hellaswag", '{"ctx": "a", "endings": "bcde", "label": 1}', "endings: Expected `array`"),
        ("hellaswag", "[1, 2]", "line 1 is not a hellaswag record"),
        ("hellaswag", "{", "line 1 is not a hellaswag record: .*JSON"),
        ("hellaswag", "", "x.jsonl is empty"),
        ("lambada", '{"text": "word"}', "line 1 is not a lambada record"),
        ("lambada", '{"text": 3}', "line 1 is not a lambada record"),
    ],
)
def test_another_file_is_refused(tokenizer, tmp_path, name, line, answer) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(TaskError, match=answer):
        load_task(name, str(tmp_path / "x.jsonl"), tokenizer, 90)


def test_a_missing_file_is_answered_with_where_to_get_it(tokenizer) -> None:
    with pytest.raises(TaskError, match=r"--hellaswag no.jsonl cannot be read .*'datasets'"):
        load_task("hellaswag", "no.jsonl", tokenizer, 90)


def test_datasets_gives_the_same_questions_as_the_file(tokenizer, tmp_path, monkeypatch) -> None:
    calls = []

    def load_dataset(**kwargs) -> list[dict]:
        calls.append(kwargs)
        return EXAMPLES

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    fetched = load_task("hellaswag", "datasets", tokenizer, 40)
    file = write_lines(tmp_path / "val.jsonl", EXAMPLES)
    read = load_task("hellaswag", file, tokenizer, 40)
    assert calls == [{"path": "Rowan/hellaswag", "split": "validation"}]
    assert [q.label for q in fetched] == [q.label for q in read]
    for a, b in zip(fetched, read, strict=True):
        for row, expected in zip(a.rows, b.rows, strict=True):
            np.testing.assert_array_equal(row.tokens, expected.tokens)

    def fail(**_: object) -> None:
        raise OSError("no network\nmuch more")

    library.load_dataset = fail
    with pytest.raises(TaskError, match=r"Rowan/hellaswag cannot be downloaded \(OSError: no net"):
        load_task("hellaswag", "datasets", tokenizer, 40)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="pip install datasets"):
        load_task("hellaswag", "datasets", tokenizer, 40)
