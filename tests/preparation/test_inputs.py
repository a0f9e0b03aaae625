"""Which files are read, in which order, and their units of work."""

from pathlib import Path

import pytest

from jaxgpt.errors import UserError
from jaxgpt.preparation.inputs import Input, find_inputs, kind_of, work_units


def fake(path: str, size: int) -> Input:
    kind = kind_of(path)
    assert kind is not None
    return Input(path=path, size=size, kind=kind, check="0")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.parquet", "parquet"),
        ("A.JSONL", "jsonl"),
        ("x/b.jsonl.zst", "jsonl"),
        ("b.json.gz", "jsonl"),
        ("c.v2.txt", "text"),
        ("c.txt.gz", "text"),
        ("a.parquet.gz", None),
        ("a.zst", None),
        ("a.pdf", None),
        ("txt", None),
    ],
)
def test_the_format_follows_from_the_name(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_ten_thousand_small_texts_are_one_unit_and_a_large_parquet_file_is_several() -> None:
    small = [fake(f"{n:05d}.txt", 3000) for n in range(10_000)]
    assert len(work_units(small, 256_000_000)) == 1
    large = [fake("a.parquet", 2_000_000_000)]
    units = work_units(large, 256_000_000)
    assert len(units) == 13
    assert sum(slice.size for unit in units for slice in unit) == 2_000_000_000


def test_units_have_each_input_once_in_order() -> None:
    inputs = [
        *(fake(f"a{n}.txt", 40) for n in range(5)),
        fake("b.jsonl", 1000),
        fake("c.jsonl.gz", 1000),  # has no middle to start from
        fake("d.txt", 900),
        fake("e.txt", 10),
    ]
    units = work_units(inputs, 100)
    slices = [slice for unit in units for slice in unit]
    assert [s.input.path for s in slices if s.part == 0] == [item.path for item in inputs]
    assert [len(unit) for unit in units] == [2, 2, 1, *[1] * 10, 1, 1, 1]
    parts = [(s.part, s.parts) for s in slices if s.input.path == "b.jsonl"]
    assert parts == [(n, 10) for n in range(10)]


def test_paths_patterns_and_folders_give_each_file_once_in_the_same_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.jsonl", ".hidden/d.txt", "sub/e.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = [str(tmp_path / name) for name in ("a.txt", "b.txt", "sub/c.jsonl")]
    for arguments in (
        [str(tmp_path)],
        [f"{tmp_path}/**/*.jsonl", f"{tmp_path}/*.txt", str(tmp_path / "a.txt")],
        [str(tmp_path / "sub"), f"{tmp_path}/sub/../b.txt", str(tmp_path / "a.txt")],
    ):
        assert [item.path for item in find_inputs(arguments)] == expected


def test_folders_of_save_to_disk_are_read_beside_files(tmp_path: Path) -> None:
    import datasets

    for name in ("c", "a"):
        datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / name)
    (tmp_path / "b.txt").write_text("x")
    found = find_inputs([str(tmp_path / name) for name in ("c", "b.txt", "a")])
    assert [Path(item.path).name for item in found] == ["a", "b.txt", "c"]
    assert [item.kind for item in found] == ["arrow", "text", "arrow"]


def test_the_checksum_detects_other_content_of_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    checks = set()
    for text in ("a" * 200_000, "b" + "a" * 199_999, "a" * 199_999 + "b"):
        path.write_text(text)
        checks.add(find_inputs([str(path)])[0].check)
    assert len(checks) == 3


def test_a_broken_saved_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a saved dataset"):
        find_inputs([str(tmp_path)])


def test_linked_folders_are_read_once_and_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("texts/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "texts/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts/sub/loop").symlink_to(tmp_path / "texts")
    found = find_inputs([str(tmp_path / "texts")])
    assert [Path(item.path).name for item in found] == ["b.txt", "a.txt"]
    (tmp_path / "elsewhere/b.txt").unlink()
    (tmp_path / "texts/c.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"c.txt: its target is missing"):
        find_inputs([str(tmp_path / "texts")])
