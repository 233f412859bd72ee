"""The op on raw arrays: packed words, scales and zeros in, activations in and out."""
