"""Tiny models in folders and GGUF files."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512}


def byte_tokenizer(extra: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(extra),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox  and  the lazy dog " * 5], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=extra[0], eos_token=extra[1])


def tiny(family: type = LlamaConfig, **options):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = family(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **SIZES | options)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def save_tiny(folder: Path, **options) -> Path:
    model, tokenizer = tiny(**options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The layout llama.cpp's converter writes: row 2i of a head from its first half, row 2i + 1 from its second."""
    per_head = rows.reshape(heads, -1, rows.shape[-1])
    out = np.empty_like(per_head)
    half = per_head.shape[1] // 2
    out[:, 0::2], out[:, 1::2] = per_head[:, :half], per_head[:, half:]
    return out.reshape(rows.shape)


def write_gguf(path: Path, architecture: str, model, tokenizer, extra: str | None = None) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3, 3] + [1] * (len(vocab) - 2))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        name, rows = names.get_name(key, try_suffixes=(".weight", ".bias")), value.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        writer.add_tensor(name, interleaved(rows, heads) if heads and architecture == "llama" else rows)
    if extra:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits
