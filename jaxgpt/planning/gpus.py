"""Facts about graphics cards: memory, bandwidth, and the peak that MFU is measured against.

The cards are the rows of `gpus.csv`, of compute capability 7.0 (Volta) and newer. SMs, boost clock
and bandwidth are those of NVIDIA's architecture whitepapers and data sheets, or of the product page
where these have none. Memory is nvidia-smi's memory.total with a driver of 2023 or later: less than
nominal by what the driver keeps, and on GDDR6 data-centre cards by 1/16 for ECC.

Of the several peaks that vendors print, ours is the comparable one: dense (no sparsity), bfloat16
(float16 before 8.0) in, float32 accumulation, tensor cores. It is computed, and a test compares it
with those published:

    peak FLOP/s = SMs x clock x FLOPs per SM and clock

with 2,048 FLOPs on an A100 (8.0), 4,096 on Hopper (9.0), 8,192 on a B200 (10.0), 1,024 on others.
GeForce cards, the A10G, L20 and L40 accumulate in float32 at half of their chip's rate: 512. (An
RTX 4090's often-quoted 330 TFLOP/s are float16 accumulation, its 661 are sparse.) The clock is the
boost, or the lower one that a data sheet's peak implies; a GeForce laptop's is that of the highest
power limit; what NVIDIA does not publish for workstation laptops is from TechPowerUp's database.

Imports no JAX: the planner and the presets ask about cards that this machine does not have.
"""

import csv
import dataclasses
import difflib
import re
from pathlib import Path

from jaxgpt.config.fields import Config
from jaxgpt.config.presets import all_presets
from jaxgpt.config.resolved import BFLOAT16_FROM, FLOAT16_FROM
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
    boost_hz: float  # the clock of its tensor cores
    bandwidth_bytes_per_second: float
    half_flops: float | None  # dense peak per second, see above; None without tensor cores
    compute_capability: tuple[int, int]
    spellings: tuple[str, ...]  # names, as `_normalize` returns them


_BRANDS = ("nvidia", "geforce", "tesla", "generation", "gpu", "")  # do not distinguish cards


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


def _gpu(row: dict[str, str]) -> Gpu:
    """A row of the table, which is in the units of data sheets."""
    sms, hertz = int(row["SMs"]), float(row["MHz"]) * 1e6
    major, _, minor = row["capability"].partition(".")
    names = (row["name"], row["key"])
    return Gpu(
        key=row["key"],
        name=row["name"],
        memory_bytes=int(row["MiB"]) * MIB,
        sms=sms,
        boost_hz=hertz,
        bandwidth_bytes_per_second=float(row["GB/s"]) * 1e9,
        half_flops=sms * hertz * int(row["FLOPs"]) if row["FLOPs"] else None,
        compute_capability=(int(major), int(minor)),
        spellings=(*(_normalize(name)[0] for name in names), *row["other spellings"].split()),
    )


_TABLE = Path(__file__).with_suffix(".csv").read_text(encoding="utf-8")
GPUS: tuple[Gpu, ...] = tuple(_gpu(row) for row in csv.DictReader(_TABLE.splitlines()))


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
    if re.search(r"\bmig\b", name.lower()):
        raise UserError(
            f"GPU {name!r} is a MIG slice, a part of a card; plan for its memory: --vram GB, say "
            "--vram 5 for 1g.5gb"
        )
    other_sizes = [gpu for gpu in GPUS if _normalize(name)[0] in gpu.spellings]
    if other_sizes:
        sizes = ", ".join(f"{g.key} ({g.memory_bytes / GIB:.0f} GiB)" for g in other_sizes)
        raise UserError(f"GPU {name!r} is not known with that much memory; known: {sizes}")
    known = {spelling: gpu.key for gpu in GPUS for spelling in gpu.spellings}
    near = difflib.get_close_matches(_normalize(name)[0], known, n=5, cutoff=0.6)
    keys = ", ".join(dict.fromkeys(known[spelling] for spelling in near))
    raise UserError(
        f"unknown GPU {name!r}; "
        + (f"did you mean: {keys}? Or describe it" if near else "describe it")
        + " by its memory in GB: --vram 24"
    )


FLOAT16_PRESET = "t4"  # of 16 GB without bfloat16


def presets_for(dtype: str) -> list[Config]:
    """The presets to choose among on a card that computes in `dtype`; those of a T4 in float16."""
    return [
        cfg
        for cfg in all_presets()
        if dtype == "float16" or cfg.preset.partition("-")[0] != FLOAT16_PRESET
    ]


def preset_of_card(memory_bytes: int, compute_capability: tuple[int, int]) -> str:
    """The default preset of a card: that of the largest size that its memory reaches.

    A preset's number is the size of a card, not of a model: below 8 GB it is `12gb`, which needs
    the least. `t4` is for 16 GB without bfloat16.
    """
    sizes = (80, 48, 24, 16, 12, 10, 8)
    # Drivers report a little less than the number on the box (24,564 MiB on a 24 GB card).
    size = next((size for size in sizes if memory_bytes >= 0.93 * size * GIB), 12)
    float16_only = FLOAT16_FROM <= compute_capability < BFLOAT16_FROM
    return FLOAT16_PRESET if size == 16 and float16_only else f"{size}gb"


def unnamed_card(gigabytes: float) -> Gpu:
    """A card known only by its memory: treated as an RTX 3090 whose peak FLOP/s are unknown."""
    like = find_gpu("rtx3090")
    return dataclasses.replace(
        like,
        key=f"{gigabytes:g}gb",
        name=f"{gigabytes:g} GB card",
        memory_bytes=int(gigabytes * GIB),
        half_flops=None,
        spellings=(),
    )


def lookup_gpu(device_kind: str, memory_bytes: int | None = None) -> Gpu | None:
    """The card with a driver's name for it (`jax.Device.device_kind`); None if not in the table.

    Never a similar card: an RTX PRO 2000 of a laptop and an H100 96GB have other chips or clocks
    than the cards they are named after, and a wrong peak would give a wrong MFU. Cards of
    one name (an RTX 4060 Ti has 8 or 16 GB) need `memory_bytes`, unless their peaks are equal.
    """
    found = _matches(device_kind, memory_bytes)
    return found[0] if len({gpu.half_flops for gpu in found}) == 1 else None


def _matches(name: str, memory_bytes: int | None) -> list[Gpu]:
    spelling, size_gb = _normalize(name)
    found = [gpu for gpu in GPUS if spelling in gpu.spellings]
    # A GH200's name has the size of its CPU's memory.
    if size_gb and all(_normalize(gpu.name)[1] == size_gb for gpu in found):
        size_gb = None
    for wanted in (memory_bytes, size_gb and size_gb * GIB):
        # ECC takes 1/16 and a driver some more, so a nominal size is met within 8 %.
        found = [g for g in found if not wanted or abs(g.memory_bytes / wanted - 1) < 0.08]
    # Of an RTX 3080 and an RTX 3080 12GB, the name alone means the first.
    plain = [gpu for gpu in found if _normalize(gpu.name)[1] is None]
    return plain if len(plain) == 1 and not (memory_bytes or size_gb) else found
