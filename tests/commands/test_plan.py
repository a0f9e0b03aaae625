import json
import shlex

import pytest
from helpers.configs import parse

from jaxgpt import plan
from jaxgpt.config.presets import all_presets
from jaxgpt.planning import target
from jaxgpt.planning.gpus import GPUS
from jaxgpt.planning.local_gpus import LocalCard

PROMISED = (
    *("gpu", "capacity_bytes", "parameters", "peak_bytes", "host_bytes", "breakdown_bytes"),
    *("fits", "method", "batch_size", "gradient_accumulation_steps", "remat", "flops_per_token"),
    *("tokens_per_step", "total_tokens", "tokens_per_second", "hours", "command"),
)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Estimates everywhere: what the compiler says is test_memory's."""
    monkeypatch.setattr(target, "CUDA_PLUGINS", ("no_such_module",))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def answer(capsys):
    """The JSON that a command line prints."""

    def ask(*argv: str) -> dict:
        assert plan.main([*argv, "--json"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out)

    return ask


@pytest.fixture
def shown(capsys):
    """What a command line prints for people, in one line."""

    def show(*argv: str) -> str:
        assert plan.main(argv) == 0
        return " ".join(capsys.readouterr().out.split())

    return show


@pytest.fixture
def refused(capsys):
    """The message that a command line ends with."""

    def refuse(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            plan.main(argv)
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        assert "Traceback" not in err
        return " ".join(err.split())

    return refuse


def parsed(command: str):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "jaxgpt.train"]
    return parse(words[3:])


def test_one_run_has_all_that_is_promised(answer) -> None:
    got = answer("--preset", "24gb", "--gpu", "rtx3090")
    assert set(PROMISED) <= got.keys()
    assert got["fits"]
    assert got["method"] == "estimated"
    assert sum(got["breakdown_bytes"].values()) == got["peak_bytes"]
    assert list(got["breakdown_bytes"]) == [
        *("parameters", "optimizer", "accumulator", "activations", "logits", "workspace")
    ]
    assert got["hours"] == pytest.approx(got["total_tokens"] / got["tokens_per_second"] / 3600)
    assert got["command"] == "python -m jaxgpt.train --preset 24gb"


ONE_OF_EACH = {gpu.compute_capability: gpu for gpu in GPUS if gpu.half_flops}


@pytest.mark.parametrize("gpu", ONE_OF_EACH.values(), ids=lambda gpu: gpu.key)
def test_every_kind_of_card_can_be_planned_for(answer, gpu) -> None:
    got = answer("--preset", "12gb", "--batch-size", "4", "--gpu", gpu.key)
    assert got["fits"]
    has_bfloat16 = gpu.compute_capability >= (8, 0)
    assert got["dtype"] == ("bfloat16" if has_bfloat16 else "float16")
    assert got["attention"].startswith("cuDNN" if has_bfloat16 else "in chunks of queries")
    assert got["hours"] is not None


def test_flags_of_train_describe_the_run_and_come_back_in_the_command(answer) -> None:
    flags = ["--n-layer", "24", "--n-head", "16", "--n-embd", "1024", "--remat", "full"]
    flags += ["--dtype", "float32", "--lr-decay-iters", "1000", "--vocab-size", "60032"]
    got = answer("--gpu", "h100", "--preset", "24gb", "--batch-size", "8", *flags)
    assert (got["n_layer"], got["remat"], got["batch_size"]) == (24, "full", 8)
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        assert f"{name} {value}" in got["command"]
        assert f"{name} {value}" in got["command_that_fits"]


def test_what_does_not_fit_comes_with_what_does(answer, shown) -> None:
    argv = ["--preset", "80gb", "--gpu", "rtx4070ti"]
    got = answer(*argv)
    assert not got["fits"]
    cfg = parsed(got["command_that_fits"])
    assert cfg.effective_batch_size == 512
    again = answer("--gpu", "rtx4070ti", *shlex.split(got["command_that_fits"])[3:])
    assert again["fits"]
    assert "It does not fit." in shown(*argv)


def test_fit_or_auto_keeps_the_effective_batch_and_what_is_given(answer) -> None:
    got = answer("--preset", "24gb", "--gpu", "rtx4070ti", "--fit")
    assert got["fits"]
    assert got["batch_size"] * got["gradient_accumulation_steps"] == 512
    assert got == answer("--preset", "24gb", "--gpu", "rtx4070ti", "--batch-size", "auto")
    given = answer("--preset", "24gb", "--gpu", "rtx4070ti", "--fit", "--remat", "full")
    assert given["remat"] == "full"
    assert given["batch_size"] >= got["batch_size"]


def test_the_overview_lists_every_preset_for_a_card_and_what_to_run(answer, shown) -> None:
    got = answer("--gpu", "rtx4090")
    presets = got["presets"]
    card = {cfg.preset for cfg in all_presets() if cfg.vram_gb}
    assert {p["preset"] for p in presets} == card - {"t4", "t4-modern"}  # it has bfloat16
    fits = [p["fits"] for p in presets]
    assert fits == sorted(fits, reverse=True)  # what fits is first, and of that the best
    losses = [p["predicted_loss"] for p in presets if p["fits"]]
    assert losses == sorted(losses)
    text = shown("--gpu", "rtx4090")
    assert "24gb-1558m" in text
    assert got["largest_model"]["command"] in text
    assert text.index("Memory is estimated") < text.index("preset")  # before the table


def test_what_to_start_with_has_the_least_predicted_loss_for_the_hours_it_says(answer) -> None:
    got = answer("--gpu", "rtx4090")
    best = got["recommended"]
    name = best["preset"]
    assert name == got["presets"][0]["preset"]
    assert got["hours_given"] == 48 == pytest.approx(best["hours"], rel=0.01)
    cfg, preset = parsed(got["command"]), parse(["--preset", name])
    assert (cfg.preset, cfg.max_iters) == (name, best["total_tokens"] // 524_288)
    assert cfg.optimizer.warmup_iters == min(preset.optimizer.warmup_iters, cfg.max_iters // 20)
    assert cfg.optimizer.learning_rate == preset.optimizer.learning_rate
    assert cfg.model.arch == "qwen3"  # which needs fewer tokens


def test_the_largest_model_has_the_rate_for_its_size_its_presets_name_and_a_time(
    answer, shown
) -> None:
    largest = answer("--gpu", "rtx4090")["largest_model"]
    assert largest["preset"] == "24gb-1558m"
    cfg = parsed(largest["command"])
    assert (cfg.model.n_layer, cfg.optimizer.learning_rate) == (48, 2e-4)
    assert f"{largest['total_tokens'] / 1e9:.1f}B tokens in 42 d" in shown("--gpu", "rtx4090")
    other = answer("--gpu", "rtx3070")["largest_model"]  # of no preset's shape
    assert parsed(other["command"]).optimizer.min_lr == other["suggested_learning_rate"] / 10
    assert "--out-dir" in other["command"]


def test_a_card_without_bfloat16_is_told_why_and_what_fits_it(answer, shown) -> None:
    got = answer("--gpu", "t4")
    assert any("7.5 has no bfloat16" in reason for reason in got["reasons"])
    assert [p["fits"] for p in got["presets"] if p["preset"] == "t4"] == [True]
    assert got["recommended"]["mfu_source"].startswith("assumed")
    text = shown("--gpu", "t4")
    assert text.index("7.5 has no bfloat16") < text.index("24gb-modern")
    assert got["command"] in text


def test_hours_find_the_least_predicted_loss(answer, shown) -> None:
    got = answer("--gpu", "rtx4090", "--hours", "48")
    losses = [choice["predicted_loss"] for choice in got["choices"]]
    assert got["predicted_loss"] == min(losses)
    assert got["hours"] == pytest.approx(48, rel=0.02)
    assert 5 < got["tokens_per_parameter"] < 100
    cfg = parsed(got["command"])
    assert cfg.optimizer.warmup_iters <= cfg.max_iters / 20
    assert cfg.preset == got["preset"] == "48gb-280m"  # it has that shape
    assert {choice["arch"] for choice in got["choices"]} == {got["arch"]} == {"gpt2"}
    assert cfg.optimizer.min_lr == pytest.approx(got["suggested_learning_rate"] / 10)
    more = answer("--gpu", "rtx4090", "--hours", "480")
    assert more["parameters"] > got["parameters"]
    assert "prediction" in shown("--gpu", "rtx4090", "--hours", "48")


def test_hours_say_whether_gpt2_with_adamw_or_the_modern_recipe_is_better(answer, shown) -> None:
    flags = ("--gpu", "rtx4090", "--hours", "48")
    gpt2, modern = answer(*flags), answer(*flags, "--preset", "24gb-modern")
    assert gpt2["other_recipe"]["predicted_loss"] == pytest.approx(
        modern["predicted_loss"], abs=0.01
    )
    assert modern["other_recipe"]["predicted_loss"] == pytest.approx(
        gpt2["predicted_loss"], abs=0.01
    )
    text = shown(*flags)
    assert f"with Muon would reach {gpt2['other_recipe']['predicted_loss']:.3f}" in text
    assert " lower, with " in text
    assert " higher, with " in shown(*flags, "--preset", "24gb-modern")
    # The losses of two tokenizers cannot be compared.
    assert answer("--preset", "demo", "--gpu", "rtx4090", "--hours", "1")["other_recipe"] is None


def test_the_command_stays_with_the_preset_asked_for_if_it_is_nearer(answer) -> None:
    got = answer("--gpu", "rtx4090", "--hours", "10", "--preset", "24gb", "--arch", "llama")
    assert got["command"].startswith("python -m jaxgpt.train --preset 24gb ")


def test_without_a_compiler_that_starts_it_is_an_estimate(shown, monkeypatch) -> None:
    text = shown("--preset", "24gb", "--gpu", "4090")
    assert "estimated, within a tenth" in text
    assert "pip install -e '.[plan]'" in text

    def broken(*_):
        raise target.NoCompilerError("the CUDA compiler does not start (no such library)")

    monkeypatch.setattr(target, "CUDA_PLUGINS", ("json",))
    monkeypatch.setattr(target, "card_devices", broken)
    text = shown("--preset", "24gb", "--gpu", "4090")
    assert "estimated, within a tenth; the CUDA compiler does not start" in text


def test_a_card_that_no_preset_fits_as_it_is_says_whether_one_can(answer) -> None:
    reasons = [" ".join(answer("--vram", gigabytes)["reasons"]) for gigabytes in "31"]
    assert "Those with a batch_size in the 'fits' column fit" in reasons[0]
    assert "with any batch_size" in reasons[1]


def test_a_card_without_a_name_is_planned_by_its_memory(answer) -> None:
    got = answer("--vram", "20", "--preset", "16gb")
    assert got["capacity_bytes"] == int(20 * 2**30 * 0.92)
    assert got["hours"] is None
    got = answer("--vram", "8")
    assert any("chosen by the speed of an RTX 3090" in reason for reason in got["reasons"])
    assert got["command"] == "python -m jaxgpt.train --preset 8gb-modern"


def test_the_card_in_this_machine_is_the_default(answer, refused, monkeypatch) -> None:
    card = LocalCard(name="NVIDIA GeForce RTX 4090", memory_bytes=24564 * 2**20)
    monkeypatch.setattr(plan, "visible_card", lambda: card)
    assert answer("--preset", "24gb")["gpu"] == "rtx4090"
    other = LocalCard(name="NVIDIA RTX A4000 Laptop GPU", memory_bytes=16376 * 2**20)
    monkeypatch.setattr(plan, "visible_card", lambda: other)
    got = answer("--preset", "16gb")
    assert (got["gpu_name"], got["hours"]) == (other.name, None)
    monkeypatch.setattr(plan, "visible_card", lambda: None)
    assert "with --gpu NAME (" in refused("--preset", "24gb")


HOURS = ("--gpu", "4090", "--hours")
CARDS = ("--preset", "80gb-350m", "--gpu", "h100", "--devices")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpu", "rtx9999"], "unknown GPU 'rtx9999'"),
        (["--gpu", "4090", "--vram", "24"], "give one"),
        (["--vram", "0"], "--vram 0 must be between 1 and 1024"),
        (["--preset", "24bg", "--gpu", "4090"], "did you mean '24gb'"),
        (["--gpu"], "Missing value for argument '--gpu'"),
        (["--gpu", "4090", "--gpus", "2"], "--gpu TEXT"),
        (["--gpu", "t4", "--dtype", "bfloat16"], "compute capability 8.0"),
        (["--preset", "24gb-1558m", "--vram", "12", "--fit"], "24gb-1558m does not fit"),
        (["--preset", "24gb-1558m", "--vram", "12", "--fit"], "use a smaller model"),
        ([*HOURS, "48", "--n-layer=12", "--max-iters=9"], "chooses --max-iters, --n-layer itself"),
        ([*HOURS, "-1"], "hours -1 must be finite and above 0"),
        ([*HOURS, "0.00001"], "too short for one step"),
        (["--gpu", "gtx1660", "--hours", "10"], "no speed is published"),
        ([*CARDS, "4", "--mesh", "data=8"], "has 8 devices, and --devices is 4"),
        ([*CARDS, "0"], "--devices 0 must be between 1 and"),
        ([*CARDS, "2", "--hours", "3"], "--hours plans for one card"),
        ([*CARDS, "6"], "is not a multiple of batch_size 64 x 6 devices"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(refused, argv, words) -> None:
    assert words in refused(*argv)


def test_several_cards_are_planned_for_each(answer) -> None:
    flags = ("--preset", "80gb-350m", "--gpu", "h100", "--batch-size", "16")
    one, data = answer(*flags), answer(*flags, "--devices", "8")
    fsdp = answer(*flags, "--mesh", "data=2,fsdp=4")
    assert (one["mesh"], data["mesh"]) == (None, "data=8,fsdp=1")
    assert (one["gradient_accumulation_steps"], fsdp["gradient_accumulation_steps"]) == (32, 4)
    assert one["peak_bytes"] == data["peak_bytes"] > fsdp["peak_bytes"]
    assert one["host_bytes"] == fsdp["host_bytes"]
    quarter = fsdp["breakdown_bytes"]["parameters"] / one["breakdown_bytes"]["parameters"]
    assert quarter == pytest.approx(1 / 4, rel=1e-3)  # norms are held whole
    assert data["tokens_per_second"] == pytest.approx(8 * one["tokens_per_second"])
    assert "--mesh data=2,fsdp=4" in fsdp["command"]
