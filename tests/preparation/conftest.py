"""The stand-in Hub, and what `prepare` makes of its files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_files import SMALL, build_hub, shards
from helpers.hub_server import Hub, serve

from jaxgpt.prepare import main


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the stand-in Hub."""
    folder = tmp_path_factory.mktemp("hub")
    build_hub(folder)
    return folder


@pytest.fixture
def hub(stored: Path) -> Iterator[Hub]:
    with serve(stored) as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The client connects to the stand-in only."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }


@pytest.fixture(scope="session")
def expected(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of the same files, read from the disk."""
    out = tmp_path_factory.mktemp("local") / "fineweb"
    files = stored / "HuggingFaceFW" / "fineweb" / "sample" / "10BT"
    assert main([str(files), "--out", str(out), *SMALL]) == 0
    return shards(out)
