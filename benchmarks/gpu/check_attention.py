"""Compare the card's attention with float32: relative errors of its output and its gradients.

    python benchmarks/gpu/check_attention.py

The kernel is the one that a bfloat16 run of GPT-2 picks on this device; the reference is plain
attention in float32, its products in full precision. Prints one JSON object.
"""

import argparse
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.model.attention import compute_capability, pick_attention, plain_attention
from jaxgpt.run.device import versions


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trial", action="store_true", help="a small shape")
    args = parser.parse_args(argv)
    shape_BTNH = (2, 64, 2, 32) if args.trial else (4, 1024, 12, 64)
    device = jax.devices()[0]
    capability = compute_capability(device)
    attend, why = pick_attention(device.platform, capability, "bfloat16", shape_BTNH[-1])
    keys = jax.random.split(jax.random.key(1), 4)
    *qkv, dout_BTNH = (jax.random.normal(key, shape_BTNH, jnp.bfloat16) for key in keys)

    def forward_and_back(attend, dtype):
        inputs = [x.astype(dtype) for x in (*qkv, dout_BTNH)]
        out_BTNH, backward = jax.vjp(attend, *inputs[:3])
        return out_BTNH, *backward(inputs[3])

    found = jax.jit(lambda: forward_and_back(attend, jnp.bfloat16))()
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda: forward_and_back(plain_attention, jnp.float32))()
    names = ("out", "dq", "dk", "dv")
    errors = {n: relative_error(a, b) for n, a, b in zip(names, found, exact, strict=True)}
    about = {"device": device.device_kind, "capability": capability, "versions": versions()}
    print(json.dumps({**about, "attention": why, "errors": errors}))


def relative_error(found: jax.Array, exact: jax.Array) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


if __name__ == "__main__":
    main()
