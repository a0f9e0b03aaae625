"""The default folder for shards, and the rank of a process."""

from pathlib import Path

import pytest

from jaxgpt.errors import UserError
from jaxgpt.preparation.flags import PrepareFlags
from jaxgpt.preparation.output_folder import default_out, find_rank


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script without srun
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
            },
            (2, 4),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "4", "OMPI_COMM_WORLD_SIZE": "5"}, (4, 5)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "x", "WORLD_SIZE": "2"}, (0, 1)),
    ],
)
def test_the_rank_comes_from_the_launcher(
    environ: dict[str, str], expected: tuple[int, int]
) -> None:
    assert find_rank(None, None, environ)[:2] == expected


def test_flags_come_before_launchers() -> None:
    assert find_rank(1, 3, {"RANK": "0", "WORLD_SIZE": "8"})[:2] == (1, 3)


@pytest.mark.parametrize("flags", [(3, 3), (-1, 2), (0, 5000), (None, 2), (1, None)])
def test_an_impossible_rank_is_refused(flags: tuple[int | None, int | None]) -> None:
    with pytest.raises(UserError, match="rank"):
        find_rank(*flags, environ={})


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
