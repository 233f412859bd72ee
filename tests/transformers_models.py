"""Tiny random decoders of the families that the examples compute, as transformers builds them."""

from __future__ import annotations

from typing import Any

_SHARED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    # Far from the usual 0.02, so that no part of the model is without effect on its scores.
    "initializer_range": 0.15,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
_DEFAULT = {"rope_type": "default", "rope_theta": 100.0}

# Name -> what differs from the shared fields; model_type is the family.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama_linear_rope": {
        "model_type": "llama",
        "rope_parameters": _LINEAR,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 4,
    },
    "llama3_tied": {"model_type": "llama", "rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    "mistral_window": {"model_type": "mistral", "sliding_window": 5, "rope_parameters": _DEFAULT},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
        "rope_parameters": _DEFAULT,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "rope_parameters": _DEFAULT},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 6,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "rope_parameters": _DEFAULT,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "sliding_window": 6,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"sliding_attention": _DEFAULT, "full_attention": _LINEAR},
    },
}


def random_model(name: str, changes: dict[str, Any]) -> Any:
    """A model of a family with random weights, norms and biases among them, in f32, by PyTorch's global generator."""
    import torch
    import transformers

    fields = _SHARED | FAMILIES[name] | changes
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert parameter.isfinite().all(), parameter_name
    return model
