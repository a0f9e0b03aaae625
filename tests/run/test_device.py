import os
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import jax
import pytest
from helpers.configs import resolved

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, with_fields
from jaxgpt.config.presets import all_presets, load_preset
from jaxgpt.config.resolved import choose_dtype
from jaxgpt.model.attention import compute_capability
from jaxgpt.planning.gpus import POOL_SHARE
from jaxgpt.run import device as hardware
from jaxgpt.run.device import (
    DETERMINISTIC,
    MEMORY_SETTINGS,
    MOST_CPU_DEVICES,
    check_determinism,
    choose_devices,
    memory_in_use,
    prepare_environment,
)

DEMO, FOR_GPU = load_preset("demo"), load_preset("24gb")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", *MEMORY_SETTINGS):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back after it
        monkeypatch.delenv(name)


@pytest.fixture
def no_plugin(monkeypatch):
    monkeypatch.setattr(hardware, "PLUGINS", ("no_such_module",))


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(hardware, "PLUGINS", ("no_such_module", "json"))


def on(device: str, cfg: Config) -> Config:
    return with_fields(cfg, device=device)


# ---------------------------------------------------------------- before JAX is imported


@pytest.mark.parametrize("name", [cfg.preset for cfg in all_presets() if cfg.vram_gb])
@pytest.mark.usefixtures("no_plugin")
def test_a_preset_for_a_card_stops_without_gpu_support_and_names_two_ways_out(name):
    cfg = load_preset(name)
    with pytest.raises(ConfigError) as refused:
        prepare_environment(cfg)
    message = str(refused.value)
    assert f"preset {name} is made for a {cfg.vram_gb} GB GPU" in message
    assert "pip install -e '.[cuda]'" in message
    assert "--device cpu" in message


@pytest.mark.usefixtures("no_plugin")
def test_asking_for_a_gpu_stops_without_gpu_support_whatever_the_preset():
    with pytest.raises(ConfigError, match="--device gpu, but JAX is installed without GPU support"):
        prepare_environment(on("gpu", DEMO))


@pytest.mark.usefixtures("no_plugin")
def test_the_way_out_works_and_keeps_jax_on_the_cpu():
    prepare_environment(on("cpu", FOR_GPU))
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ


@pytest.mark.usefixtures("no_plugin")
def test_a_preset_for_any_machine_leaves_the_choice_to_jax():
    prepare_environment(DEMO)
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.usefixtures("plugin")
def test_most_of_the_cards_memory_is_taken():
    prepare_environment(FOR_GPU)
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == str(POOL_SHARE)


@pytest.mark.parametrize("name", MEMORY_SETTINGS)
@pytest.mark.usefixtures("plugin")
def test_the_users_own_memory_settings_win(monkeypatch, name):
    monkeypatch.setenv(name, "0.5")
    prepare_environment(FOR_GPU)
    assert {setting: os.environ.get(setting) for setting in MEMORY_SETTINGS} == {
        **dict.fromkeys(MEMORY_SETTINGS),
        name: "0.5",
    }


@pytest.mark.parametrize("flags", ["", "--xla_dump_to=x"])
def test_the_same_bits_are_asked_of_xla_beside_what_the_user_asks(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    prepare_environment(with_fields(DEMO, deterministic=True))
    assert os.environ["XLA_FLAGS"] == f"{flags} {DETERMINISTIC}".strip()


@pytest.mark.parametrize(
    "flag", ["--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops=true"]
)
def test_determinism_asked_of_xla_alone_is_refused_where_it_would_fail(monkeypatch, flag):
    cfg = resolved(DEMO, "bfloat16")
    monkeypatch.setenv("XLA_FLAGS", flag)
    with pytest.raises(ConfigError, match="needs --deterministic=True as well"):
        check_determinism(cfg, "gpu")
    check_determinism(cfg, "cpu")
    check_determinism(resolved(DEMO, "float32"), "gpu")
    check_determinism(resolved(with_fields(DEMO, deterministic=True), "bfloat16"), "gpu")
    monkeypatch.setenv("XLA_FLAGS", f"{flag.partition('=')[0]}=false")
    check_determinism(cfg, "gpu")


def test_flags_of_xla_in_a_file_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    with pytest.raises(ConfigError, match="is a file that cannot be read"):
        prepare_environment(with_fields(DEMO, deterministic=True))
    monkeypatch.setenv("XLA_FLAGS", "\n")
    prepare_environment(DEMO)
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    (tmp_path / "flags").write_text("--xla_dump_to=x\n--xla_dump_hlo_as_text\n")
    prepare_environment(with_fields(DEMO, deterministic=True))
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x --xla_dump_hlo_as_text {DETERMINISTIC}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("JAX_ENABLE_X64", "1"), ("JAX_DISABLE_JIT", "True"), ("JAX_DEFAULT_PRNG_IMPL", "rbg")),
        ("JAX_TRANSFER_GUARD", "disallow"),
    ],
)
def test_settings_of_jax_that_change_a_runs_arithmetic_are_refused(monkeypatch, name, value):
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "warn")
    prepare_environment(on("cpu", DEMO))
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}: .*; unset it: unset {name}"):
        prepare_environment(on("cpu", DEMO))


