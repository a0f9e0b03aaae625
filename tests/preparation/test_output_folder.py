"""The default folder for shards."""

from pathlib import Path

import pytest

from jaxgpt.preparation.flags import PrepareFlags
from jaxgpt.preparation.output_folder import default_out


@pytest.mark.parametrize(
    ("inputs", "out"),
    [
        (["fineweb"], "data/fineweb"),
        (["someone/jokes"], "data/jokes"),
        (["texts"], "data/texts"),
        (["texts/a.en.txt"], "data/a"),
        (["texts/a.en.txt", "texts/b.txt"], "data/texts"),
        (["texts/*.txt"], "data/texts"),
        (["texts/**/*.txt"], "data/texts"),
        (["te?ts/a.txt"], "data/work"),
        (["*.txt"], "data/work"),
        (["."], "data/work"),
        (["data/saved"], "data/saved-tokens"),
        (["data/saved/*.parquet"], "data/saved-tokens"),
    ],
)
def test_shards_go_by_default_to_a_folder_with_the_source_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], out: str
) -> None:
    (tmp_path / "work" / "texts").mkdir(parents=True)
    (tmp_path / "work" / "data" / "saved").mkdir(parents=True)
    for name in ("a.en.txt", "b.txt"):
        (tmp_path / "work" / "texts" / name).touch()
    monkeypatch.chdir(tmp_path / "work")
    assert default_out(PrepareFlags(inputs=tuple(inputs))) == Path(out)
