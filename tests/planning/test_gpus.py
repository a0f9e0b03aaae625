import pytest

from jaxgpt.config.presets import load_preset
from jaxgpt.planning.gpus import GIB, GPUS, find_gpu, lookup_gpu, preset_of_card

# Dense TFLOP/s with float32 accumulation that NVIDIA publishes: bfloat16, float16 before 8.0.
PUBLISHED = {
    "v100-16gb": 125,
    "t4": 65,
    "titanrtx": 130.5,
    "quadrortx6000": 130.5,
    "rtx2080ti": 53.8,
    "a30": 165,
    "a100-40gb": 312,
    "a100-80gb-pcie": 312,
    "a2": 18,
    "a10": 125,
    "a16": 17.9,
    "a10g": 70,
    "a40": 149.7,
    "rtx3080": 59.5,
    "rtx3090": 71,
    "rtx3090ti": 80,
    "a6000": 154.8,
    "a4000": 76.7,
    "a4500": 94.6,
    "a5000": 111.1,
    "a5500": 136.4,
    "rtx3070": 40.6,
    "rtx4070ti": 80.2,
    "rtx4080": 97.5,
    "rtx4090": 165.2,
    "rtx6000ada": 364.2,
    "l4": 121,
    "l20": 119.5,
    "l40": 181.05,
    "l40s": 362.05,
    "rtx4000ada": 106.9,
    "rtx5000ada": 261.1,
    "h20": 148,
    "h100": 989.4,
    "h100-pcie": 756,
    "h100-nvl": 835,
    "gh200": 990,
    "h800-pcie": 756,
    "h200": 989.4,
    "b200": 2250,
    "gb200": 2500,
    "b300": 2250,
    "rtx5070ti": 87.9,
    "rtx5080": 112.6,
    "rtx5090": 209.5,
    "rtxpro6000": 503.8,
}


def test_peaks_are_those_that_are_published() -> None:
    found = {key: find_gpu(key).half_flops for key in PUBLISHED}
    assert found == {key: pytest.approx(peak * 1e12, rel=0.02) for key, peak in PUBLISHED.items()}


def test_memory_and_bandwidth_are_plausible() -> None:
    nominal = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 72, 80, 96, 141, 180, 185, 268, 278)
    off = {g.key: min(abs(g.memory_bytes / (size * GIB) - 1) for size in nominal) for g in GPUS}
    assert {key: share for key, share in off.items() if share >= 0.065} == {}
    # FLOPs per byte read: 37 on an H20, 453 on an RTX 5000 Ada.
    ratio = {g.key: g.half_flops / g.bandwidth_bytes_per_second for g in GPUS if g.half_flops}
    assert {key: value for key, value in ratio.items() if not 35 < value < 460} == {}
    assert len({gpu.key for gpu in GPUS}) == len(GPUS)


# As nvidia-smi names them, with its memory.total in MiB; None: not in the table.
DRIVER_NAMES = {
    ("NVIDIA GeForce GTX 1660 Ti", 6144): "gtx1660ti",
    ("NVIDIA GeForce RTX 2060", 12288): "rtx2060-12gb",
    ("NVIDIA GeForce RTX 2070 with Max-Q Design", 8192): "rtx2070-maxq",
    ("GeForce RTX 2080 Ti", 11019): "rtx2080ti",
    ("NVIDIA TITAN RTX", 24220): "titanrtx",
    ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", 6144): "rtx3050-6gb-laptop",
    ("NVIDIA GeForce RTX 3060 Laptop GPU", 6144): "rtx3060-laptop",
    ("NVIDIA GeForce RTX 3070", 8192): "rtx3070",
    ("NVIDIA GeForce RTX 3080", 12288): "rtx3080-12gb",
    ("NVIDIA GeForce RTX 4060 Ti", 16380): "rtx4060ti-16gb",
    ("NVIDIA GeForce RTX 4070 Laptop GPU", 8188): "rtx4070-laptop",
    ("NVIDIA GeForce RTX 4090 D", 24564): "rtx4090d",
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376): "rtx4090-laptop",
    ("NVIDIA GeForce RTX 5060 Ti", 8151): "rtx5060ti-8gb",
    ("NVIDIA GeForce RTX 5090 Laptop GPU", 24463): "rtx5090-laptop",
    ("NVIDIA GeForce RTX 5090 D v2", 24455): "rtx5090dv2",
    ("NVIDIA RTX A3000 Laptop GPU", 6144): "a3000-laptop",
    ("NVIDIA RTX A2000 8GB Laptop GPU", 8192): "a2000-8gb-laptop",
    ("NVIDIA RTX 4000 Ada Generation Laptop GPU", 12282): "rtx4000ada-laptop",
    ("NVIDIA RTX PRO 5000 Blackwell Generation Laptop GPU", 24463): "rtxpro5000-laptop",
    ("NVIDIA RTX PRO 5000 Blackwell", 48935): "rtxpro5000",
    ("NVIDIA RTX PRO 5000 72GB Blackwell", 73415): "rtxpro5000-72gb",
    ("Quadro RTX 5000 with Max-Q Design", 16384): "quadrortx5000-maxq",
    ("Quadro RTX 6000", 22698): "quadrortx6000",
    ("NVIDIA RTX A2000 12GB", 12282): "a2000-12gb",
    ("NVIDIA RTX 4000 SFF Ada Generation", 20475): "rtx4000sffada",
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887): "rtxpro6000-maxq",
    ("Tesla V100-SXM2-32GB", 32510): "v100-32gb",
    ("Tesla T4", 15109): "t4",
    ("NVIDIA A10G", 23028): "a10g",
    ("NVIDIA A40", 45634): "a40",
    ("NVIDIA A100-SXM4-40GB", 40536): "a100-40gb",
    ("NVIDIA A100 80GB PCIe", 81251): "a100-80gb-pcie",
    ("NVIDIA H100 80GB HBM3", 81559): "h100",
    ("NVIDIA H100 NVL", 95830): "h100-nvl",
    ("NVIDIA H800 PCIe", 81559): "h800-pcie",
    ("NVIDIA H20", 97871): "h20",
    ("NVIDIA GH200 480GB", 97871): "gh200",
    ("NVIDIA A800-SXM4-40GB", 40960): "a800-40gb",
    ("NVIDIA GB200", 189471): "gb200",
    ("NVIDIA B300 SXM6 AC", 275040): "b300",
    # relatives of known cards, parts of them, and older ones
    ("NVIDIA RTX A4000 Embedded GPU", 8192): None,
    ("NVIDIA RTX PRO 2000 Blackwell Generation Laptop GPU", 8151): None,
    ("Quadro T1000", 4096): None,
    ("NVIDIA A800 40GB Active", 40960): None,
    ("NVIDIA H20-3e", None): None,
    ("NVIDIA GH200 144G HBM3e", None): None,
    ("NVIDIA A100-SXM-64GB", 65536): None,
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864): None,
    ("NVIDIA H100 96GB HBM3", 97871): None,
    ("NVIDIA A10-24Q", 24576): None,
    ("NVIDIA GeForce RTX 3080", 24576): None,
    ("NVIDIA GeForce GTX 1080 Ti", 11264): None,
    ("cpu", None): None,
    ("", None): None,
}


