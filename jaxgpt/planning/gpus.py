"""Facts about graphics cards: memory, bandwidth, and the bf16 peak that MFU is measured against.

Of the several peaks that vendors print, ours is the comparable one: dense (no sparsity), bfloat16
in, float32 accumulation, tensor cores. It follows one rule, which the tests check for each card:

    peak FLOP/s = SMs x boost clock x FLOPs per SM and clock

with 2,048 FLOPs on an A100 (compute capability 8.0), 1,024 on other Ampere, Ada and RTX Blackwell
chips (8.6, 8.9, 12.0), 4,096 on Hopper (9.0) and 8,192 on a B200 (10.0). GeForce cards, and the
A10G, accumulate in float32 at half of their chip's rate: 512. (An RTX 4090's often-quoted 330
TFLOP/s are float16 accumulation, its 661 are sparse.) Tables of "AI TOPS" show none of this.

Imports no JAX: the planner and the presets ask about cards that this machine does not have.
"""

import dataclasses
import difflib
import os
import re
import subprocess

from jaxgpt.config.presets import preset_for_memory
from jaxgpt.errors import UserError

MIB = 2**20
GIB = 2**30
# Share of a card's memory that `train` gives to JAX's pool. JAX's own default is 75 %, which leaves
# 6 of 24 GB unused. The rest is for the CUDA context, cuBLAS workspaces and the desktop.
POOL_SHARE = 0.92


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card, as its vendor and its driver describe it."""

    key: str  # our name for it, in flags and presets
    name: str
    memory_bytes: int  # all of it, as `nvidia-smi` reports memory.total
    sms: int  # streaming multiprocessors in use
    boost_hz: float  # Hopper: the lower clock at which its tensor cores run
    bandwidth_bytes_per_second: float
    bf16_flops: float | None  # dense peak per second; None without bf16 tensor cores
    compute_capability: tuple[int, int]
    source: str  # where SMs, clock, bandwidth and peak were read
    spellings: tuple[str, ...]  # other names, as `_normalize` returns them


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalCard:
    """A card in this machine, by its driver's name for it."""

    name: str
    memory_bytes: int


def _gpu(
    key: str,
    name: str,
    mib: int,
    sms: int,
    mhz: int,
    gb_per_second: float,
    teraflops: float | None,
    capability: tuple[int, int],
    source: str,
    *spellings: str,
) -> Gpu:
    """One row of the table below, in the units of data sheets."""
    return Gpu(
        key=key,
        name=name,
        memory_bytes=mib * MIB,
        sms=sms,
        boost_hz=mhz * 1e6,
        bandwidth_bytes_per_second=gb_per_second * 1e9,
        bf16_flops=None if teraflops is None else teraflops * 1e12,
        compute_capability=capability,
        source=source,
        spellings=(_normalize(name)[0], *spellings),
    )


_BRANDS = ("nvidia", "geforce", "tesla", "generation", "")  # do not distinguish cards


def _normalize(name: str) -> tuple[str, int | None]:
    """(`name` without brand, case, punctuation and size, the size in GB).

    'NVIDIA GeForce RTX 4090', 'rtx4090' and '4090' are all ('4090', None); 'A100-SXM4-80GB' is
    ('a100sxm4', 80). Words that denote another card ('Laptop', 'SUPER', 'D') stay.
    """
    text = name.lower().replace("_", " ")
    size = re.search(r"\b(\d+)[\s-]?gb?\b", text)
    if size:
        text = text[: size.start()] + " " + text[size.end() :]
    words = [w for w in re.split(r"[^a-z0-9]+", text) if w not in _BRANDS]
    return "".join(words).removeprefix("rtx"), int(size[1]) if size else None


