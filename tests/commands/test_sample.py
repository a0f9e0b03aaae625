import codecs
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.data.text_stream import TextStream
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.sample import LONGEST_PROMPT, SEPARATOR, context_for, main, prompt_tokens
from jaxgpt.weights.source import WeightsFlags, open_weights


@pytest.fixture
def sample(tiny_run: Path, capsys):
    """Runs the command on the tiny run: (standard output, standard error)."""

    def run(*flags: str, tokens: int = 12) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["--out-dir", str(tiny_run), "--max-new-tokens", str(tokens), *flags]) == 0
        return capsys.readouterr()

    return run


@pytest.fixture
def mistake(capsys):
    """The error message of a command."""

    def answer(*flags: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(flags)
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, "")
        assert "Traceback" not in err
        return err

    return answer


def test_texts_go_to_standard_output_and_messages_to_standard_error(sample) -> None:
    out, err = sample("--prompt", "It is a truth", "--num-samples", "3")
    texts = out.removesuffix("\n").split(f"\n{SEPARATOR}\n")
    assert len(texts) == 3
    assert all(text.startswith("It is a truth") and len(text) > 13 for text in texts)
    assert len(set(texts)) == 3
    assert "step 8: 11,600 parameters, 1,008 of them padding, float32" in err
    assert "36 tokens in" in err


def test_the_cache_is_no_longer_than_the_text_needs() -> None:
    model = ModelConfig(arch="qwen3", block_size=40_960)
    assert [context_for(model, length) for length in (9, 1024, 1025)] == [1024, 1024, 2048]
    assert context_for(model, 99_999) == 40_960
    assert context_for(ModelConfig(block_size=4096), 9) == 4096  # learned positions


def test_more_texts_than_fit_the_memory_are_refused(mistake, tiny_run) -> None:
    """XLA would end the process without a Python error."""
    answer = mistake("--out-dir", str(tiny_run), "--num-samples", "1000000000")
    assert re.search(r"--num-samples 1,000,000,000: .* at least [\d,.]+ GB, .* fewer at a", answer)


def test_a_seed_gives_the_same_texts(sample) -> None:
    a, b, c = (sample("--seed", seed)[0] for seed in ("1", "1", "2"))
    assert a == b
    assert a != c


def test_a_prompt_comes_from_the_flag_a_file_or_standard_input(
    sample, tmp_path, monkeypatch
) -> None:
    (tmp_path / "prompt.txt").write_bytes(codecs.BOM_UTF8 + b"Dear\r\n")  # as Notepad writes it
    expected, _ = sample("--prompt", "Dear\n")
    assert sample("--prompt", f"FILE:{tmp_path}/prompt.txt")[0] == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffDear\n"))
    assert sample("--prompt", "-")[0] == expected


def test_standard_input_that_never_ends_is_no_prompt(mistake, tiny_run, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * (LONGEST_PROMPT + 1)))
    assert "more than 10,000,000 char" in mistake("--out-dir", str(tiny_run), "--prompt", "-")


def test_a_prompt_longer_than_the_context_is_cropped_with_a_message(sample) -> None:
    long = "abc" + "0123456789abcdef"
    out, err = sample("--prompt", long)
    assert "the prompt has 19 tokens; the model sees the last 16" in err
    short, _ = sample("--prompt", long[3:])
    assert out.removeprefix(long) == short.removeprefix(long[3:])


def test_endoftext_in_a_prompt_is_the_end_of_text_token(tiny_run) -> None:
    weights = open_weights(WeightsFlags(out_dir=tiny_run))
    eot = weights.tokenizer.eot
    assert prompt_tokens("", weights) == [eot]
    assert prompt_tokens("<|endoftext|>", weights) == [eot]
    assert prompt_tokens("a<|endoftext|>b", weights) == [97, eot, 98]
    assert prompt_tokens("a<|endoftext|>", weights) == [97, eot]


