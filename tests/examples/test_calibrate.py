from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calibrate
import decoder
import generate
import jax_int4mm as i4
from decoder_config import Config
from jax_int4mm import checkpoints
from jax_int4mm.quantizers import Hessian
from printed_table import numbers

BASE = Path(__file__).parents[1] / "data" / "llama_base"


@functools.cache
def base() -> tuple[decoder.Params, Config]:
    checkpoint = checkpoints.load(BASE)
    config = Config.from_huggingface(checkpoint.config)
    return decoder.params_from_huggingface(checkpoint, config, "bfloat16"), config


def test_windows_are_spread_over_the_text():
    windows = calibrate.spread_windows(np.arange(100), 10, 4)
    np.testing.assert_array_equal(windows[:, 0], [0, 30, 60, 90])
    np.testing.assert_array_equal(windows - windows[:, :1], np.tile(np.arange(10), (4, 1)))
    np.testing.assert_array_equal(calibrate.spread_windows(np.arange(3), 10, 2), [[0, 1, 2]] * 2)
    with pytest.raises(ValueError, match="the text to calibrate with is empty"):
        calibrate.spread_windows(np.arange(0), 10, 2)


def inputs_of_linears(layer: decoder.Params, x: jax.Array, config: Config) -> dict[str, jax.Array]:
    """What each linear layer multiplies, written down once more."""
    batch, t, _ = x.shape
    h = decoder.rms_norm(x, layer["attention_norm"], config.rms_norm_eps)
    heads = [(h @ layer[name]).reshape(batch, t, -1, config.head_dim) for name in "qkv"]
    turned = [decoder.rotate(a, jnp.arange(t), config.rope.frequencies(config.head_dim)) for a in heads[:2]]
    attended = jax.nn.dot_product_attention(*turned, heads[2], is_causal=True).reshape(batch, t, -1)
    middle = x + attended @ layer["o"]
    m = decoder.rms_norm(middle, layer["mlp_norm"], config.rms_norm_eps)
    down = jax.nn.silu(m @ layer["gate"]) * (m @ layer["up"])
    return {"q": h, "k": h, "v": h, "o": attended, "gate": m, "up": m, "down": down}


def test_what_a_linear_layer_multiplies_is_observed(rng: np.random.Generator):
    params, config = base()
    x = params["embedding"][rng.integers(0, config.vocab_size, (2, 16))]
    for name, expected in inputs_of_linears(params["layers"][0], x, config).items():
        zeros = Hessian.zeros(expected.shape[-1])
        found = calibrate.observe(zeros, params["layers"][0], x, config, 0, name).matrix
        exact = np.asarray(zeros.add(expected).matrix)
        np.testing.assert_allclose(found, exact, rtol=0, atol=0.02 * np.abs(exact).max())


def test_each_layer_is_calibrated_behind_quantised_ones(rng: np.random.Generator):
    params, config = base()
    windows = rng.integers(0, config.vocab_size, (4, 64)).astype(np.int32)
    quantized = calibrate.quantize_linears_gptq(params, config, windows, 64, lm_head=True)

    def same(found: i4.Int4Weight, w: jax.Array, hessian: Hessian) -> float:
        return float((i4.quantize(w, 64, "gptq", calibration=hessian).packed == found.packed).mean())

    x = params["embedding"][windows]
    run = jax.jit(decoder.layer_forward, static_argnames=("config", "index"))
    for index, (layer, dense) in enumerate(zip(quantized["layers"], params["layers"], strict=True)):
        for names in calibrate.SHARED_INPUTS:
            zeros = Hessian.zeros(dense[names[0]].shape[0])
            int4, others = (calibrate.observe(zeros, before, x, config, index, names[0]) for before in (layer, dense))
            for name in names:
                assert same(layer[name], dense[name], int4) >= 0.9, name
                assert (same(layer[name], dense[name], others) >= 0.9) == (name in "qkv"), name
        x, _ = run(layer, x, config, index)
    last = Hessian.zeros(config.hidden_size).add(decoder.rms_norm(x, params["norm"], config.rms_norm_eps))
    assert same(quantized["lm_head"], decoder.output_projection(params), last) >= 0.9


def test_command_line_with_a_calibration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "numbers.txt"
    file.write_text(" ".join(str(7 * i % 500) for i in range(300)))
    model = ["--model", str(BASE), "--token-ids", "--max-new-tokens", "3", "--method", "gptq"]
    generate.main([*model, "--calibration", str(file), "--calibration-windows", "2"])
    printed = capsys.readouterr().out
    assert len(printed.split("--- int4 g64\n")[1].split("\n")[0].split()) == 4
    for arguments, sentence in [
        ([], "--method gptq needs text of the kind that the model is for: --calibration FILE"),
        (["--calibration", str(tmp_path / "none")], "there is no file .*none to calibrate with"),
    ]:
        with pytest.raises(SystemExit, match=rf"^generate\.py: {sentence}"):
            generate.main([*model, *arguments])
    file.write_text("1 2 600")
    with pytest.raises(SystemExit, match=r"numbers\.txt has tokens outside the model's vocabulary, 0 to 511"):
        generate.main([*model, "--calibration", str(file)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--act-order"], "--act-order and --calibration are for --method gptq"),
        (["--calibration", "file"], "--act-order and --calibration are for --method gptq"),
        (["--method", "gptq", "--calibration-windows", "0"], "--calibration-windows is at least 1"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        generate.main(arguments)
    assert sentence in capsys.readouterr().err


def test_shipped_model_is_calibrated_with_the_training_text(capsys: pytest.CaptureFixture[str]):
    common = ["--group-size", "128", "--max-new-tokens", "1", "--perplexity-windows", "2"]
    generate.main([*common, "--method", "gptq", "--act-order", "--calibration-windows", "4"])
    printed = capsys.readouterr().out
    dense, int4 = numbers(printed, "perplexity")
    assert int4 <= 1.02 * dense
    # Four bits and a scale and a zero for 128 of them, and the order of k.
    dense_bytes, int4_bytes = numbers(printed, "linear layers, bytes")
    assert int4_bytes > dense_bytes * 17 // 64