# Memory is nvidia-smi's memory.total with a driver of 2023 or later. It falls short of nominal by
# what the driver keeps, and on GDDR6 data-centre cards by 1/16 for ECC (A10G, L4, L40S, T4); RTX
# A and Ada workstation cards are delivered with ECC off and lose as much when it is switched on.
_GA102 = "GA102 whitepaper"
_ADA = "Ada GPU architecture whitepaper"
_BLACKWELL = "RTX Blackwell GPU architecture whitepaper"
_A100 = "A100 data sheet"
_H100 = "H100 architecture whitepaper"
_BY_RULE = "product page; peak by the rule above"
# fmt: off
GPUS: tuple[Gpu, ...] = (
    #    key, name, MiB, SMs, boost MHz, GB/s, bf16 TFLOP/s, capability, source, other spellings
    _gpu("rtx3060", "RTX 3060", 12288, 28, 1777, 360, 25.5, (8, 6), _BY_RULE),
    _gpu("rtx3080", "RTX 3080", 10240, 68, 1710, 760, 59.5, (8, 6), _GA102),
    _gpu("rtx3090", "RTX 3090", 24576, 82, 1695, 936, 71.0, (8, 6), _GA102),
    _gpu("rtx3090ti", "RTX 3090 Ti", 24564, 84, 1860, 1008, 80.0, (8, 6), _BY_RULE),
    _gpu("rtx4060ti-16gb", "RTX 4060 Ti", 16380, 34, 2535, 288, 44.1, (8, 9), _BY_RULE),
    _gpu("rtx4070ti", "RTX 4070 Ti", 12282, 60, 2610, 504, 80.2, (8, 9), _ADA),
    _gpu("rtx4070tisuper", "RTX 4070 Ti SUPER", 16376, 66, 2610, 672, 88.2, (8, 9), _BY_RULE),
    _gpu("rtx4080", "RTX 4080", 16376, 76, 2505, 716.8, 97.5, (8, 9), _ADA),
    _gpu("rtx4090", "RTX 4090", 24564, 128, 2520, 1008, 165.2, (8, 9), _ADA),
    _gpu("rtx5070ti", "RTX 5070 Ti", 16303, 70, 2452, 896, 87.9, (12, 0), _BLACKWELL),
    _gpu("rtx5080", "RTX 5080", 16303, 84, 2617, 960, 112.6, (12, 0), _BLACKWELL),
    _gpu("rtx5090", "RTX 5090", 32607, 170, 2407, 1792, 209.5, (12, 0), _BLACKWELL),

    # Workstations. Data sheets print the sparse peak, twice ours (RTX 6000 Ada: fp8, four times).
    _gpu("a4000", "RTX A4000", 16376, 48, 1560, 448, 76.7, (8, 6), "RTX A4000 data sheet"),
    _gpu("a5000", "RTX A5000", 24564, 64, 1695, 768, 111.1, (8, 6), "RTX A5000 data sheet"),
    _gpu("a6000", "RTX A6000", 49140, 84, 1800, 768, 154.8, (8, 6), _GA102),
    _gpu("rtx6000ada", "RTX 6000 Ada Generation", 49140, 142, 2505, 960, 364.2, (8, 9),
         "RTX 6000 Ada data sheet"),

    # Data centres. The T4's and V100s' tensor cores know float16 only.
    _gpu("t4", "T4", 15360, 40, 1590, 320, None, (7, 5), "Turing architecture whitepaper"),
    _gpu("v100-16gb", "V100 16GB", 16384, 80, 1530, 900, None, (7, 0), "V100 data sheet",
         "v100sxm2", "v100pcie"),
    _gpu("v100-32gb", "V100 32GB", 32768, 80, 1530, 900, None, (7, 0), "V100 data sheet",
         "v100sxm2", "v100sxm3", "v100pcie"),
    _gpu("a10g", "A10G", 23028, 80, 1710, 600, 70.0, (8, 6), "A10G data sheet"),
    _gpu("l4", "L4", 23034, 58, 2040, 300, 121.0, (8, 9), "L4 data sheet"),
    _gpu("l40s", "L40S", 46068, 142, 2520, 864, 362.05, (8, 9), "L40S data sheet"),
    _gpu("a100-40gb", "A100 40GB", 40960, 108, 1410, 1555, 312.0, (8, 0), _A100,
         "a100sxm", "a100sxm4", "a100pcie"),
    _gpu("a100-80gb", "A100 80GB", 81920, 108, 1410, 2039, 312.0, (8, 0), _A100,
         "a100sxm", "a100sxm4"),
    _gpu("a100-80gb-pcie", "A100 80GB PCIe", 81920, 108, 1410, 1935, 312.0, (8, 0), _A100),
    _gpu("h100", "H100 80GB", 81559, 132, 1830, 3350, 989.4, (9, 0), _H100,
         "h100hbm3", "h100sxm", "h100sxm5"),
    _gpu("h100-pcie", "H100 PCIe", 81559, 114, 1620, 2000, 756.0, (9, 0), _H100),
    _gpu("h200", "H200", 143771, 132, 1830, 4800, 989.4, (9, 0), "H200 data sheet", "h200sxm"),
    # Its clock is not published; this one is what the published peak implies.
    _gpu("b200", "B200", 183359, 148, 1856, 8000, 2250.0, (10, 0), "HGX B200 data sheet"),
)
# fmt: on