@pytest.mark.parametrize(("named", "key"), DRIVER_NAMES.items(), ids=lambda value: str(value))
def test_a_drivers_name_is_the_right_card_or_none(named, key) -> None:
    name, mib = named
    found = lookup_gpu(name, mib and mib * 2**20)
    assert (found and found.key) == key


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("b200", "80gb"), ("a100-80gb", "80gb"), ("h100", "80gb"), ("a6000", "48gb")),
        *(("l40s", "48gb"), ("a100-40gb", "24gb"), ("rtx4090", "24gb"), ("a10g", "24gb")),
        *(("a4500", "16gb"), ("rtx4080", "16gb"), ("rtx4070ti", "12gb"), ("rtx3060", "12gb")),
        *(("rtx3080", "10gb"), ("rtx2080ti", "10gb"), ("rtx3070", "8gb"), ("rtx5060", "8gb")),
        # float16 alone: the same sizes, but for a T4's
        *(("t4", "t4"), ("v100-16gb", "t4"), ("quadrortx5000", "t4"), ("titanrtx", "24gb")),
        *(("rtx2070", "8gb"), ("rtx2060", "12gb"), ("gtx1650", "12gb")),
    ],
)
def test_a_card_gets_the_preset_of_its_size_although_drivers_report_less(key, name) -> None:
    card = find_gpu(key)
    assert preset_of_card(card.memory_bytes, card.compute_capability) == name
    assert load_preset(name).vram_gb is not None


def test_a_preset_of_a_size_begins_a_little_below_its_size() -> None:
    sizes = [80, 79.6, 45, 40, 22.5, 20, 15.99, 11.2, 11, 9.4, 9, 7.96, 7, 0.1]
    found = [preset_of_card(int(gigabytes * GIB), (8, 6)) for gigabytes in sizes]
    assert found == [
        *("80gb", "80gb", "48gb", "24gb", "24gb", "16gb", "16gb", "12gb", "10gb", "10gb"),
        *("8gb", "8gb", "12gb", "12gb"),
    ]
    assert preset_of_card(16 * GIB, (6, 0)) == "16gb"  # a P100, in float32


NAMES = {
    "rtx4090": "rtx4090",
    "RTX 4090": "rtx4090",
    "4090": "rtx4090",
    "rtx_4090_24gb": "rtx4090",
    "rtx 4090 laptop": "rtx4090-laptop",
    "rtx4070ti": "rtx4070ti",
    "RTX 4070 Ti SUPER": "rtx4070tisuper",
    "NVIDIA GeForce RTX 3060": "rtx3060",
    "3080": "rtx3080",
    "3080 12gb": "rtx3080-12gb",
    "NVIDIA RTX A6000": "a6000",
    "a100-80gb": "a100-80gb",
    "a100 80 GB": "a100-80gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA H100 PCIe": "h100-pcie",
    "rtx pro 6000": "rtxpro6000",
    "RTX PRO 5000 Blackwell": "rtxpro5000",
    "rtx 3500 ada laptop": "rtx3500ada-laptop",
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
    for name in ("a100", "rtx 4060 ti"):
        with pytest.raises(ValueError, match=rf"'{name}' could be \S+ or \S+; say which"):
            find_gpu(name)
    with pytest.raises(ValueError, match=r"known: rtx3080 \(10 GiB\), rtx3080-12gb"):
        find_gpu("NVIDIA GeForce RTX 3080", memory_bytes=24 * GIB)


def test_a_name_alone_is_enough_for_a_peak_that_all_its_cards_have() -> None:
    assert (
        lookup_gpu("NVIDIA GeForce RTX 4060 Ti").half_flops == find_gpu("rtx4060ti-8gb").half_flops
    )


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("rtx4095", r"unknown GPU 'rtx4095'; did you mean: .*rtx4090.*--vram 24"),
        ("voodoo", r"unknown GPU 'voodoo'; describe it by its memory in GB: --vram 24"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", r"is a MIG slice, .*: --vram GB, say --vram 5"),
    ],
)
def test_an_unknown_name_gets_the_way_out(name, answer) -> None:
    with pytest.raises(ValueError, match=answer):
        find_gpu(name)
