import re
import subprocess

import pytest

from jaxgpt.planning import gpus
from jaxgpt.planning.gpus import (
    GIB,
    GPUS,
    Gpu,
    LocalCard,
    find_gpu,
    local_cards,
    lookup_gpu,
)

FLOPS_PER_SM_AND_CLOCK = {
    (7, 0): None,
    (7, 5): None,
    (8, 0): 2048,
    (8, 6): 1024,
    (8, 9): 1024,
    (9, 0): 4096,
    (10, 0): 8192,
    (12, 0): 1024,
}


def peak_by_rule(gpu: Gpu) -> float | None:
    rate = FLOPS_PER_SM_AND_CLOCK[gpu.compute_capability]
    if rate is None:
        return None
    is_geforce = re.fullmatch(r"RTX \d{4}( Ti)?( SUPER)?", gpu.name)
    if is_geforce or gpu.name == "A10G":
        rate //= 2  # float32 accumulation
    return gpu.sms * gpu.boost_hz * rate


def test_bf16_peaks_follow_from_the_chips() -> None:
    rule = {gpu.key: peak_by_rule(gpu) for gpu in GPUS}
    assert {gpu.key: gpu.bf16_flops for gpu in GPUS} == {
        key: peak and pytest.approx(peak, rel=0.02) for key, peak in rule.items()
    }


def test_memory_and_bandwidth_are_plausible() -> None:
    nominal = (10, 12, 16, 24, 32, 40, 48, 80, 141, 180)
    off = {g.key: min(abs(g.memory_bytes / (size * GIB) - 1) for size in nominal) for g in GPUS}
    assert {key: share for key, share in off.items() if share >= 0.065} == {}
    # FLOPs per byte read: 84 on an RTX 4070 Ti SUPER's wide bus, 419 on an L40S.
    ratio = {g.key: g.bf16_flops / g.bandwidth_bytes_per_second for g in GPUS if g.bf16_flops}
    assert {key: value for key, value in ratio.items() if not 50 < value < 450} == {}


NAMES = {
    "rtx4090": "rtx4090",
    "RTX 4090": "rtx4090",
    "4090": "rtx4090",
    "rtx_4090_24gb": "rtx4090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "rtx4070ti": "rtx4070ti",
    "RTX 4070 Ti SUPER": "rtx4070tisuper",
    "NVIDIA GeForce RTX 3060": "rtx3060",
    "NVIDIA GeForce RTX 4060 Ti": "rtx4060ti-16gb",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000ada",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-16GB": "v100-16gb",
    "Tesla V100-PCIE-32GB": "v100-32gb",
    "NVIDIA A10G": "a10g",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "A100-SXM4-80GB": "a100-80gb",
    "a100-80gb": "a100-80gb",
    "a100 80 GB": "a100-80gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def test_people_and_drivers_name_the_same_card() -> None:
    assert {name: find_gpu(name).key for name in NAMES} == NAMES
    found = {name: lookup_gpu(name) for name in NAMES}
    assert {name: gpu and gpu.key for name, gpu in found.items()} == NAMES


def test_every_card_is_found_by_its_key_and_its_name() -> None:
    assert [find_gpu(gpu.key) for gpu in GPUS] == list(GPUS)
    assert [find_gpu(gpu.key.upper()) for gpu in GPUS] == list(GPUS)
    assert [find_gpu(gpu.name, gpu.memory_bytes) for gpu in GPUS] == list(GPUS)


def test_memory_tells_cards_of_one_name_apart() -> None:
    assert find_gpu("a100", memory_bytes=40 * GIB).key == "a100-40gb"
    assert find_gpu("a100", memory_bytes=80 * GIB).key == "a100-80gb"
    assert find_gpu("a10g 24gb") == find_gpu("a10g", 24 * GIB)  # ECC or not
    assert lookup_gpu("a100") is None
    with pytest.raises(ValueError, match="'a100' could be a100-40gb or a100-80gb; say which"):
        find_gpu("a100")
    with pytest.raises(ValueError, match=r"known: rtx3080 \(10 GiB\)"):
        find_gpu("NVIDIA GeForce RTX 3080", memory_bytes=12 * GIB)
    assert lookup_gpu("NVIDIA GeForce RTX 3080", memory_bytes=12 * GIB) is None


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown GPU 'rtx4095'; did you mean: .*rtx4090"):
        find_gpu("rtx4095")
    with pytest.raises(ValueError, match=r"unknown GPU 'voodoo'; known: .*rtx3060.*b200"):
        find_gpu("voodoo")


def test_a_relative_of_a_known_card_is_not_taken_for_it() -> None:
    relatives = (
        "NVIDIA GeForce RTX 4070",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA RTX A4000 Laptop GPU",
        "Quadro RTX 6000",
        "NVIDIA A10",
        "NVIDIA L40",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 NVL",
        "NVIDIA H100 96GB HBM3",
        "NVIDIA H200 MIG 1g.18gb",
        "cpu",
        "",
    )
    assert [name for name in relatives if lookup_gpu(name) is not None] == []


def test_local_cards_are_those_that_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "NVIDIA GeForce RTX 4090, 24564\nNVIDIA GB10, [N/A]\nNVIDIA L4, 23034\n"
    answer = subprocess.CompletedProcess([], 0, stdout=listing)
    monkeypatch.setattr(gpus.subprocess, "run", lambda *_, **__: answer)
    cards = local_cards()
    assert [card.name for card in cards] == ["NVIDIA GeForce RTX 4090", "NVIDIA L4"]
    assert [card.memory_bytes for card in cards] == [
        find_gpu(card.name).memory_bytes for card in cards
    ]


@pytest.mark.parametrize(
    "fault",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 10),
        subprocess.CalledProcessError(9, "nvidia-smi"),
    ],
)
def test_without_a_working_driver_there_are_no_cards(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def run(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(gpus.subprocess, "run", run)
    assert local_cards() == []


@pytest.mark.parametrize(
    ("visible", "name"), [(None, "A"), ("1", "B"), ("1,0", "B"), ("7", "A"), ("GPU-3f", "A")]
)
def test_the_card_a_program_gets_is_the_first_visible_one(monkeypatch, visible, name) -> None:
    cards = [LocalCard(name=n, memory_bytes=1) for n in "AB"]
    monkeypatch.setattr(gpus, "local_cards", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.visible_card().name == name
    monkeypatch.setattr(gpus, "local_cards", list)
    assert gpus.visible_card() is None
