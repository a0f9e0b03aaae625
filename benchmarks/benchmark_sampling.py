"""Time generation with and without the key-value cache, at the end of a full context.

    python benchmarks/benchmark_sampling.py --preset gpt2-124m --json sampling.json

Both continue the same prompt with the same compiled loop, in turn, so that other load on the
machine affects both; the first call of each, which compiles, is not counted. Weights are random:
the times do not depend on them.
"""

import argparse
import json
import platform
import statistics
import time

import jax
import numpy as np

from jaxgpt.config.presets import load_preset
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.generate import Generator, Sampling
from jaxgpt.model.network import build_model, init_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="gpt2-124m", help="preset of the model")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens per measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    result = measure(args.preset, args.new_tokens, args.repeats)
    print(json.dumps(result, indent=2))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file)
            file.write("\n")


def measure(preset: str, new_tokens: int, repeats: int) -> dict:
    """Seconds per token with and without the cache, and their ratio."""
    cfg = load_preset(preset).model
    params = init_params(cfg, jax.random.key(0))
    graphdef = build_model(cfg, "float32", plain_attention)
    generators = {
        name: Generator(graphdef, cfg.block_size, Sampling(), chunk=1, cached=name == "cached")
        for name in ("cached", "uncached")
    }
    # The last drawn token is the last that the context can hold.
    prompt = np.random.default_rng(0).integers(0, 50_257, cfg.block_size - new_tokens - 1)
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    tokens = {}
    for repeat in range(repeats + 1):
        for name, generator in generators.items():
            spent, tokens[name] = timed(generator, params, prompt, new_tokens)
            if repeat:
                seconds[name].append(round(spent / new_tokens, 5))
    medians = {name: round(statistics.median(values), 5) for name, values in seconds.items()}
    return {
        "command": f"python benchmarks/benchmark_sampling.py --preset {preset} "
        f"--new-tokens {new_tokens} --repeats {repeats}",
        "model": f"{cfg.n_layer}L/{cfg.n_head}H/{cfg.n_embd}, block_size {cfg.block_size}",
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "jax": jax.__version__,
        "prompt_tokens": len(prompt),
        "seconds_per_token": seconds,
        "median_seconds_per_token": medians,
        "times_faster": round(medians["uncached"] / medians["cached"], 1),
        "same_tokens": bool((tokens["cached"] == tokens["uncached"]).all()),
    }


def timed(
    generator: Generator, params: dict, prompt: np.ndarray, new_tokens: int
) -> tuple[float, np.ndarray]:
    """(seconds for `new_tokens`, tokens); a first token, with the prompt's pass, is not timed."""
    stream = generator.stream(params, prompt, new_tokens + 1, jax.random.key(0), samples=1)
    tokens = [next(stream)]
    start = time.perf_counter()
    tokens += stream
    return time.perf_counter() - start, np.concatenate(tokens, axis=1)


if __name__ == "__main__":
    main()
