"""GPTQ for the model in `decoder.py`, from text: what `generate.py --method gptq` does.

Layers are quantised in the order in which they compute. Each is calibrated with the inputs that reach it through the
layers before it as they are by then, quantised, so that it makes up for their errors too.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

import jax_int4mm as i4
from decoder import LINEAR_NAMES, Params, embed, layer_forward, output_projection, rms_norm
from decoder_config import Config
from jax_int4mm.quantizers import Hessian

# Linear layers with the same input, in the order in which they compute.
SHARED_INPUTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def spread_windows(tokens: np.ndarray, length: int, windows: int) -> np.ndarray:
    """Windows of `length` tokens, or of all if there are fewer, spread over the text: int32 [windows, length]."""
    length = min(length, len(tokens))
    if length == 0:
        raise ValueError("the text to calibrate with is empty")
    starts = np.linspace(0, len(tokens) - length, windows).astype(int)
    return tokens[starts[:, None] + np.arange(length)].astype(np.int32)


class Recorder:
    """A linear layer's weight that keeps the x of `x @ w`."""

    def __init__(self, w: Any):
        self.w = w

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        self.x = x
        return x @ self.w


@functools.partial(jax.jit, static_argnames=("config", "index", "name"))
def observe(hessian: Hessian, layer: Params, x: jax.Array, config: Config, index: int, name: str) -> Hessian:
    """The Hessian with the inputs of the linear layer `name` added, for x [batch, t, hidden] into layer `index`."""
    recorders = {linear: Recorder(layer[linear]) for linear in LINEAR_NAMES}
    layer_forward(layer | recorders, x, config, index)
    return hessian.add(recorders[name].x)


def quantize_linears_gptq(
    params: Params,
    config: Config,
    windows: np.ndarray,
    group_size: int,
    lm_head: bool,
    act_order: bool = False,
    batch: int = 8,
) -> Params:
    """As `quantize_linears` of `generate.py`, by GPTQ with the text in windows [windows, length] of tokens."""
    quantize = functools.partial(i4.quantize, group_size=group_size, method="gptq", act_order=act_order)
    run = jax.jit(layer_forward, static_argnames=("config", "index"))
    embeddings = jax.jit(embed, static_argnames="config")
    hidden = [embeddings(params, windows[i : i + batch], config) for i in range(0, len(windows), batch)]
    layers = []
    for index, layer in enumerate(params["layers"]):
        for names in SHARED_INPUTS:
            hessian = Hessian.zeros(layer[names[0]].shape[0])
            for x in hidden:
                hessian = observe(hessian, layer, x, config, index, names[0])
            layer = layer | {name: quantize(layer[name], calibration=hessian) for name in names}
        hidden = [run(layer, x, config, index)[0] for x in hidden]
        layers.append(layer)
    quantized = params | {"layers": layers}
    if lm_head:
        inputs = (rms_norm(x, params["norm"], config.rms_norm_eps, config.unit_offset_norms) for x in hidden)
        quantized["lm_head"] = quantize(output_projection(params), calibration=inputs)
    return quantized
