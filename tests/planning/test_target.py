import pytest

from jaxgpt.planning import target
from jaxgpt.planning.gpus import GPUS, find_gpu


def test_every_card_is_described_or_known_to_be_too_old(monkeypatch) -> None:
    monkeypatch.setattr(target, "CUDA_PLUGINS", ("json",))
    for gpu in GPUS:
        if gpu.compute_capability < target.OLDEST:
            assert "no longer targets" in target.obstacle(gpu)
            continue
        assert target.obstacle(gpu) is None
        text = target.target_config(gpu)
        assert f"core_count: {gpu.sms} " in text
        assert f"device_memory_size: {gpu.memory_bytes}\n" in text
        major, minor = gpu.compute_capability
        assert f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in text


def test_without_the_plugin_the_answer_is_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(target, "CUDA_PLUGINS", ("no_such_module",))
    with pytest.raises(target.NoCompilerError, match=r"pip install -e '\.\[plan\]'"):
        target.card_devices(find_gpu("rtx4090"))[0]
