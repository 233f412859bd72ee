"""The layer shapes that benchmarks and tests share: (n, k) of weights that models really have."""

from __future__ import annotations

SHAPES: dict[str, tuple[int, int]] = {
    "llama-3-8b q,o": (4096, 4096),
    "llama-3-8b gate,up": (14336, 4096),
    "llama-3-8b down": (4096, 14336),
    "voxtral-3b attention": (3072, 3072),
    "llama-3-70b gate,up": (28672, 8192),
}
