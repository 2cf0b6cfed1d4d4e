"""Shapes of published models, so that one can plan for them without the hub: facts of their config.json, no weights."""

from typing import Any

_LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
_QWEN_3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}


def _shape(hidden: int, layers: int, heads: int, intermediate: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": intermediate} | more


# Hub id: transformers' name of its kind, and what differs from that kind's defaults.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-2-7b-hf": ("llama", _shape(4096, 32, 32, 11008, vocab_size=32000, max_position_embeddings=4096)),
    "meta-llama/Llama-2-13b-hf": ("llama", _shape(5120, 40, 40, 13824, vocab_size=32000, max_position_embeddings=4096)),
    "meta-llama/Llama-3.1-8B": ("llama", _shape(4096, 32, 32, 14336, **_LLAMA_3)),
    "meta-llama/Llama-3.1-70B": ("llama", _shape(8192, 80, 64, 28672, **_LLAMA_3)),
    # In transformers' words; its own are num_layers, ffn_hidden_size, multi_query_group_num, padded_vocab_size.
    "zai-org/chatglm3-6b-32k": (
        "glm",
        _shape(4096, 28, 32, 13696, num_key_value_heads=2, head_dim=128, attention_bias=True)
        | {"vocab_size": 65024, "max_position_embeddings": 32768, "pad_token_id": 0, "eos_token_id": 2},
    ),
    "Qwen/Qwen3-0.6B": ("qwen3", _shape(1024, 28, 16, 3072, tie_word_embeddings=True, **_QWEN_3)),
    "Qwen/Qwen3-1.7B": ("qwen3", _shape(2048, 28, 16, 6144, tie_word_embeddings=True, **_QWEN_3)),
    "Qwen/Qwen3-4B": ("qwen3", _shape(2560, 36, 32, 9728, tie_word_embeddings=True, **_QWEN_3)),
    "Qwen/Qwen3-8B": ("qwen3", _shape(4096, 36, 32, 12288, **_QWEN_3)),
    "Qwen/Qwen3-14B": ("qwen3", _shape(5120, 40, 40, 17408, **_QWEN_3)),
    "Qwen/Qwen3-32B": ("qwen3", _shape(5120, 64, 64, 25600, **_QWEN_3)),
}
