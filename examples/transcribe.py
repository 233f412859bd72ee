"""Writes down what is said in a sound file, or answers questions about it, with Voxtral on int4 weights.

    python examples/transcribe.py --model ~/models/Voxtral-Mini-3B-2507 --audio talk.wav --language en
    python examples/transcribe.py --model ~/models/Voxtral-Mini-3B-2507 --audio talk.wav --prompt "Summarise this."

The model's folder is a Hugging Face one, in bf16 or any int4 format that jax_int4mm reads, and has a `tekken.json`.
Reading sound needs soundfile, or scipy for wav files and other sample rates; --language and --prompt need tiktoken.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import decoder
import jax_int4mm as i4
import voxtral
from audio import HOP, SAMPLE_RATE, features, read_audio
from decoder_config import Config
from decoding import Generator, Sampling
from generate import row_tokens
from jax_int4mm import checkpoints
from jax_int4mm.quantizers import METHODS
from tekken import TekkenTokenizer
from tokenization import TextUntil, pieces

CHUNKS_AT_A_TIME = 4


def prompt_tokens(
    tokenizer: TekkenTokenizer, audio_tokens: int, prompt: str | None = None, language: str | None = None
) -> list[int]:
    """What the model reads: the sound, and then a question about it, or that it is to be written down.

    The order is that of mistral-common's instruct and transcription requests.
    """
    special = tokenizer.special
    sound = [special["[BEGIN_AUDIO]"]] + [special["[AUDIO]"]] * audio_tokens
    if prompt is not None:
        return [special["<s>"], special["[INST]"], *sound, *tokenizer.encode(prompt), special["[/INST]"]]
    spoken = [] if language is None else tokenizer.encode(f"lang:{language}")
    return [special["<s>"], special["[INST]"], *sound, special["[/INST]"], *spoken, special["[TRANSCRIBE]"]]


def encode_chunks(params: voxtral.Params, chunks: np.ndarray, config: voxtral.AudioConfig) -> jax.Array:
    """Embeddings [n, hidden] of all chunks of a spectrogram, so many at a time that memory is bounded."""
    encode = jax.jit(voxtral.encode_audio, static_argnums=2)
    parts = [
        encode(params, jnp.asarray(chunks[first : first + CHUNKS_AT_A_TIME]), config)
        for first in range(0, len(chunks), CHUNKS_AT_A_TIME)
    ]
    return jnp.concatenate(parts)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a Hugging Face directory of Voxtral")
    parser.add_argument("--audio", type=pathlib.Path, required=True, help="a sound file")
    parser.add_argument("--language", help="that is spoken, en for example (default: the model finds out)")
    parser.add_argument("--prompt", help="a question about the sound, instead of writing it down")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="keep bf16 weights as they are")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument("--method", choices=[method for method in METHODS if method != "gptq"], default="rtn")
    args = parser.parse_args(argv)
    if args.language is not None and args.prompt is not None:
        parser.error("--language is for writing down; leave it out beside --prompt")
    return args


def run(args: argparse.Namespace) -> None:
    """Loads the model and the sound, and prints what the model says."""
    sound = read_audio(args.audio)
    checkpoint = checkpoints.load(args.model)
    if checkpoint.config is None:
        raise ValueError(f"{args.model} has no config.json; give the directory of a Hugging Face model")
    audio_config = voxtral.AudioConfig.from_huggingface(checkpoint.config)
    config = Config.from_huggingface(checkpoint.config)
    if not (args.model / "tekken.json").is_file():
        raise ValueError(f"{args.model} has no tekken.json; it comes with Mistral's own repository of the model")
    tokenizer = TekkenTokenizer(args.model / "tekken.json")

    quantize = functools.partial(i4.quantize, group_size=args.group_size, method=args.method)
    options = {} if args.dense else {"linear": quantize}
    audio_params = voxtral.fuse(voxtral.params_from_huggingface(checkpoint, audio_config, "bfloat16", **options))
    text_params = decoder.fuse(
        decoder.params_from_huggingface(
            checkpoint, config, "bfloat16", **options, lm_head=None if args.dense else quantize
        )
    )
    chunks = features(sound, audio_config.num_mel_bins, audio_config.frames_per_chunk)
    chunk_seconds = audio_config.frames_per_chunk * HOP / SAMPLE_RATE
    print(f"{args.audio}: {len(sound) / SAMPLE_RATE:.1f} s in {len(chunks)} chunks of {chunk_seconds:g} s")
    embedded = encode_chunks(audio_params, chunks, audio_config)
    tokens = jnp.asarray([prompt_tokens(tokenizer, len(embedded), args.prompt, args.language)], jnp.int32)
    x = voxtral.merge_audio(decoder.embed(text_params, tokens, config), tokens, embedded, audio_config)
    stops = {tokenizer.special["</s>"], *config.eos_token_ids}
    generator = Generator(text_params, config, Sampling(args.temperature), tuple(stops))
    room = config.max_position_embeddings - tokens.shape[1]
    blocks = generator.generate_embedded(x, [tokens.shape[1]], min(args.max_new_tokens, room), args.seed)
    for piece in pieces(tokenizer.decoder(), row_tokens(blocks, 0), TextUntil([])):
        print(piece, end="", flush=True)
    timings = generator.timings
    print(f"\n\n{timings.new_tokens} tokens, {timings.decode_rate:.1f} a second after the first")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends the program with a sentence."""
    args = parse_args(argv)
    try:
        run(args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"transcribe.py: {error}")


if __name__ == "__main__":
    main()
