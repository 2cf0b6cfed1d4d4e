"""Tiny random checkpoints as THUDM lays them out, and tokenizers for them."""

import base64
import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

TEXT = "The quick brown fox jumps over the lazy dog. 狐狸跳过懒狗。 Naïve zebras count 1234567 twice.\n"
SYMBOL = "<|blank|>"

CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b-32k",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 40,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 32,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 512,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "quantization_bit": 0,
    "rmsnorm": True,
    "rope_ratio": 50,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GLM_4 = {"_name_or_path": "THUDM/glm-4-9b", "rope_ratio": 500, "seq_length": 131072, "layernorm_epsilon": 1.5625e-07}
GLM_4 |= {"padded_vocab_size": 320, "eos_token_id": [259, 266, 268], "pad_token_id": 259, "multi_query_group_num": 4}
CHATGLM2 = {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 4}
# What matters in THUDM's Python files: which tokens they number, and what they do with rope_ratio.
TOKENIZATION = {
    "chatglm2": 'special_tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]\n',
    "chatglm3": 'role_special_tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]\n',
    "glm-4": "import tiktoken\n",
}


def weights_of(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under ChatGLM's names, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    hidden, wide, vocabulary = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    inner = config["num_attention_heads"] * config["kv_channels"]
    fused = inner + 2 * config["multi_query_group_num"] * config["kv_channels"]

    def noise(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.25 * torch.randn(*shape, generator=generator)

    made = {"transformer.embedding.word_embeddings.weight": noise(vocabulary, hidden)}
    made["transformer.rotary_pos_emb.inv_freq"] = noise(config["kv_channels"] // 4).half()
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}"
        made[f"{prefix}.input_layernorm.weight"] = noise(hidden, mean=1.0)
        made[f"{prefix}.self_attention.query_key_value.weight"] = noise(fused, hidden)
        if config["add_qkv_bias"]:
            made[f"{prefix}.self_attention.query_key_value.bias"] = noise(fused)
        made[f"{prefix}.self_attention.dense.weight"] = noise(hidden, inner)
        made[f"{prefix}.post_attention_layernorm.weight"] = noise(hidden, mean=1.0)
        made[f"{prefix}.mlp.dense_h_to_4h.weight"] = noise(2 * wide, hidden)
        made[f"{prefix}.mlp.dense_4h_to_h.weight"] = noise(hidden, wide)
    made["transformer.encoder.final_layernorm.weight"] = noise(hidden, mean=1.0)
    made["transformer.output_layer.weight"] = noise(vocabulary, hidden) / 2
    return made


def save(
    folder: Path, *, family: str = "chatglm3", shards: int = 3, seed: int = 0, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Write a checkpoint, and return its tensors and its config."""
    config = CONFIG | {"chatglm2": CHATGLM2, "chatglm3": {}, "glm-4": GLM_4}[family] | settings
    folder.mkdir(parents=True)
    # THUDM's own files are written with two spaces and a line break at the end.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "tokenization_chatglm.py").write_text(TOKENIZATION[family], "utf-8")
    (folder / "tokenizer.model").write_bytes(ranks() if family == "glm-4" else pieces())
    (folder / "README.md").write_text("# A tiny model\n", "utf-8")
    weights = weights_of(config, seed)
    save_shards(folder, weights, shards)
    return weights, config


def save_shards(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    keys = list(weights)
    size = -(-len(keys) // shards)
    places = {key: names[index // size] for index, key in enumerate(keys)}
    for name in names:
        save_file({key: weights[key] for key in keys if places[key] == name}, folder / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


@cache
def pieces(kind: str = "bpe", vocab_size: int = 420, **options: Any) -> bytes:
    """A sentencepiece model of a few pieces, with bytes for the rest."""
    model = BytesIO()
    settings = {"byte_fallback": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT.strip()] * 20),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings | options,
    )
    return model.getvalue()


@cache
def ranks() -> bytes:
    """A file of ranked tokens: all bytes, and three merges of them."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"the", b" the"]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
