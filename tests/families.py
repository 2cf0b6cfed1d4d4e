"""Tiny random models of the real classes."""

from functools import cache
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lococo.compressors.learned import LearnedHeads
from lococo.compressors.nets import HeadSettings
from lococo.facts import ModelFacts
from lococo.norms import norm_names

VOCABULARY = 128
WINDOW = 1024

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
WITHOUT_HEAD_DIM = {key: value for key, value in SMALL.items() if key != "head_dim"}

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, SMALL),
    "llama-yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        SMALL
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        SMALL
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, SMALL | {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, WITHOUT_HEAD_DIM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, SMALL),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, SMALL | SLIDING | {"query_pre_attn_scalar": 12}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, SMALL | SLIDING | {"query_pre_attn_scalar": 12}),
    "phi3": (Phi3Config, Phi3ForCausalLM, WITHOUT_HEAD_DIM),
    "glm4": (Glm4Config, Glm4ForCausalLM, SMALL),
    "gpt-neox": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {k: v for k, v in WITHOUT_HEAD_DIM.items() if k != "num_key_value_heads"},
    ),
    "gpt2": (
        GPT2Config,
        GPT2LMHeadModel,
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_inner": 64,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": WINDOW,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
}


def tiny(family: str = "llama", attention: str | None = None) -> PreTrainedModel:
    """A model of a family, always the same one."""
    # Gemma 2's capped logits exist in eager attention alone.
    return _tiny(family, attention or ("eager" if family == "gemma2" else "sdpa"))


@cache
def _tiny(family: str, attention: str) -> PreTrainedModel:
    config_class, model_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**settings)
    config._attn_implementation = attention
    model: PreTrainedModel = model_class(config).eval()
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(ids: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put `pads` padding tokens before each row, and cut off as many at its end: ids and attention mask, (b n)."""
    length = ids.shape[1]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, pad in enumerate(pads):
        padded[row, pad:] = ids[row, : length - pad]
        mask[row, pad:] = 1
    return padded, mask


def heads_for(model, *, scale=0.0, **options):
    """Heads for a tiny model, with every weight moved by noise of this scale."""
    facts = ModelFacts.of(model)
    norms = norm_names(model.base_model)
    torch.manual_seed(1)
    heads = LearnedHeads(
        HeadSettings(
            layers=range(facts.num_hidden_layers),
            num_key_value_heads=facts.num_key_value_heads,
            head_dim=facts.head_dim,
            norms=norms,
            hidden_size=model.config.hidden_size,
            **options,
        )
    )
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += scale * torch.randn_like(parameter)
    return heads.requires_grad_(False)
