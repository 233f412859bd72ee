"""Decoding in buckets, batches and blocks against a loop that computes everything anew for each token."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoder
from decoder_config import Config
from decoding import NOTHING, Generator, Sampling, bucket, kept_scores, sample
from jax_int4mm import checkpoints

DATA = Path(__file__).parents[1] / "data"
PROMPTS = [[3, 5, 7, 11], [19], list(range(40, 61)), [8, 8, 8]]


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def model(name: str = "llama_base") -> tuple[decoder.Params, Config]:
    checkpoint = checkpoints.load(DATA / name)
    config = Config.from_huggingface(checkpoint.config)
    return decoder.params_from_huggingface(checkpoint, config, "float32"), config


def plain(prompt: list[int], new: int, sampling: Sampling, seed: int, row: int, stops: tuple[int, ...]) -> list[int]:
    """The definition: all of the text through the model for every token."""
    params, config = model()
    tokens = list(prompt)
    for _ in range(new):
        hidden, _ = decoder.forward(params, jnp.asarray([tokens]), config)
        scores = decoder.logits(params, hidden[:, -1], config)
        if sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), len(tokens))
            token = int(jax.random.categorical(key, kept_scores(scores, sampling)[0]))
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def rows(blocks: object) -> list[list[int]]:
    found = np.concatenate(list(blocks), axis=1)
    ended = [np.flatnonzero(row == NOTHING) for row in found]
    assert all((row[end[0] :] == NOTHING).all() for row, end in zip(found, ended, strict=True) if len(end))
    return [[int(token) for token in row if token != NOTHING] for row in found]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=40), Sampling(1.5, top_p=0.8)], ids=str)
@pytest.mark.parametrize("block", [1, 4, 16])
def test_tokens_are_those_of_the_plain_loop(sampling: Sampling, block: int):
    generator = Generator(*model(), sampling, block=block)
    found = rows(generator.generate(PROMPTS, 9, seed=5))
    assert found == [plain(prompt, 9, sampling, 5, row, ()) for row, prompt in enumerate(PROMPTS)]
    timings = generator.timings
    assert (timings.prompt_tokens, timings.new_tokens, timings.decoded_tokens) == (29, 36, 32)
    assert min(timings.compile_seconds, timings.first_token_seconds, timings.decode_seconds, timings.device_bytes) > 0


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("stop_at", [0, 1, 4])
def test_rows_end_at_stop_tokens_and_others_go_on(block: int, stop_at: int):
    free = rows(Generator(*model(), Sampling(1.0)).generate(PROMPTS, 12, seed=2))
    stops = (free[0][stop_at], free[2][stop_at])
    params, config = model()
    expected = [plain(prompt, 12, Sampling(1.0), 2, row, stops) for row, prompt in enumerate(PROMPTS)]
    for generator in (
        Generator(params, config, Sampling(1.0), stops, block),
        Generator(params, dataclasses.replace(config, eos_token_ids=stops), Sampling(1.0), None, block),
    ):
        assert rows(generator.generate(PROMPTS, 12, seed=2)) == expected
    assert len(expected[0]) <= stop_at


def test_the_loop_ends_when_every_row_has():
    generator = Generator(*model(), stop_tokens=range(512), block=2)
    blocks = list(generator.generate(PROMPTS, 30))
    assert len(blocks) == 1
    assert (blocks[0] == NOTHING).all()


def test_a_prompt_may_be_embeddings():
    params, config = model()
    tokens = jnp.asarray([[3, 5, 7, 11, 13]])
    generator = Generator(params, config)
    embedded = generator.generate_embedded(decoder.embed(params, tokens, config), [5], 8)
    assert rows(embedded) == rows(generator.generate(tokens.tolist(), 8))


def test_prompts_of_one_bucket_share_a_program():
    generator = Generator(*model())
    for prompt in ([1], [1, 2, 3], [5] * 16):
        rows(generator.generate([prompt], 4))
    assert len(generator._programs) == 2
    rows(generator.generate([[5] * 17], 4))
    assert len(generator._programs) == 3
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 1000)] == [16, 16, 24, 24, 32, 48, 64, 1024]


def test_sampling_follows_the_seed_and_the_row():
    generator = Generator(*model(), Sampling(1.0))
    first, again, other = (rows(generator.generate([[3, 5]] * 3, 12, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] != first[1]
    assert rows(generator.generate([[3, 5], [9]], 12, 1))[0] == first[0]


def test_tokens_are_drawn_in_proportion_from_those_that_are_kept():
    scores = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))

    def share(sampling: Sampling) -> np.ndarray:
        draw = jax.vmap(lambda key: sample(scores, key, jnp.array([0]), sampling)[0])
        return np.bincount(draw(jax.random.split(jax.random.key(0), 4000)), minlength=4) / 4000

    # Four standard deviations of a binomial, at most.
    np.testing.assert_allclose(share(Sampling(1.0)), [0.1, 0.4, 0.2, 0.3], atol=0.032)
    np.testing.assert_allclose(share(Sampling(1.0, top_k=2)), [0, 4 / 7, 0, 3 / 7], atol=0.032)
    np.testing.assert_allclose(share(Sampling(1.0, top_p=0.65)), [0, 4 / 7, 0, 3 / 7], atol=0.032)
    np.testing.assert_allclose(share(Sampling(1.0, top_p=0.75)), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.032)
    np.testing.assert_allclose(share(Sampling(0.5)), np.array([1, 16, 4, 9]) / 30, atol=0.032)
    assert share(Sampling(1.0, top_p=1e-6))[1] == 1
    assert share(Sampling())[1] == 1


@pytest.mark.parametrize(("prompts", "new"), [([[]], 4), ([[3]], 0), ([[3] * 200], 57), ([], 3), ([[3], []], 3)])
def test_prompts_that_do_not_fit_are_refused(prompts: list[list[int]], new: int):
    with pytest.raises(ValueError, match="both together have to fit the model's 256 positions"):
        Generator(*model()).generate(prompts, new)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="outside the model's vocabulary, 0 to 511"):
        Generator(*model()).generate([[3, 512]], 4)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_sampling_that_is_none_is_refused(options: dict[str, float]):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is {next(iter(options.values()))}; it must be"):
        Sampling(**options)
