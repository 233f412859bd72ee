"""Checkpoints that are damaged, incomplete or hostile, of every format: a CheckpointError says so, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from format_writers import (
    Tensors,
    awq,
    compressed_tensors,
    gptq,
    hqq_of_layer,
    int4_tensor,
    mlx,
    tile_packed,
    unpacked_int8,
)
from jax_int4mm import checkpoints
from oracle import BFLOAT16, FLOAT16
from stored_layers import MODULE, WEIGHT, random_layer, random_zero_points, save

DATA = Path(__file__).parent.parent / "data" / "checkpoints"


@dataclasses.dataclass(frozen=True)
class Format:
    """One layer of 24 by 256 in groups of 64 in some format.

    Attributes:
      tensors: by the part's name.
      scale: the part that holds the scales.
      optional: parts without which the layer is another one, but a whole one.
      config: the content of config.json.
    """

    tensors: Tensors
    scale: str
    optional: tuple[str, ...] = ()
    config: dict[str, object] | None = None
    metadata: dict[str, str] | None = None

    def save(self, directory: Path, changed: Tensors | None = None, without: tuple[str, ...] = ()) -> Path:
        tensors = {name: tensor for name, tensor in (self.tensors | (changed or {})).items() if name not in without}
        save(directory, tensors, metadata=self.metadata)
        if self.config is not None:
            (directory / "config.json").write_text(json.dumps(self.config))
        return directory


def write(name: str, rng: np.random.Generator) -> Format:
    stored = FLOAT16 if name in ("gptq", "awq") else BFLOAT16
    layer = random_layer(rng, 24, 256, 64, stored)
    zero_point = random_zero_points(rng, layer)
    zeros = zero_point.astype(stored)
    affine = {"bits": 4, "group_size": 64}
    if name == "gptq":
        settings = {"quantization_config": {"quant_method": "gptq", **affine}}
        return Format(gptq(layer, zero_point), f"{MODULE}.scales", (f"{MODULE}.g_idx",), settings)
    if name == "awq":
        return Format(
            awq(layer, zero_point),
            f"{MODULE}.scales",
            config={"quantization_config": {"quant_method": "awq", **affine}},
        )
    if name == "compressed-tensors":
        weights = {"num_bits": 4, "group_size": 64, "symmetric": False}
        settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
        return Format(
            compressed_tensors(layer, zero_point), f"{MODULE}.weight_scale", config={"quantization_config": settings}
        )
    if name == "hqq":
        tensors = hqq_of_layer(layer, zeros)
        needed = {f"{MODULE}.{part}" for part in ("W_q", "scale", "zero", "shape", "packing")}
        return Format(tensors, f"{MODULE}.scale", tuple(set(tensors) - needed))
    if name == "mlx":
        return Format(mlx(layer, zeros), f"{MODULE}.scales", config={"quantization": {**affine, "mode": "affine"}})
    scale = f"{MODULE}._weight_scale"
    if name == "tile packed":
        tensors, metadata = tile_packed(rng, layer, 64)
        return Format(tensors, f"{scale}_and_zero", metadata=metadata)
    tensors, metadata = (
        int4_tensor(layer, zeros) if name == "Int4Tensor" else unpacked_int8(layer.q - 8.0, layer.scale, zeros)
    )
    return Format(tensors, scale, metadata=metadata)


FORMATS = ("gptq", "awq", "compressed-tensors", "hqq", "mlx", "tile packed", "Int4Tensor", "IntxUnpackedToInt8Tensor")
# Without the tensor that a format is known by there is no quantised layer to miss anything.
KNOWN_BY = (".qweight", ".weight_packed", ".W_q", ".scales")


@pytest.mark.parametrize("name", FORMATS)
def test_every_part_is_needed(tmp_path: Path, rng: np.random.Generator, name: str):
    written = write(name, rng)
    for part in written.tensors:
        written.save(tmp_path, without=(part,))
        if part in written.optional:
            checkpoints.load(tmp_path)
        elif not part.endswith(KNOWN_BY) or (name == "awq" and part.endswith(".scales")):
            with pytest.raises(checkpoints.CheckpointError, match=rf"no tensor '{part}'.*the checkpoint is incomplete"):
                checkpoints.load(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_part_has_its_shape_and_type(tmp_path: Path, rng: np.random.Generator, name: str):
    written = write(name, rng)
    damages: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "longer": lambda part: np.concatenate([part, part[:1]]),
        "wider": lambda part: np.concatenate([part, part[..., :1]], axis=-1),
        "shorter": lambda part: part[: len(part) // 2],
        "empty": lambda part: part[:0],
        "flat": lambda part: part.reshape(-1) if part.ndim > 1 else part[None],
        "float64": lambda part: part.astype(np.float64),
        "bool": lambda part: part.astype(bool),
        "int16": lambda part: part.astype(np.int16),
    }
    for part, tensor in written.tensors.items():
        if tensor.ndim == 0 or (part in written.optional and name == "hqq"):
            continue
        for damage, apply in damages.items():
            # An empty g_idx is none, and the text of a packing may be any bytes.
            if (part.endswith(".g_idx") and damage == "empty") or (part.endswith(".packing") and damage != "float64"):
                continue
            written.save(tmp_path, {part: apply(tensor)})
            with pytest.raises(checkpoints.CheckpointError, match=f"{MODULE}|it is quantised"):
                checkpoints.load(tmp_path)


@pytest.mark.parametrize("empty", ["n", "k"])
@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors", "mlx", "IntxUnpackedToInt8Tensor"])
def test_a_weight_without_values(tmp_path: Path, rng: np.random.Generator, name: str, empty: str):
    written = write(name, rng)
    # Of k are made the rows of GPTQ's and AWQ's tensors, and the columns of the others'.
    rows = (empty == "k") == (name in ("gptq", "awq"))
    cut = {part: tensor[:0] if rows else tensor[..., :0] for part, tensor in written.tensors.items()}
    shape = {part: np.array([0, 256] if rows else [24, 0]) for part in cut if part.endswith("weight_shape")}
    one_dimensional = tuple(part for part in cut if part.endswith(".g_idx"))
    settings = [
        written.config,
        {"quantization": {}} if name == "mlx" else {"quantization_config": {"quant_method": name}},
    ]
    for config in settings if written.config else [None]:
        dataclasses.replace(written, config=config).save(tmp_path, cut | shape, one_dimensional)
        with pytest.raises(checkpoints.CheckpointError, match=f"{MODULE}"):
            checkpoints.load(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_that_is_not_finite(tmp_path: Path, rng: np.random.Generator, name: str, value: float):
    written = write(name, rng)
    scales = np.array(written.tensors[written.scale], order="C")
    scales.reshape(-1)[2] = value
    written.save(tmp_path, {written.scale: scales})
    checkpoint = checkpoints.load(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match=f"{MODULE}.* in .* is not a finite number"):
        checkpoint[WEIGHT]


@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_too_large_for_float16(tmp_path: Path, rng: np.random.Generator, name: str):
    written = write(name, rng)
    scales = np.array(written.tensors[written.scale], BFLOAT16, order="C")
    scales.reshape(-1)[2] = 1e6
    written.save(tmp_path, {written.scale: scales})
    checkpoint = checkpoints.load(tmp_path, dtype=jnp.float16)
    with pytest.raises(checkpoints.CheckpointError, match=r"too large for float16; load it with dtype=jnp\.bfloat16"):
        checkpoint[WEIGHT]
    assert checkpoints.load(tmp_path)[WEIGHT].dtype == jnp.bfloat16


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_what_is_quantised_anew_has_to_be_finite_too(tmp_path: Path, rng: np.random.Generator, value: float):
    layer = random_layer(rng, 24, 128, 16, BFLOAT16)
    layer.scale[3, 1] = value
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)), settings)
    with pytest.warns(checkpoints.RequantizedWarning):
        checkpoint = checkpoints.load(tmp_path, dtype=jnp.float16)
    with pytest.raises(checkpoints.CheckpointError):
        checkpoint[WEIGHT]


# What a configuration should not hold where it holds something else, and what it might.
ODD = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        4,
        32,
        128,
        10**30,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "4",
        "gptq",
        "[",
        "(?P<",
    ),
    *(
        "auto_round",
        "a{9999999999}",
        "\ud800",
        [],
        [[]],
        [1, 128],
        ["x"],
        {},
        {"": None},
        {"bits": []},
        {"[": {"bits": 4}},
    ),
    *([{"weights": None}], {"weights": [4]}, {"group_0": {"weights": {"num_bits": 4, "group_size": {}}}}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in parsed JSON there is something, from the root down."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def mutated(rng: np.random.Generator, document: Any) -> Any:
    """A copy with one or two of its values replaced, removed or put under another key."""
    document = copy.deepcopy(document)
    for _ in range(rng.integers(1, 3)):
        below_root = places(document)[1:]
        if not below_root:
            break
        *above, key = below_root[rng.integers(len(below_root))]
        parent = document
        for step in above:
            parent = parent[step]
        change = rng.integers(8)
        if change == 0:
            del parent[key]
        elif change == 1 and isinstance(parent, dict):
            parent[SETTINGS[rng.integers(len(SETTINGS))]] = parent.pop(key)
        elif change == 2 and isinstance(parent, dict):
            parent[SETTINGS[rng.integers(len(SETTINGS))]] = copy.deepcopy(ODD[rng.integers(len(ODD))])
        else:
            parent[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    return document


# Every setting that a reader looks at.
SETTINGS = (
    *("quant_method", "bits", "w_bit", "group_size", "q_group_size", "checkpoint_format", "format", "is_marlin_format"),
    *("dynamic", "version", "zero_point", "packing_format", "backend", "extra_config", "config_groups", "weights"),
    *("symmetric", "num_bits", "sparsity_config", "transform_config", "quant_config", "weight_quant_params", "axis"),
    *("nbits", "mode", "quantization", "quantization_config", MODULE),
)


def try_to_read(directory: Path, *names: str) -> None:
    """Loads a checkpoint and reads weights of it if it has them; only a CheckpointError may come of it."""
    with contextlib.suppress(checkpoints.CheckpointError), warnings.catch_warnings():
        # Of re, for what a later Python will read otherwise in a pattern.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", checkpoints.RequantizedWarning)
        checkpoint = checkpoints.load(directory)
        for name in names:
            checkpoint.get(name)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("gptq", "gptq"), ("awq", "awq"), ("auto-round", "gptq"), ("compressed-tensors", "compressed-tensors")),
        *(("hqq", "hqq"), ("mlx", "mlx"), ("torchao", "Int4Tensor")),
    ],
)
def test_settings_of_every_type(tmp_path: Path, rng: np.random.Generator, method: str, name: str):
    write(name, rng).save(tmp_path)

    def try_settings(settings: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
        try_to_read(tmp_path)

    for setting in SETTINGS:
        for place in rng.choice(len(ODD), 10, replace=False):
            try_settings({"quant_method": method, setting: ODD[place]})
    if method == "compressed-tensors":
        for value in ODD:
            for setting in ("format", "weights"):
                try_settings({"quant_method": method, "config_groups": {"a": {setting: value}}})
            for setting in ("num_bits", "group_size", "symmetric"):
                try_settings({"quant_method": method, "config_groups": {"a": {"weights": {setting: value}}}})
    if method == "hqq":
        for value in ODD:
            try_settings({"quant_method": method, "quant_config": {"weight_quant_params": value}})


FIXTURES = sorted(path.name for path in DATA.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", FIXTURES)
def test_random_changes_of_the_configuration(tmp_path: Path, rng: np.random.Generator, name: str):
    shutil.copytree(DATA / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((DATA / name / "config.json").read_text())
    config = {key: config[key] for key in ("quantization", "quantization_config") if key in config}
    for _ in range(60):
        changed = mutated(rng, {"config": config or {"quantization_config": {"quant_method": name.split("_")[0]}}})
        (tmp_path / "config.json").write_text(json.dumps(changed.get("config")))
        try_to_read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))


def with_header(source: Path, target: Path, header: Any) -> None:
    """The bytes of the tensors of one safetensors file behind another header."""
    content = source.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


DTYPES = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "U32", "F32", "I64", "F64", "F8_E4M3", "F4", "X")


@pytest.mark.parametrize("name", FIXTURES)
def test_random_changes_of_the_header(tmp_path: Path, rng: np.random.Generator, name: str):
    shutil.copytree(DATA / name, tmp_path, dirs_exist_ok=True)
    source = DATA / name / "model.safetensors"
    content = source.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = [key for key in header if key != "__metadata__"]
    described = (
        [key for key, text in header["__metadata__"].items() if text.startswith("{")] if "torchao" in name else []
    )
    k_proj = "model.layers.0.self_attn.k_proj.weight"
    for _ in range(60):
        changed = copy.deepcopy(header)
        for _ in range(rng.integers(1, 3)):
            tensor = tensors[rng.integers(len(tensors))]
            what = rng.integers(6 if described else 5)
            if tensor not in changed:
                continue
            if what == 0:
                changed[tensor]["dtype"] = DTYPES[rng.integers(len(DTYPES))]
            elif what == 1:
                # Of the same number of elements, so that safetensors has nothing to say against it.
                shape = [int(size) for size in changed[tensor]["shape"]]
                options = [
                    shape[::-1],
                    [*shape, 1],
                    [1, *shape],
                    [int(np.prod(shape))],
                    [size // 2 or 1 for size in shape],
                ]
                options += [[size * 2 if place == 0 else size // 2 for place, size in enumerate(shape)]]
                changed[tensor]["shape"] = options[rng.integers(len(options))]
            elif what == 2:
                changed[tensor]["shape"] = [int(rng.choice([0, 1, 2, 2**31, 2**63])) for _ in range(rng.integers(4))]
            elif what == 3:
                other = tensors[rng.integers(len(tensors))]
                if other in changed:
                    changed[tensor], changed[other] = changed[other], changed[tensor]
            elif what == 4:
                changed[f"{tensor}x"] = changed.pop(tensor)
            else:
                parameter = described[rng.integers(len(described))]
                text = json.dumps(mutated(rng, {"it": json.loads(header["__metadata__"][parameter])}).get("it"))
                changed["__metadata__"][parameter] = text
        with_header(source, tmp_path / "model.safetensors", changed)
        try_to_read(tmp_path, k_proj)


@pytest.mark.parametrize("name", FIXTURES)
def test_random_bits_of_the_tensors(tmp_path: Path, rng: np.random.Generator, name: str):
    shutil.copytree(DATA / name, tmp_path, dirs_exist_ok=True)
    content = bytearray((DATA / name / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(3):
        damaged = np.frombuffer(bytes(content), np.uint8).copy()
        places = rng.integers(start, len(content), len(content) // 50)
        damaged[places] = rng.integers(0, 256, len(places), np.uint8)
        (tmp_path / "model.safetensors").write_bytes(damaged.tobytes())
        try_to_read(tmp_path, "model.layers.0.self_attn.k_proj.weight")


def test_a_quantization_config_of_null_is_none(tmp_path: Path):
    tensors = {"w": np.ones((2, 2), np.float16)}
    save(tmp_path, tensors)
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert checkpoints.load(tmp_path).format == "safetensors"
