"""Tiny random models of the real classes, and the README's table of them.

`python tests/families.py --write` puts the table into README.md.
"""

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lococo.attachment import slot_layer_indices
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
# Wider than the model's window, so that nothing ever slides out of it: what the configs of Phi 3.5 and Phi 4 mini have.
WIDE = {"sliding_window": 2 * WINDOW}
NARROW = {"sliding_window": 16}
WITHOUT_HEAD_DIM = {key: value for key, value in SMALL.items() if key != "head_dim"}

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ALTERNATING = {"layer_types": ["linear_attention", "full_attention"] * 2}
MAMBA = {"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = WITHOUT_HEAD_DIM | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = YARN | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
OLD_NAMES = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 4, "n_head": 4, "initializer_range": 0.2}
NO_STOPS = {"bos_token_id": None, "eos_token_id": None}
FALCON = WITHOUT_HEAD_DIM | {"num_kv_heads": 2, "alibi": False}


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        models: Its name for people, in the README's table.
        classes: What transformers' classes of config and model begin with; by default the model's ends in ForCausalLM.
        settings: Of the tiny one.
        notes: What is special about it.
        attention: Implementation of the tiny one.
        refused: Reason in the error at attach time; "" for a family that can be read in slots.
    """

    models: str
    classes: str
    settings: dict[str, Any]
    notes: str = ""
    attention: str = "sdpa"
    refused: str = ""


SLIDES = "sliding layers keep their cache"
STATE = "attention in slots, the recurrent state untouched"
MIXED = "mixture of experts"
ITSELF = "computes attention by itself"
# GPT-J has a table of angles; up to transformers 5.23 it computed attention by itself as well.
OTHERWISE = "otherwise than its `rotary_emb`"
CONSTANT = "refused: all layers slide, its memory is constant already"

EVERY: dict[str, Family] = {
    "llama": Family("Llama 2, SmolLM2", "Llama", SMALL),
    "llama-yarn": Family("Llama with YaRN", "Llama", SMALL | {"rope_parameters": YARN}),
    "llama3": Family(
        "Llama 3", "Llama", SMALL | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 128}}
    ),
    "mistral": Family("Mistral", "Mistral", SMALL | {"sliding_window": None}),
    "mixtral": Family("Mixtral", "Mixtral", SMALL | LOCAL_MOE | {"sliding_window": None}, MIXED),
    "qwen2": Family("Qwen 2 and 2.5", "Qwen2", WITHOUT_HEAD_DIM),
    "qwen2-moe": Family(
        "Qwen 2 MoE", "Qwen2Moe", WITHOUT_HEAD_DIM | MOE | {"shared_expert_intermediate_size": 32}, MIXED
    ),
    "qwen3": Family("Qwen 3", "Qwen3", SMALL),
    "qwen3-moe": Family("Qwen 3 MoE", "Qwen3Moe", SMALL | MOE, MIXED),
    "qwen3-next": Family(
        "Qwen 3 Next",
        "Qwen3Next",
        SMALL
        | MOE
        | ALTERNATING
        | {"shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        STATE,
    ),
    "gemma": Family("Gemma", "Gemma", SMALL),
    "gemma2": Family(
        # Capped logits exist in eager attention alone.
        "Gemma 2",
        "Gemma2",
        SMALL | SLIDING | {"query_pre_attn_scalar": 12},
        SLIDES,
        "eager",
    ),
    "gemma3": Family("Gemma 3", "Gemma3|Text", SMALL | SLIDING | {"query_pre_attn_scalar": 12}, SLIDES),
    "gemma3n": Family(
        "Gemma 3n",
        "Gemma3n|Text",
        SMALL
        | SLIDING
        | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
        | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
        "the last layers look into the slots of earlier ones",
    ),
    "phi": Family("Phi 1 and 2", "Phi", WITHOUT_HEAD_DIM | {"partial_rotary_factor": 0.5}),
    "phi3": Family("Phi 4", "Phi3", WITHOUT_HEAD_DIM),
    "phi3-longrope": Family(
        "Phi 3 128k, Phi 3.5",
        "Phi3",
        WITHOUT_HEAD_DIM
        | WIDE
        | {"max_position_embeddings": WINDOW, "original_max_position_embeddings": 256}
        | {"rope_parameters": LONGROPE | {"factor": 4.0, "original_max_position_embeddings": 256}},
        "read within the original window",
    ),
    "phi4": Family("Phi 4 mini", "Phi3", WITHOUT_HEAD_DIM | WIDE | {"partial_rotary_factor": 0.5}),
    "glm": Family("GLM 4 (9B)", "Glm", SMALL),
    "glm4": Family("GLM 4 (0414)", "Glm4", SMALL),
    "granite": Family("Granite 3", "Granite", WITHOUT_HEAD_DIM | {"attention_multiplier": 0.3}),
    "granite-hybrid": Family(
        "Granite 4",
        "GraniteMoeHybrid",
        WITHOUT_HEAD_DIM
        | LOCAL_MOE
        | MAMBA
        | {"layer_types": ["mamba", "attention"] * 2, "mamba_d_head": 24, "shared_intermediate_size": 32},
        STATE,
    ),
    "olmo2": Family("OLMo 2", "Olmo2", WITHOUT_HEAD_DIM),
    "olmo3": Family("OLMo 3", "Olmo3", WITHOUT_HEAD_DIM | SLIDING, SLIDES),
    "cohere": Family("Command R", "Cohere", WITHOUT_HEAD_DIM | {"logit_scale": 1.0}),
    "cohere2": Family(
        "Command R7B", "Cohere2", SMALL | SLIDING | {"logit_scale": 1.0}, f"{SLIDES}, the others have no RoPE"
    ),
    "deepseek-v2": Family(
        "DeepSeek V2", "DeepseekV2", LATENT | {"q_lora_rank": None, "n_group": 1}, "latents in slots"
    ),
    "deepseek-v3": Family(
        "DeepSeek V3 and R1", "DeepseekV3", LATENT | {"q_lora_rank": 24, "n_group": 2}, "latents in slots"
    ),
    "gpt-oss": Family(
        "gpt-oss",
        "GptOss",
        SMALL | SLIDING | LOCAL_MOE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        f"{SLIDES}, sinks count",
        "eager",
    ),
    "smollm3": Family("SmolLM3", "SmolLM3", WITHOUT_HEAD_DIM | {"no_rope_layers": [1, 0, 1, 1]}, "layers without RoPE"),
    "exaone4": Family("EXAONE 4", "Exaone4", SMALL | SLIDING, f"{SLIDES}, the others have no RoPE"),
    "starcoder2": Family(
        "StarCoder 2 tuned without its sliding window", "Starcoder2", WITHOUT_HEAD_DIM | {"sliding_window": None}
    ),
    "falcon-h1": Family("Falcon H1", "FalconH1", SMALL | MAMBA | {"mamba_d_ssm": 48, "mamba_d_head": 12}, STATE),
    "lfm2": Family("LFM 2", "Lfm2", WITHOUT_HEAD_DIM | {"layer_types": ["conv", "full_attention"] * 2}, STATE),
    "gpt-neox": Family(
        "GPT-NeoX, Pythia", "GPTNeoX", {k: v for k, v in WITHOUT_HEAD_DIM.items() if k != "num_key_value_heads"}
    ),
    "gpt2": Family("GPT-2", "GPT2|", OLD_NAMES | NO_STOPS | {"n_inner": 64, "n_positions": WINDOW}),
    "jamba": Family(
        "Jamba",
        "Jamba",
        WITHOUT_HEAD_DIM
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
        "with `chunk_size=1` only: its state forgets between longer calls",
        refused="recurrent layers of JambaForCausalLM forget",
    ),
    "falcon": Family(
        "Falcon", "Falcon", FALCON | {"new_decoder_architecture": True}, "refused: " + ITSELF, refused=ITSELF
    ),
    "falcon-7b": Family("Falcon 7B", "Falcon", FALCON | {"multi_query": True}, "refused: " + ITSELF, refused=ITSELF),
    "bloom": Family(
        "BLOOM",
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 4, "n_head": 4},
        "refused: ALiBi, " + ITSELF,
        "eager",
        ITSELF,
    ),
    "mpt": Family(
        "MPT",
        "Mpt",
        {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 4, "n_heads": 4},
        "refused: ALiBi, " + ITSELF,
        "eager",
        ITSELF,
    ),
    "gptj": Family(
        "GPT-J",
        "GPTJ",
        OLD_NAMES | NO_STOPS | {"rotary_dim": 4},
        "refused: " + ITSELF,
        "eager",
        OTHERWISE if Version(transformers.__version__) >= Version("5.24") else ITSELF,
    ),
    "stablelm": Family(
        "StableLM",
        "StableLm",
        WITHOUT_HEAD_DIM | {"partial_rotary_factor": 0.5},
        "refused: hands attention no arguments",
        refused="passes no arguments on",
    ),
    "nemotron": Family(
        "Nemotron", "Nemotron", SMALL, "refused: hands attention no arguments", refused="passes no arguments on"
    ),
    "mistral-sliding": Family("Mistral 0.1", "Mistral", SMALL | NARROW, CONSTANT, refused="constant already"),
    "phi3-4k": Family("Phi 3 4k", "Phi3", WITHOUT_HEAD_DIM | NARROW, CONSTANT, refused="constant already"),
    "starcoder2-sliding": Family(
        "StarCoder 2 as published", "Starcoder2", WITHOUT_HEAD_DIM | NARROW, CONSTANT, refused="constant already"
    ),
    "llama4": Family(
        "Llama 4",
        "Llama4|Text",
        SMALL | LOCAL_MOE | {"intermediate_size_mlp": 64, "attention_chunk_size": 24},
        "refused: its rotation cannot be asked for",
        refused="rotates its keys",
    ),
}

FAMILIES = {name: family for name, family in EVERY.items() if not family.refused}
REFUSED = {name: family for name, family in EVERY.items() if family.refused}
# What `lococo.rope`'s own tests know how to ask for angles: all keys of all layers turn, by one call per layer.
ROTATING = ("llama", "llama-yarn", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
ROTATING += ("phi4", "glm", "glm4", "granite", "olmo2", "olmo3", "cohere", "starcoder2", "gpt-neox")


def tiny(family: str = "llama", attention: str | None = None) -> PreTrainedModel:
    """A model of a family, always the same one."""
    return _tiny(family, attention or EVERY[family].attention)


@cache
def _tiny(name: str, attention: str) -> PreTrainedModel:
    family = EVERY[name]
    classes, _, kind = family.classes.partition("|")
    ends = "LMHeadModel" if family.classes.endswith("|") else "ForCausalLM"
    config = getattr(transformers, f"{classes}{kind}Config")(**family.settings)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, classes + ends)(config).eval()
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


def tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of as many words."""
    words = WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0")


def heads_for(model, *, scale=0.0, **options):
    """Heads for a tiny model, with every weight moved by noise of this scale."""
    facts = ModelFacts.of(model)
    norms = norm_names(model.get_decoder())
    torch.manual_seed(1)
    heads = LearnedHeads(
        HeadSettings(
            layers=slot_layer_indices(model),
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


README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- families: [^>]* -->\n).*?(<!-- end of families -->)", re.DOTALL)


def readme_table() -> str:
    """The families as a table in Markdown."""
    rows = [f"| {family.models} | {'no' if family.refused else 'yes'} | {family.notes} |" for family in EVERY.values()]
    return "\n".join(["| models | slots | |", "|---|---|---|", *rows, ""])


def with_table(readme: str) -> str:
    """The README with the table between its two marks."""
    return MARKED.sub(lambda found: f"{found[1]}\n{readme_table()}\n{found[2]}", readme)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    README.write_text(with_table(README.read_text("utf-8")), encoding="utf-8")