def test_a_character_that_the_terminal_lacks_is_replaced_and_bad_input_is_refused(
    tiny_run, tmp_path
) -> None:
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    command = [sys.executable, "-m", "jaxgpt.sample", "--out-dir", str(tiny_run)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    flags = ["--max-new-tokens", "2", "--prompt", "café"]
    done = subprocess.run([*command, *flags], capture_output=True, env=env, timeout=60)
    assert (done.returncode, done.stdout[:4]) == (0, b"caf?"), done.stderr
    flags = ["--prompt", "-"]
    with (tmp_path / "latin1.txt").open() as stdin:
        env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
        done = subprocess.run(
            [*command, *flags], capture_output=True, stdin=stdin, env=env, timeout=60
        )
    assert (done.returncode, b"--prompt - cannot be read as text" in done.stderr) == (2, True)


def test_interactive_answers_each_line_until_the_end(sample, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("One\nTwo\n"))
    out, err = sample("--interactive")
    assert re.fullmatch(r"> One.*> Two.*> ", out, flags=re.DOTALL)
    assert err.count("12 tokens in") == 2
    assert err.count("compiling, before the first text") == 1


def test_ctrl_c_ends_a_text_or_a_line_and_not_the_conversation(sample, monkeypatch) -> None:
    typed = iter([KeyboardInterrupt, "One", "Two", EOFError])

    def answer(_: str) -> str:
        said = next(typed)
        if isinstance(said, str):
            return said
        raise said

    class Interrupted(TextStream):
        def feed(self, ids_C: np.ndarray) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", answer)
    with monkeypatch.context() as patch:
        patch.setattr("jaxgpt.sample.TextStream", Interrupted)
        out, err = sample("--interactive")
    assert out == "\nOne\nTwo\n"  # the prompts, and nothing after them
    assert "tokens in" not in err


def test_an_incomplete_character_waits_and_the_text_ends_at_the_stop() -> None:
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode("é!")
    text = TextStream(tokenizer, tokenizer.eot)
    assert [text.feed(ids[:1]), text.feed(ids[1:])] == ["", "é!"]
    assert text.feed(np.array([65, tokenizer.eot, 66])) == "A"
    assert (text.end(), text.tokens) == ("", 4)
    text = TextStream(tokenizer, None)
    assert text.feed(np.array([65, tokenizer.eot, 66, 0xC3])) == "A<|endoftext|>B"
    assert text.end() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("flags", "answers"),
    [
        ([], ["specify --out-dir RUN or --init-from MODEL"]),
        (["--out-dir", "x", "--init-from", "gpt2"], ["--out-dir or --init-from, not both"]),
        (["--out-dir", "x", "--num-sampels", "3"], ["Perhaps you meant", "--num-samples INT"]),
        (["--out-dir", "x", "--start", "3"], ["--start is nanoGPT's; here it is --prompt"]),
        (["--out-dir", "x", "--seed"], ["Missing value for argument '--seed'"]),
        (["--out-dir", "x", "--prompt", "--- a"], ["--out-dir x: no such folder"]),
        (["--out-dir", "x", "--prompt"], ["--prompt needs a value", "--prompt='-- ...'"]),
        (["--prompt", "-hi", "--out-dir", "x"], ["--prompt needs a value", "--prompt='-- ...'"]),
        (["--out-dir", "x", "--seed", "-1"], ["--seed -1 must be at least 0"]),
        (["--out-dir", "x", "--temperature", "-1"], ["--temperature -1 must be at least 0"]),
        (["--out-dir", "x", "--temperature", "1e39"], ["--temperature 1e+39 must", "float32"]),
        (["--out-dir", "x", "--temperature", "nan"], ["--temperature nan must be at least 0"]),
        (["--out-dir", "x", "--top-k=-1", "--top-p=0"], ["--top-k -1 must", "--top-p 0 must"]),
        (["--out-dir", "x", "--num-samples=0"], ["--num-samples 0 must be at least 1"]),
        (["--out-dir", "x", "--max-new-tokens=0"], ["--max-new-tokens 0 must be at least 1"]),
        (["--out-dir", "x", "--checkpoint=newest"], ["--checkpoint newest must be latest, best"]),
        (["--out-dir", "x", "--interactive", "--prompt=a"], ["drop --prompt"]),
        (["--out-dir", "x", "--prompt=FILE:no"], ["--prompt FILE:no cannot be read", "No such"]),
        (["--out-dir", "x"], ["--out-dir x: no such folder", "python -m jaxgpt.train"]),
        (["--init-from", "gtp2"], ["--init-from gtp2: no such folder", "gpt2-medium"]),
    ],
)
def test_a_user_error_is_one_message(mistake, flags, answers) -> None:
    answer = mistake(*flags)
    assert [part for part in answers if part not in answer] == []


def test_a_misspelt_folder_is_answered_with_the_runs_beside_it(mistake, tiny_run) -> None:
    answer = mistake("--out-dir", str(tiny_run.parent / "tini"))
    assert f"runs beside it: {tiny_run}" in answer
    answer = mistake("--init-from", str(tiny_run.parent / "tini"))
    assert f"no such folder; runs beside it: {tiny_run}" in answer


def test_errors_and_help_are_printed_before_jax_is_imported() -> None:
    code = """
import sys
from jaxgpt import evaluate, export, sample
for command in (sample, evaluate, export):
    for argv in (["--help"], ["--nope"], ["--out-dir", "no/such/run"], []):
        try:
            command.main(argv)
        except SystemExit as stop:
            print(stop.code, file=sys.stderr)
slow = {"jax", "flax", "orbax", "torch", "transformers", "huggingface_hub"} & sys.modules.keys()
print(sorted(slow), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    codes = [line for line in done.stderr.splitlines() if line in ("0", "2")]
    assert codes == ["0", "2", "2", "2"] * 3, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
