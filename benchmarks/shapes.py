"""The layer shapes that benchmarks and tests share: (n, k) of weights that models really have.

The linear layers of the blocks of Llama-3 8B and 70B, Qwen-3 8B and Mistral 7B, and those of Voxtral Mini 3B: its text
model (32 heads of 128 on a hidden size of 3072), its audio encoder, the projector between them, and its head. Equal
shapes are one entry, under a label that names every layer that has it.
"""

from __future__ import annotations

SHAPES: dict[str, tuple[int, int]] = {
    "llama-3-8b, qwen-3-8b, mistral-7b q,o": (4096, 4096),
    "llama-3-8b, qwen-3-8b, mistral-7b k,v": (1024, 4096),
    "llama-3-8b, mistral-7b gate,up": (14336, 4096),
    "llama-3-8b, mistral-7b down": (4096, 14336),
    "qwen-3-8b gate,up": (12288, 4096),
    "qwen-3-8b down": (4096, 12288),
    "llama-3-70b q,o": (8192, 8192),
    "llama-3-70b k,v": (1024, 8192),
    "llama-3-70b gate,up": (28672, 8192),
    "llama-3-70b down": (8192, 28672),
    "voxtral-mini-3b q": (4096, 3072),
    "voxtral-mini-3b k,v": (1024, 3072),
    "voxtral-mini-3b o": (3072, 4096),
    "voxtral-mini-3b gate,up": (8192, 3072),
    "voxtral-mini-3b down": (3072, 8192),
    "voxtral-mini-3b lm head": (131072, 3072),
    "voxtral-mini-3b projector 1": (3072, 5120),
    "voxtral-mini-3b projector 2": (3072, 3072),
    "voxtral-mini-3b audio q,k,v,o": (1280, 1280),
    "voxtral-mini-3b audio fc1": (5120, 1280),
    "voxtral-mini-3b audio fc2": (1280, 5120),
}
