"""int4 layers for Flax: ``jax_int4mm.nn.nnx`` and ``jax_int4mm.nn.linen``, with ``pip install "jax_int4mm[flax]"``."""