@pytest.mark.parametrize("name", ["sample", "evaluate", "export", "bench", "plan"])
def test_every_command_that_computes_refuses_them(tiny_run, tmp_path, monkeypatch, capsys, name):
    flags = {
        "export": ["--out-dir", str(tiny_run), "--to", str(tmp_path / "x")],
        "bench": ["--preset", "demo"],
        "plan": ["--gpu", "rtx4090"],
    }
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    with pytest.raises(SystemExit):
        import_module(f"jaxgpt.{name}").main(flags.get(name, ["--out-dir", str(tiny_run)]))
    assert f"python -m jaxgpt.{name}: JAX_ENABLE_X64=1: " in capsys.readouterr().err


def test_settings_that_jax_cannot_read_are_named():
    code = "from jaxgpt.run.device import import_jax\nimport_jax()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"JAX_DEFAULT_MATMUL_PRECISION": "x"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert 'UserError: JAX cannot be imported (Invalid value "x" for' in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("/no/flags", "is a file that cannot be read"),
        ("--xla_dump_to=x --xla_no_such=1", r"XLA refuses that \(Unknown flag.*--xla_no_such=1"),
        ("--xla_gpu_deterministic_ops=7", r"XLA refuses that \(Couldn't interpret value 7 for"),
    ],
)
def test_flags_that_xla_would_end_the_process_for_are_named(monkeypatch, flags, said):
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(ConfigError, match=f"^XLA_FLAGS={flags}: {said}"):
        prepare_environment(on("cpu", DEMO))


def test_the_cpu_needs_no_flag_for_the_same_bits():
    prepare_environment(with_fields(DEMO, device="cpu", deterministic=True))
    assert "XLA_FLAGS" not in os.environ


# ---------------------------------------------------------------- the device itself


@pytest.fixture
def no_gpu(monkeypatch):
    def devices(platform: str | None = None) -> list[SimpleNamespace]:
        if platform == "gpu":
            raise RuntimeError("Unknown backend: 'gpu' requested\nmore\nlines")
        return [SimpleNamespace(platform="cpu")]

    monkeypatch.setattr(jax, "devices", devices)


@pytest.mark.parametrize("cfg", [FOR_GPU, on("gpu", DEMO)], ids=["for a GPU", "asked for"])
@pytest.mark.usefixtures("no_gpu")
def test_a_run_that_needs_a_gpu_never_falls_back_to_the_cpu(cfg):
    with pytest.raises(ConfigError) as refused:
        choose_devices(cfg)
    message = str(refused.value)
    assert "JAX finds none (Unknown backend: 'gpu' requested)" in message
    assert "--device cpu" in message


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_other_runs_take_what_there_is():
    assert choose_devices(DEMO)[0].platform == "cpu"
    assert choose_devices(on("cpu", FOR_GPU))[0].platform == "cpu"


def test_a_gpu_that_is_there_is_taken(monkeypatch):
    found = {"gpu": [SimpleNamespace(platform="gpu")], "cpu": [SimpleNamespace(platform="cpu")]}
    monkeypatch.setattr(jax, "devices", lambda platform="gpu": found[platform])
    assert choose_devices(FOR_GPU)[0].platform == "gpu"
    assert choose_devices(DEMO)[0].platform == "gpu"
    assert choose_devices(on("cpu", FOR_GPU))[0].platform == "cpu"


@pytest.mark.parametrize(
    ("setting", "devices"),
    [
        ({}, MOST_CPU_DEVICES),
        ({"JAX_NUM_CPU_DEVICES": "2"}, 2),
        ({"XLA_FLAGS": "a file"}, 2),
    ],
)
def test_a_cpu_is_divided_as_the_mesh_says_unless_the_user_has_said_otherwise(
    tmp_path, setting, devices
):
    (tmp_path / "a file").write_text("--xla_force_host_platform_device_count=2")
    code = (
        "from jaxgpt.run.device import choose_devices; from jaxgpt.config.fields import Config; "
        "cfg = Config(mesh='data=65', device='cpu', batch_size=1, effective_batch_size=65); "
        "print(len(choose_devices(cfg)))"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, **setting}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(devices), done.stderr


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((0, 0), "float32")],
)
def test_half_precision_is_used_where_the_card_has_it(capability, dtype):
    assert choose_dtype("auto", "gpu", capability) == dtype


def test_bfloat16_is_refused_on_a_card_without_it():
    with pytest.raises(ConfigError, match=r"needs a GPU of compute capability 8.0.*has 7.5"):
        choose_dtype("bfloat16", "gpu", (7, 5))
    assert choose_dtype("float32", "gpu", (7, 5)) == "float32"


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert choose_dtype("auto", "cpu", (0, 0)) == "float32"
    assert choose_dtype("bfloat16", "cpu", (0, 0)) == "bfloat16"


@pytest.mark.parametrize(
    ("device", "capability"),
    [
        (SimpleNamespace(compute_capability="12.0"), (12, 0)),
        (SimpleNamespace(compute_capability="8"), (8, 0)),
        (SimpleNamespace(compute_capability="gfx1100"), (0, 0)),
        (SimpleNamespace(), (0, 0)),
    ],
)
def test_compute_capability_is_a_pair_of_numbers(device, capability):
    assert compute_capability(device) == capability


def test_memory_is_told_where_the_device_tells_it():
    stats = {"peak_bytes_in_use": 3, "bytes_limit": 8, "num_allocs": 1}
    device = SimpleNamespace(memory_stats=lambda: stats)
    assert memory_in_use(device) == {"memory/peak_bytes": 3.0, "memory/limit_bytes": 8.0}
    assert memory_in_use(SimpleNamespace(memory_stats=lambda: None)) == {}
    assert memory_in_use(SimpleNamespace(memory_stats=lambda: {"bytes_limit": 8})) == {
        "memory/limit_bytes": 8.0
    }