def find_gpu(name: str, memory_bytes: int | None = None) -> Gpu:
    """The card that a user means: 'rtx4090', '4090', 'A100-SXM4-80GB', 'Tesla T4', ...

    Args:
        name: case, punctuation and brand do not matter; a size such as '80GB' may be part of it.
        memory_bytes: all of the card's memory; distinguishes cards of one name.

    Raises:
        UserError: if no card or more than one matches; the message has the nearest names.
    """
    found = _matches(name, memory_bytes)
    if len(found) == 1:
        return found[0]
    if found:
        keys = " or ".join(gpu.key for gpu in found)
        raise UserError(f"GPU {name!r} could be {keys}; say which")
    other_sizes = _matches(_normalize(name)[0], None)
    if other_sizes:
        sizes = ", ".join(f"{g.key} ({g.memory_bytes / GIB:.0f} GiB)" for g in other_sizes)
        raise UserError(f"GPU {name!r} is not known with that much memory; known: {sizes}")
    known = {spelling: gpu.key for gpu in GPUS for spelling in (gpu.key, *gpu.spellings)}
    near = difflib.get_close_matches(_normalize(name)[0], known, n=5, cutoff=0.5)
    keys = ", ".join(dict.fromkeys(known[s] for s in near)) or ", ".join(g.key for g in GPUS)
    raise UserError(f"unknown GPU {name!r}; {'did you mean' if near else 'known'}: {keys}")


def unnamed_card(gigabytes: float) -> Gpu:
    """A card known only by its memory: treated as an RTX 3090 whose peak FLOP/s are unknown."""
    like = find_gpu("rtx3090")
    return dataclasses.replace(
        like,
        key=f"{gigabytes:g}gb",
        name=f"{gigabytes:g} GB card",
        memory_bytes=int(gigabytes * GIB),
        bf16_flops=None,
        source="--vram",
        spellings=(),
    )


def lookup_gpu(device_kind: str, memory_bytes: int | None = None) -> Gpu | None:
    """The card with a driver's name for it (`jax.Device.device_kind`); None if not in the table.

    Never a similar card: a laptop's RTX 4090 and an H100 NVL have other chips or clocks than the
    cards they are named after, and a wrong peak would give a wrong MFU. Two cards can share a name
    (an RTX 3080 has 10 or 12 GB); `memory_bytes` distinguishes them.
    """
    found = _matches(device_kind, memory_bytes)
    return found[0] if len(found) == 1 else None


def _matches(name: str, memory_bytes: int | None) -> list[Gpu]:
    spelling, size_gb = _normalize(name)
    found = [gpu for gpu in GPUS if spelling in gpu.spellings]
    for wanted in (memory_bytes, size_gb and size_gb * GIB):
        # ECC takes 1/16 and a driver some more, so a nominal size is met within 8 %.
        found = [g for g in found if not wanted or abs(g.memory_bytes / wanted - 1) < 0.08]
    return found


def local_cards() -> list[LocalCard]:
    """The NVIDIA cards that nvidia-smi lists; [] if it is absent, broken or hangs.

    All of them: neither CUDA_VISIBLE_DEVICES nor a scheduler's share is taken into account.
    """
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in answer.stdout.splitlines()]
    # A chip that shares the CPU's memory reports [N/A] for its own.
    return [
        LocalCard(name=name.strip(), memory_bytes=int(mib) * MIB)
        for name, _, mib in rows
        if mib.strip().isdecimal()
    ]


def visible_card() -> LocalCard | None:
    """The first card visible to a program: of those in CUDA_VISIBLE_DEVICES, if that is set."""
    cards = local_cards()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    # Anything but a valid index (a UUID, for example) counts as the first card.
    index = int(first) if first.isdecimal() and int(first) < len(cards) else 0
    return cards[index] if cards else None


def tier_of_this_machine() -> str | None:
    """The preset for the card that a run would use; None without a card."""
    card = visible_card()
    return preset_for_memory(card.memory_bytes / GIB) if card else None


def count_visible_cards() -> int:
    """How many cards are visible to a program: those in CUDA_VISIBLE_DEVICES, if that is set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return len(local_cards())
    return sum(name.strip() not in ("", "-1") for name in named.split(","))
