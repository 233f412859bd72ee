"""Decoding on the device: prompts of any lengths in buckets, a static cache, and a loop that the host only watches."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Generator as Yields
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoder import Cache, Params, forward, forward_embedded, init_cache, logits
from decoder_config import Config

SMALLEST_BUCKET = 16
CACHE_MULTIPLE = 64  # Positions: caches of nearly the same length take the same program.
NOTHING = -1  # In the place of a token behind the end of a row.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its scores.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: draws from the so many likeliest only; 0 for all.
      top_p: draws from the likeliest whose probabilities reach top_p together, the last one included.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0, for all tokens, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def kept_scores(scores: jax.Array, sampling: Sampling) -> jax.Array:
    """Scores [..., vocabulary] over the temperature, -inf where top_k and top_p leave a token out."""
    scores = scores / sampling.temperature
    vocabulary = scores.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        least = jax.lax.top_k(scores, sampling.top_k)[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if sampling.top_p < 1:
        descending = jnp.sort(scores, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores


def sample(scores: jax.Array, key: jax.Array, positions: jax.Array, sampling: Sampling) -> jax.Array:
    """One token for each row of scores [batch, vocabulary], which will stand at positions [batch].

    What is drawn depends on the key, the row's number and its position, and on nothing else in the batch.
    """
    if sampling.temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def draw(row: jax.Array, position: jax.Array, scores: jax.Array) -> jax.Array:
        of_token = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.categorical(of_token, scores)

    rows = jnp.arange(len(scores))
    return jax.vmap(draw)(rows, positions, kept_scores(scores, sampling)).astype(jnp.int32)


def bucket(length: int) -> int:
    """The length that a prompt is padded to: a power of two, or one and a half of one."""
    size = SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where decoding stands, on the device.

    Attributes:
      tokens: int32 [batch], the last of each row, which the model has not read yet.
      positions: int32 [batch], theirs.
      done: bool [batch], rows that have ended.
    """

    tokens: jax.Array
    positions: jax.Array
    done: jax.Array


def _is_stop(tokens: jax.Array, stop_tokens: Sequence[int]) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros(tokens.shape, bool)


def _prefill(
    params: Params,
    inputs: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    *,
    config: Config,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    cache_length: int,
) -> tuple[State, jax.Array, Cache]:
    """The first token of each row, in a State and as [batch, 1], and the cache."""
    run = forward if jnp.issubdtype(inputs.dtype, jnp.integer) else forward_embedded
    cache = init_cache(config, inputs.shape[0], cache_length, params["norm"].dtype)
    hidden, cache = run(params, inputs, config, cache, 0)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    tokens = sample(logits(params, last, config), key, lengths, sampling)
    state = State(tokens, lengths, _is_stop(tokens, stop_tokens))
    return state, jnp.where(state.done, NOTHING, tokens)[:, None], cache


def _decode(
    params: Params,
    state: State,
    cache: Cache,
    key: jax.Array,
    limit: jax.Array,
    *,
    config: Config,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    block: int,
) -> tuple[State, jax.Array, Cache]:
    """Up to `limit` more tokens of each row, [batch, block]; it ends early when every row has ended."""

    def goes_on(carry: Any) -> jax.Array:
        step, state, _, _ = carry
        return (step < limit) & ~state.done.all()

    def advance(carry: Any) -> Any:
        step, state, found, cache = carry
        hidden, cache = forward(params, state.tokens[:, None], config, cache, state.positions)
        positions = state.positions + 1
        tokens = sample(logits(params, hidden[:, 0], config), key, positions, sampling)
        done = state.done | _is_stop(tokens, stop_tokens)
        found = found.at[:, step].set(jnp.where(done, NOTHING, tokens))
        # A row that has ended stays where it is.
        positions = jnp.where(state.done, state.positions, positions)
        return step + 1, State(tokens, positions, done), found, cache

    found = jnp.full((len(state.tokens), block), NOTHING, jnp.int32)
    _, state, found, cache = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), state, found, cache))
    return state, found, cache


@dataclasses.dataclass
class Timings:
    """What a generation took, compilation apart.

    Attributes:
      prompt_tokens: of all rows.
      new_tokens: of all rows.
      compile_seconds: for programs that were not there yet.
      first_token_seconds: from the prompt to its first token on the host.
      decode_seconds: from there to the last token on the host.
      decoded_tokens: those of `new_tokens` behind the first of each row.
      device_bytes: parameters, cache and what the larger of both programs needs besides.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    compile_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0
    device_bytes: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.first_token_seconds

    @property
    def decode_rate(self) -> float:
        """Tokens a second behind the first of each row; NaN where there are none."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else float("nan")


