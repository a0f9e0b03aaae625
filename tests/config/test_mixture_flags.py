"""--dataset as one dataset or a mixture."""

from fractions import Fraction
from pathlib import Path

import pytest
from helpers.configs import parse

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.mixture import make_mixture, parse_shares

DEMO = ["--preset", "demo"]


def test_weights_become_shares_of_the_named_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere/code").mkdir(parents=True)
    text = "fineweb:7, a:b,c:2,./elsewhere/code:1"
    mixture = parse(
        [*DEMO, "--dataset", text, "--mixture-at", "40", "embedded:1,fineweb:3"]
    ).mixture
    assert mixture.folders == {
        "fineweb": Path("data/fineweb"),
        "a:b,c": Path("data/a:b,c"),
        "./elsewhere/code": Path("elsewhere/code"),
        "embedded": None,
    }
    assert [*mixture.labels.values()] == ["fineweb", "a:b,c", "code", "embedded"]
    first, second = mixture.stages
    assert list(first.shares.values()) == [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)]
    assert second == (40, {"embedded": Fraction(1, 4), "fineweb": Fraction(3, 4)})


def test_an_existing_folder_of_exactly_that_name_wins(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(parse([*DEMO, "--dataset", "a:1,b:1"]).mixture.folders) == 2
    (tmp_path / "data/a:1,b:1").mkdir(parents=True)
    asked = parse([*DEMO, "--dataset", "a:1,b:1"])
    assert asked.data_dir == Path("data/a:1,b:1")
    assert asked.mixture.folders == {"a:1,b:1": asked.data_dir}


def test_folders_of_one_name_are_numbered_and_keep_their_paths_to_themselves() -> None:
    mixture = make_mixture("/home/me/books:1,/mnt/books:1", None)
    assert [*mixture.labels.values()] == ["1 books", "2 books"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "a:0.7,b"], "mixture 'a:0.7,b': expected NAME:WEIGHT"),
        (["--dataset", "a:1,a:2"], "expected NAME:WEIGHT,NAME:WEIGHT,... with each name once"),
        (["--dataset", "a:1,b:1e9999"], "expected NAME:WEIGHT"),
        (["--dataset", "a:1.2.3,b:1"], "expected NAME:WEIGHT"),
        (["--dataset", "a:1,b:0"], "b has less than 1/100,000 of the windows"),
        (["--dataset", "a:1,b:1", "--data-dir", "x"], "data_dir x is not read with the mixture"),
        (["--mixture-at", "9", "a", "--mixture-at", "9", "b"], "mixture_at 9: stages begin after"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(flags, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse([*DEMO, *flags])
    assert message in str(refused.value)


def test_the_rest_of_a_wrong_mixture_is_not_dropped() -> None:
    with pytest.raises(ConfigError):
        parse_shares("a:1,b:1,c")
    with pytest.raises(ConfigError):
        make_mixture("a", None, [(0, "b")])
