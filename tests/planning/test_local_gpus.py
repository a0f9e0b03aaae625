import subprocess

import pytest

from jaxgpt.planning import local_gpus
from jaxgpt.planning.gpus import GIB, find_gpu

LISTING = """\
NVIDIA GeForce RTX 4090, 24564, GPU-3f00, 8.9, [N/A]
NVIDIA GB10, [N/A], GPU-77, 12.1, [N/A]
NVIDIA A100-SXM4-40GB, 40960, GPU-3faa, 8.0, {mode}
Tesla T4, 15360, GPU-c1, 7.5, [N/A]
"""
SLICES = """\
GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-3f00)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-3faa)
  MIG 3g.20gb     Device  0: (UUID: MIG-aa)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-bb)
GPU 2: Tesla T4 (UUID: GPU-c1)
"""


@pytest.fixture
def machine(monkeypatch):
    """A machine with three cards that can be used, the second of them in MIG mode or not."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def has(mode: str = "Disabled", visible: str | None = None) -> None:
        def run(command, **_):
            text = SLICES if command[1] == "-L" else LISTING.format(mode=mode)
            return subprocess.CompletedProcess([], 0, stdout=text)

        monkeypatch.setattr(local_gpus.subprocess, "run", run)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return has


def test_local_cards_are_those_that_nvidia_smi_lists(machine) -> None:
    machine()
    cards = local_gpus.local_cards()
    assert [card.memory_bytes for card in cards] == [
        find_gpu(card.name, card.memory_bytes).memory_bytes for card in cards
    ]
    assert [(card.uuid, card.compute_capability) for card in cards] == [
        *(("GPU-3f00", (8, 9)), ("GPU-3faa", (8, 0)), ("GPU-c1", (7, 5))),
    ]


@pytest.mark.parametrize(
    "fault",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 10),
        subprocess.CalledProcessError(9, "nvidia-smi"),
    ],
)
def test_without_a_working_driver_there_are_no_cards(monkeypatch, fault) -> None:
    def run(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(local_gpus.subprocess, "run", run)
    assert local_gpus.local_cards() == []
    assert local_gpus.preset_of_this_machine() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert local_gpus.count_visible_cards() == 2  # a container without nvidia-smi


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-3f00", "GPU-3faa", "GPU-c1"]),
        ("", []),
        ("-1", []),
        ("2", ["GPU-c1"]),
        ("2,0", ["GPU-c1", "GPU-3f00"]),
        (" 1 , 0", ["GPU-3faa", "GPU-3f00"]),
        ("7", []),
        ("7,0", []),
        ("0,7,1", ["GPU-3f00"]),  # the list ends at the first entry that is no card
        ("0,2,-1,1", ["GPU-3f00", "GPU-c1"]),
        ("1,1", []),
        ("0,1,0", []),
        ("GPU-c1", ["GPU-c1"]),
        ("GPU-3fa,GPU-c", ["GPU-3faa", "GPU-c1"]),
        ("GPU-3f", []),  # of two cards
        ("GPU-99,GPU-c1", []),
        ("MIG-aa", []),  # MIG is off
        ("none", []),
    ],
)
def test_a_program_sees_the_cards_that_cuda_shows(machine, visible, uuids) -> None:
    machine(visible=visible)
    assert [c.uuid for c in local_gpus.visible_cards(local_gpus.local_cards())] == uuids
    assert local_gpus.count_visible_cards() == len(uuids)
    first = local_gpus.visible_card()
    assert (first and first.uuid) == (uuids[0] if uuids else None)


@pytest.mark.parametrize(
    ("visible", "name", "gigabytes"),
    [
        ("1", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20),
        ("GPU-3faa", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20),
        ("MIG-bb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb+me", 5),
    ],
)
def test_of_a_card_in_mig_mode_a_program_sees_one_slice(machine, visible, name, gigabytes) -> None:
    machine("Enabled", visible)
    card = local_gpus.visible_card()
    assert (card.name, card.memory_bytes) == (name, gigabytes * GIB)


@pytest.mark.parametrize(("visible", "preset"), [("0", "24gb"), ("GPU-c", "t4"), ("", None)])
def test_the_preset_is_the_visible_cards(machine, visible, preset) -> None:
    machine(visible=visible)
    assert local_gpus.preset_of_this_machine() == preset
