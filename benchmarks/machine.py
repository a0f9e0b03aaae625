"""What a measurement records about the machine; imports nothing of jaxgpt."""

import platform
import re
import subprocess
from pathlib import Path

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return names[0] if names else platform.processor()


def card_bytes() -> int | None:
    """Bytes in use on the first card, by nvidia-smi; None if it gives no answer."""
    try:
        answer = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=10)
        return int(answer.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