class Generator:
    """Generates from prompts with one model; programs that it has compiled it uses again."""

    def __init__(
        self,
        params: Params,
        config: Config,
        sampling: Sampling = Sampling(),
        stop_tokens: Sequence[int] | None = None,
        block: int = 16,
    ):
        """Takes the model, how to sample, and the tokens that end a row (None: the configuration's).

        The device decodes `block` tokens between two looks of the host.
        """
        self._params, self._config = params, config
        stops = config.eos_token_ids if stop_tokens is None else stop_tokens
        options = {"config": config, "sampling": sampling, "stop_tokens": tuple(sorted(set(stops)))}
        self._prefill = jax.jit(functools.partial(_prefill, **options), static_argnames="cache_length")
        self._decode = jax.jit(functools.partial(_decode, **options, block=block), donate_argnums=2)
        self._block = block
        self._programs: dict[Any, Any] = {}
        self.timings = Timings()

    def room(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens the model has positions for behind the longest prompt."""
        return self._config.max_position_embeddings - max(map(len, prompts))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int = 0) -> Iterator[np.ndarray]:
        """Yields what follows each prompt, int32 [batch, some], NOTHING behind the end of a row.

        Raises:
          ValueError: there is no prompt or an empty one, a token is outside the vocabulary, no new token is asked for,
            or the longest prompt and the new tokens are more than the model has positions for.
        """
        vocabulary = self._config.vocab_size
        for prompt in prompts:
            if len(prompt) and not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise ValueError(f"the prompt has tokens outside the model's vocabulary, 0 to {vocabulary - 1}")
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self._check(lengths, max_new_tokens)
        tokens = np.zeros((len(prompts), self._bucket(lengths.max())), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        return self._run(jnp.asarray(tokens), lengths, max_new_tokens, seed)

    def generate_embedded(
        self, embeddings: jax.Array, lengths: Sequence[int], max_new_tokens: int, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """`generate` of prompts that are embedded already, [batch, t, hidden], of which `lengths` count."""
        lengths = np.asarray(lengths, np.int32)
        self._check(lengths, max_new_tokens)
        padding = self._bucket(embeddings.shape[1]) - embeddings.shape[1]
        return self._run(jnp.pad(embeddings, [(0, 0), (0, padding), (0, 0)]), lengths, max_new_tokens, seed)

    def _check(self, lengths: np.ndarray, max_new_tokens: int) -> None:
        limit = self._config.max_position_embeddings
        longest = int(lengths.max(initial=0))
        if lengths.min(initial=1) < 1 or not len(lengths) or max_new_tokens < 1 or longest + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest if lengths.all() else 0} tokens and {max_new_tokens} new ones were asked for; "
                f"there has to be at least one of each, and both together have to fit the model's {limit} positions"
            )

    def _bucket(self, length: int) -> int:
        return min(bucket(int(length)), self._config.max_position_embeddings)

    def _run(self, inputs: jax.Array, lengths: np.ndarray, max_new_tokens: int, seed: int) -> Iterator[np.ndarray]:
        longest = max(int(lengths.max()) + max_new_tokens, inputs.shape[1])
        cache_length = -(-longest // CACHE_MULTIPLE) * CACHE_MULTIPLE
        key, on_device = jax.random.key(seed), jnp.asarray(lengths)
        limits = [
            jnp.int32(min(self._block, max_new_tokens - 1 - i)) for i in range(0, max_new_tokens - 1, self._block)
        ]
        timings = self.timings = Timings(prompt_tokens=int(lengths.sum()))
        begin = time.perf_counter()
        arguments = (self._params, inputs, on_device, key)
        prefill, (state, _, cache) = self._compiled("prefill", self._prefill, arguments, cache_length=cache_length)
        programs = [prefill]
        if limits:
            decode, _ = self._compiled("decode", self._decode, (self._params, state, cache, key, limits[0]))
            programs.append(decode)
        timings.compile_seconds = time.perf_counter() - begin
        timings.device_bytes = max(map(_device_bytes, programs))

        begin = time.perf_counter()
        state, found, cache = prefill(self._params, inputs, on_device, key)
        found = np.asarray(found)
        first = time.perf_counter()
        timings.first_token_seconds = first - begin
        timings.new_tokens = int((found != NOTHING).sum())
        yield found
        # The device has its next block before the host waits for the one before it.
        pending: list[jax.Array] = []
        for limit in limits:
            state, found, cache = decode(self._params, state, cache, key, limit)
            pending.append(found)
            if len(pending) == 2 and (yield from self._noted(pending.pop(0), first)):
                break
        for found in pending:
            yield from self._noted(found, first)

    def _noted(self, block: jax.Array, first: float) -> Yields[np.ndarray, None, bool]:
        """Yields a block if it has tokens, and counts them; returns whether every row has ended."""
        tokens = np.asarray(block)
        count = int((tokens != NOTHING).sum())
        if count:
            self.timings.decode_seconds = time.perf_counter() - first
            self.timings.new_tokens += count
            self.timings.decoded_tokens += count
            yield tokens
        return count == 0

    def _compiled(self, name: str, function: Any, arguments: Any, **static: Any) -> tuple[Any, Any]:
        """A program for arguments of these shapes, and the shapes of its results."""
        leaves, structure = jax.tree.flatten(arguments[1:])
        key = (name, structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), tuple(static.items()))
        if key not in self._programs:
            lowered = function.lower(*arguments, **static)
            self._programs[key] = lowered.compile(), lowered.out_info
        return self._programs[key]


def _device_bytes(program: Any) -> int:
    """Bytes of a program's arguments, results and temporaries."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(memory, size) for size in sizes) - memory.alias_size_in_bytes
