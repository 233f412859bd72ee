"""compressed-tensors checkpoints of the "pack-quantized" format, as llm-compressor writes them.

Of a linear layer [n, k]: `weight_packed` int32 [n, ceil(k/8)], eight values of k in a word, each stored plus 8;
`weight_scale` [n, groups], [n, 1] for one scale a channel; `weight_shape`; without symmetry `weight_zero_point`, int32
[ceil(n/8), groups] packed along n, in older files int8 [n, groups]. `weight_g_idx` int32 [k] gives the group of each k
where an older release ordered them by activations. w = (q - zero point) * scale with both signed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.affine import AffineGroups, unpack_nibbles, zero_from_point
from jax_int4mm.checkpoints.entry import Entry, int4_entry, plain_entries
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.gptq import perm_of_groups
from jax_int4mm.checkpoints.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from jax_int4mm.checkpoints.settings import Settings, matches, object_in

_REMEDY = "load the bf16 model and quantise it with jax_int4mm.quantize"


def read_compressed_tensors(files: SafetensorsFiles, settings: Settings, dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint with the `quantization_config` `settings` of method "compressed-tensors"."""
    config_groups = object_in(files, settings, "config_groups")
    schemes = [object_in(files, config_groups, name) for name in config_groups]
    _check_formats(files, settings, schemes)
    entries, consumed = {}, set()
    for name in files:
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        n, k = _shape(files, module)
        weights = [object_in(files, scheme, "weights") for scheme in _schemes_of(module, schemes)]
        said = [scheme.get("group_size") for scheme in weights]
        asymmetric = bool(weights) and not any(scheme.get("symmetric", True) for scheme in weights)
        rule = f"pack-quantized stores a weight of {n} by {k} as int32 [n, ceil(k/8)] and weight_scale [n, groups]"
        files.expect(name, ["I32"], [n, -(-k // 8)], rule)
        scale_name = f"{module}.weight_scale"
        one = scale_name in files and files.shape(scale_name) in ((), (1,))
        groups = 1 if one else files.expect(scale_name, FLOAT_TYPES, [n, None], rule)[1]
        parts = {"q": name, "scale": scale_name}
        point_name = f"{module}.weight_zero_point"
        if point_name in files or asymmetric:
            packed = point_name not in files or files.element_type(point_name) == "I32"
            rule = "pack-quantized stores weight_zero_point as int32 [ceil(n/8), groups] or int8 in the scale's shape"
            shape = (-(-n // 8), groups) if packed else files.shape(scale_name)
            files.expect(point_name, ["I32"] if packed else ["I8"], shape, rule)
            parts["zero_point"] = point_name
        if f"{module}.weight_g_idx" in files:
            files.expect(f"{module}.weight_g_idx", ["I32"], [k], "pack-quantized stores weight_g_idx as int32 [k]")
            parts["group"] = f"{module}.weight_g_idx"
        group_size = _group_size(files, module, k, groups, said)
        entries[f"{module}.weight"] = int4_entry(
            files,
            parts,
            n,
            k,
            group_size,
            dtype,
            _groups(n, k, groups, group_size, f"{module!r} in {files.path_of(name)}"),
        )
        consumed |= {f"{module}.weight_shape", *parts.values()}
    return plain_entries(files, consumed) | entries


def _check_formats(files: SafetensorsFiles, settings: Settings, schemes: list[Mapping[str, Any]]) -> None:
    for name in [scheme.get("format") or settings.get("format") for scheme in schemes] or [settings.get("format")]:
        if name not in ("pack-quantized", "dense", None):
            raise CheckpointError(
                f"{files.folder} is a compressed-tensors checkpoint of format {name!r}; 'pack-quantized' is read: "
                f"{_REMEDY}"
            )
    for scheme in schemes:
        bits = object_in(files, scheme, "weights").get("num_bits", 4)
        if bits != 4:
            raise CheckpointError(f"{files.folder} has weights of {bits} bits; only 4 are read: {_REMEDY}")
    sparsity = object_in(files, settings, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(f"{files.folder} has weights of sparse format {sparsity!r}, which is not read: {_REMEDY}")
    if object_in(files, settings, "transform_config").get("config_groups"):
        raise CheckpointError(
            f"{files.folder} has a transform_config: its weights expect transformed activations, which a checkpoint's "
            f"reader cannot give them: {_REMEDY}"
        )


def _schemes_of(module: str, schemes: list[Settings]) -> list[Settings]:
    """The schemes whose targets name the module or, if none does, a class of modules; all where no target does."""

    def targeting(names: Callable[[str], bool]) -> list[Settings]:
        found = []
        for scheme in schemes:
            targets = scheme.get("targets")
            if isinstance(targets, list) and any(isinstance(target, str) and names(target) for target in targets):
                found.append(scheme)
        return found

    def named(target: str) -> bool:
        return target == module or (target.startswith("re:") and matches(target.removeprefix("re:"), module, re.match))

    return targeting(named) or targeting(lambda target: target[:1].isupper()) or schemes


def _shape(files: SafetensorsFiles, module: str) -> tuple[int, int]:
    name = f"{module}.weight_shape"
    files.expect(name, ["I64", "I32"], [2], "pack-quantized stores the shape [n, k] of a weight as two integers")
    n, k = map(int, files[name])
    if n < 1 or k < 1:
        raise CheckpointError(f"tensor {name!r} in {files.path_of(name)} says that the weight is {n} by {k}")
    return n, k


def _group_size(files: SafetensorsFiles, module: str, k: int, groups: int, said: list[Any]) -> int:
    if groups == 1 and (not said or None in said or -1 in said):
        return k
    fitting = {size for size in said if isinstance(size, int) and size > 0 and -(-k // size) == groups}
    # Of the sizes of several schemes no two that divide k fit.
    fitting = {size for size in fitting if k % size == 0} or fitting
    if len(fitting) == 1:
        return fitting.pop()
    if not said and groups > 0 and k % groups == 0:
        return k // groups
    raise CheckpointError(
        f"{files.folder} has module {module!r} with scales for {groups} groups over k = {k}, and its configuration "
        f"says group_size {', '.join(map(str, said)) or 'nowhere'}; they are not of one checkpoint"
    )


def _groups(
    n: int, k: int, count: int, group_size: int, source: str
) -> Callable[[Mapping[str, np.ndarray]], AffineGroups]:
    def groups(arrays: Mapping[str, np.ndarray]) -> AffineGroups:
        q = unpack_nibbles(arrays["q"])[:, :k]
        scale = np.broadcast_to(arrays["scale"].reshape(-1, count), (n, count))
        zero = None
        if "zero_point" in arrays:
            points = arrays["zero_point"]
            packed = points.dtype == np.int32
            unsigned = unpack_nibbles(points.T).T[:n] if packed else points.astype(np.int32).reshape(-1, count) + 8
            zero = zero_from_point(unsigned, scale)
        perm = None
        # Releases that made room for it without ordering by activations filled it with -1.
        if "group" in arrays and not np.all(arrays["group"] == -1):
            perm = perm_of_groups(arrays["group"], group_size, source)
        return AffineGroups(q if perm is None else q[:, perm], scale, zero, group_size, perm)

    return groups
