"""Runs the example model over several devices: every layer's weights divided among them, prompts divided as well.

    python examples/tensor_parallel.py              # 8 devices of one CPU: 4 groups of prompts by 2 parts of a layer
    python examples/tensor_parallel.py --parts 1    # every device a whole model
    python examples/tensor_parallel.py --gpu        # the GPUs of this machine

q, k, v, gate and up are divided by columns, o and down by rows, so that attention and MLP each need one all-reduce
(Megatron's way). The weights are quantised on the host and each device gets its part; nothing in the model changes. The
program's communication is counted, and its scores are compared with those of one device.
"""

from __future__ import annotations

import argparse
import collections
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_int4mm as i4
from decoder import LINEAR_NAMES, Params, forward, logits, params_from_huggingface
from decoder_config import Config
from generate import BYTE_MODEL, quantize_linears
from jax_int4mm import checkpoints
from tokenization import ByteTokenizer

COLUMN, ROW = P(None, "part"), P("part", None)  # Of a matrix [in, out].
DIVISION = {name: ROW if name in ("o", "down") else COLUMN for name in LINEAR_NAMES}
PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def __init__", "import os\nimport ", "for index, value in ")


def make_mesh(devices: list[jax.Device], parts: int) -> Mesh:
    """Groups of prompts by parts of a layer; XLA divides what lies between the weights."""
    if parts < 1 or len(devices) % parts:
        raise ValueError(f"{len(devices)} devices do not make whole groups of {parts}; choose another --parts")
    grid = np.array(devices).reshape(-1, parts)
    return Mesh(grid, ("prompts", "part"), axis_types=(AxisType.Auto,) * 2)


def place(params: Params, mesh: Mesh) -> Params:
    """The parameters on the mesh: linear layers divided, everything else on every device."""

    def linear(name: str, w: i4.Int4Weight) -> i4.Int4Weight:
        return jax.device_put(w, w.shardings(NamedSharding(mesh, DIVISION[name])))

    everywhere = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    layers = [
        {name: linear(name, w) if name in DIVISION else everywhere(w) for name, w in layer.items()}
        for layer in params["layers"]
    ]
    return {name: everywhere(value) for name, value in params.items() if name != "layers"} | {"layers": layers}


def next_scores(params: Params, tokens: jax.Array, position: jax.typing.ArrayLike, config: Config) -> jax.Array:
    """f32 scores [batch, vocabulary] of the token at `position`, given those before it in tokens [batch, t]."""
    hidden, _ = forward(params, tokens, config)
    return logits(params, jax.lax.dynamic_index_in_dim(hidden, position - 1, axis=1, keepdims=False), config)


def communication(program: jax.stages.Compiled) -> collections.Counter[str]:
    """How many of each collective the program has."""
    return collections.Counter(
        re.findall(r" (all-[a-z-]+?|reduce-scatter|collective-[a-z]+)(?:-start)?\(", program.as_text())
    )


def run(args: argparse.Namespace) -> None:
    """Places, compares, counts and continues the prompts."""
    checkpoint = checkpoints.load(BYTE_MODEL)
    config = Config.from_huggingface(checkpoint.config)
    params = quantize_linears(params_from_huggingface(checkpoint, config, jnp.bfloat16), 64, lm_head=False)
    mesh = make_mesh(jax.devices(), args.parts)
    divided = place(params, mesh)
    one = divided["layers"][0]["down"].packed
    print(f"{mesh.size} devices, {dict(mesh.shape)}; layer 0's down_proj: {one.nbytes} bytes of nibbles, ", end="")
    print(f"{one.addressable_shards[0].data.nbytes} on each device")

    length = min(map(len, PROMPTS))
    prompts = [ByteTokenizer().encode(prompt)[:length] for prompt in PROMPTS]
    groups = mesh.shape["prompts"]
    rows = -(-len(prompts) // groups) * groups
    tokens = np.zeros((rows, length + args.max_new_tokens), np.int32)
    tokens[:, :length] = [prompts[i % len(prompts)] for i in range(rows)]

    on_mesh = NamedSharding(mesh, P("prompts"))
    scores = jax.jit(next_scores, static_argnames="config", out_shardings=on_mesh)
    found = scores(divided, jax.device_put(tokens, on_mesh), length, config)
    program = scores.lower(divided, jax.device_put(tokens, on_mesh), length, config).compile()
    print(f"communication of {config.num_hidden_layers} layers: {dict(communication(program)) or 'none'}")
    expected = np.asarray(jax.jit(next_scores, static_argnames="config")(params, tokens, length, config))
    difference = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    print(f"scores against one device's: largest difference {difference:.4f} of the largest score")

    for position in range(length, tokens.shape[1]):
        found = scores(divided, jax.device_put(tokens, on_mesh), position, config)
        tokens[:, position] = np.argmax(found, axis=-1)
    for row in tokens[: len(PROMPTS)]:
        print("---\n" + bytes(row.tolist()).decode("utf-8", "replace"))


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends the program with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=2, help="devices that share a layer (default 2)")
    parser.add_argument("--gpu", action="store_true", help="the machine's GPUs in place of 8 devices of the CPU")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    if not args.gpu:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    try:
        run(args)
    except ValueError as error:
        sys.exit(f"tensor_parallel.py: {error}")


if __name__ == "__main__":
    main()
