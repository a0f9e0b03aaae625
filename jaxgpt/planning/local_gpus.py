"""The cards of this machine, from nvidia-smi, and those that CUDA shows to a program.

Imports no JAX: a preset is chosen before it starts.
"""

import dataclasses
import os
import re
import subprocess

from jaxgpt.config.resolved import BFLOAT16_FROM
from jaxgpt.planning.gpus import GIB, MIB, preset_of_card

QUERY = "name,memory.total,uuid,compute_cap,mig.mode.current"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalCard:
    """A card in this machine, or a MIG slice of one, as its driver describes it."""

    name: str
    memory_bytes: int
    uuid: str = ""  # 'GPU-...' or 'MIG-...'
    compute_capability: tuple[int, int] = BFLOAT16_FROM
    slices: tuple["LocalCard", ...] = ()  # of a card in MIG mode, which runs programs only on them


def local_cards() -> list[LocalCard]:
    """The NVIDIA cards that nvidia-smi lists; [] if it is absent, broken or hangs.

    All of them: neither CUDA_VISIBLE_DEVICES nor a scheduler's share is taken into account.
    """
    rows = _ask(f"--query-gpu={QUERY}", "--format=csv,noheader,nounits").splitlines()
    cells = [[cell.strip() for cell in row.split(",")] for row in rows]
    # A chip that shares the CPU's memory reports [N/A] for its own.
    known = [row for row in cells if len(row) == 5 and row[1].isdecimal()]
    slices = _mig_slices() if any(mode == "Enabled" for *_, mode in known) else {}
    return [
        LocalCard(
            name=name,
            memory_bytes=int(mib) * MIB,
            uuid=uuid,
            compute_capability=_version(capability),
            slices=slices.get(uuid, ()),
        )
        for name, mib, uuid, capability, _ in known
    ]


def _mig_slices() -> dict[str, tuple[LocalCard, ...]]:
    """The MIG slices of each card, by its UUID."""
    found: dict[str, tuple[LocalCard, ...]] = {}
    parent = card = ""
    for line in _ask("-L").splitlines():
        uuid = line.rpartition("UUID: ")[2].rstrip(")")
        if line.startswith("GPU "):  # GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-...)
            parent, card = uuid, line.partition(": ")[2].rpartition(" (")[0]
        elif size := re.search(r"MIG (\S*?(\d+)gb\S*)", line):  # MIG 1g.5gb  Device 0: (UUID: ...)
            memory = int(size[2]) * GIB
            one = LocalCard(name=f"{card} MIG {size[1]}", memory_bytes=memory, uuid=uuid)
            found[parent] = (*found.get(parent, ()), one)
    return found


def _ask(*arguments: str) -> str:
    """What nvidia-smi prints; '' if it is absent, broken or hangs."""
    command = ["nvidia-smi", *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else BFLOAT16_FROM


def visible_cards(cards: list[LocalCard]) -> list[LocalCard]:
    """Those of a machine's `cards` that CUDA shows to a program, in its order.

    CUDA_VISIBLE_DEVICES, if it is set, lists indices and UUIDs; CUDA stops at the first entry that
    is no card, and shows none if one is named twice. Of a card in MIG mode it shows one slice.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        found = [card.slices[0] if card.slices else card for card in cards]
        return found[:1] if cards and cards[0].slices else found
    visible: list[LocalCard] = []
    for entry in named.split(","):
        card = _named(entry, cards)
        if card is None:
            break
        if card in visible:
            return []
        visible.append(card)
    return visible


def _named(entry: str, cards: list[LocalCard]) -> LocalCard | None:
    """The card or slice that an entry of CUDA_VISIBLE_DEVICES names; None if there is none."""
    if entry.startswith(("GPU-", "MIG-")):  # or the beginning of one
        each = [one for card in cards for one in (card, *card.slices)]
        found = [one for one in each if one.uuid.startswith(entry)]
    else:
        index = re.match(r"\s*\+?(\d+)", entry)  # as C's strtol: ' 1' and '1x' are 1
        found = cards[int(index[1]) :][:1] if index else []
    if len(found) != 1:
        return None
    return found[0].slices[0] if found[0].slices else found[0]


def visible_card() -> LocalCard | None:
    """The card that JAX uses first; None if no card is visible."""
    return next(iter(visible_cards(local_cards())), None)


def preset_of_this_machine() -> str | None:
    """The preset for the card that a run would use; None without a card."""
    card = visible_card()
    return None if card is None else preset_of_card(card.memory_bytes, card.compute_capability)


def count_visible_cards() -> int:
    """How many cards are visible to a program."""
    if cards := local_cards():
        return len(visible_cards(cards))
    # A container may have cards without nvidia-smi.
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return sum(name.strip() not in ("", "-1") for name in names)
