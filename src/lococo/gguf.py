"""GGUF files, unpacked once into an ordinary safetensors folder in the user's cache.

Reading GGUF takes fifteen seconds and reading safetensors a tenth of one. Weights stay float32 there: a Q4_1 value is
scale * level + offset with two float16 factors, which needs more bits than float16 or bfloat16 have.

Only tensors that this file knows how to place are accepted. A GGUF file with one tensor too many (a table of rope
frequencies, a bias) would otherwise load and be silently wrong.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lococo.cached import cached_folder
from lococo.errors import ModelError, UnsupportedModelError
from lococo.loading import check_causal, explained, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["convert", "converted_folder"]

# Architectures whose tensors are stored as they are; True where llama.cpp's rope wants the rows of q and k interleaved.
GGUF_ARCHITECTURES: Final = {"llama": True, "qwen2": False, "qwen3": False}
# llama.cpp splits these vocabularies at every digit before the GPT-2 expression; transformers knows the latter only.
SINGLE_DIGIT_SPLITS: Final = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)


def converted_folder(path: Path) -> Path:
    """Return the folder of a GGUF file's model; converted by the first call, and again when the file has changed.

    Raises what `convert` does.
    """
    # Reading gigabytes to hash them would cost more than the load that the cache saves.
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:16]

    def fill(folder: Path, work: Path) -> None:
        convert(path.resolve(), folder)

    return cached_folder(f"{path.stem}-{key}", f"converting {path.name}", fill)


def convert(path: Path, folder: Path) -> None:
    """Write the GGUF file at `path` into `folder` as safetensors, configuration and tokenizer.

    Raises:
        ModelError: If it cannot be read or converted.
        UnsupportedModelError: If its architecture is not known.
    """
    with quiet(progress=False):
        _convert(path, folder)


def _convert(path: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with explained(path.name):
        reader = GGUFReader(path)
        architecture = _text_field(reader, "general.architecture")
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    check_causal(config, path.name)
    if architecture not in GGUF_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path.name} has the GGUF architecture {architecture!r}; expected one of {', '.join(GGUF_ARCHITECTURES)}; "
            "load the model's original folder or hub id instead"
        )
    scaling = _text_field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in {"", "none"}:
        # transformers leaves these fields out, and the model would read long texts at the wrong positions.
        raise UnsupportedModelError(
            f"{path.name} scales its rope ({scaling}); load the original folder or hub id instead"
        )
    with explained(path.name):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _repair_splits(tokenizer, _text_field(reader, "tokenizer.ggml.pre"))
    _fill_weights(model, reader, path.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _text_field(reader: Any, name: str) -> str:
    field = reader.get_field(name)
    return str(field.contents()) if field is not None else ""


def _repair_splits(tokenizer: Any, split: str) -> None:
    if split in SINGLE_DIGIT_SPLITS:
        from tokenizers import pre_tokenizers

        # Without this the two spaces of "x  5" become two tokens, where the model was trained to see one.
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def _fill_weights(model: PreTrainedModel, reader: Any, label: str) -> None:
    """Copy every tensor of the file into the model: float32, no tensor left over and no weight left out."""
    import numpy as np
    import torch
    from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

    config = model.config
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == _text_field(reader, "general.architecture"))
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    weights: dict[str, torch.Tensor] = {
        names.get_name(key, try_suffixes=(".weight", ".bias")) or key: value
        for key, value in model.state_dict().items()
    }
    if config.tie_word_embeddings:
        weights.pop("output.weight")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if odd := sorted(tensors.keys() ^ weights.keys()):
        state = "does not know" if odd[0] in tensors else "misses"
        raise ModelError(f"{label}: the conversion {state} the tensor {odd[0]}; load the original folder or hub id")
    for name, weight in weights.items():
        values = np.array(dequantize(tensors[name].data, tensors[name].tensor_type), dtype=np.float32)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and GGUF_ARCHITECTURES[MODEL_ARCH_NAMES[arch]]:
            values = _uninterleave(values, heads)
        if values.shape != weight.shape:
            shapes = f"{list(values.shape)}; expected {list(weight.shape)}"
            raise ModelError(
                f"{label}: {name} has the shape {shapes} by its header; load the original folder or hub id"
            )
        weight.copy_(torch.from_numpy(values))


def _uninterleave(rows: Any, heads: int) -> Any:
    """Bring rotary pairs from neighbouring rows, as llama.cpp stores them, to the two halves of each head.

    Args:
        rows: [heads * d, ...], d rows per head.
        heads: Query or key heads in this matrix.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [heads, d/2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(rows.shape)
