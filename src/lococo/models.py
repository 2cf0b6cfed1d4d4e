"""Load a causal language model and its tokenizer from a name, a folder, a GGUF file or nothing at all.

With no name the embedded default is loaded, see `default_model`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lococo import default_model, gguf, tuned
from lococo.errors import ArgumentError, ModelError
from lococo.folders import check_folder, check_loaded, check_tokenizer
from lococo.loading import check_causal, explained, quiet

# Importing torch and transformers takes two seconds, and the command line imports this file to answer --help.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_config", "load_model", "model_id", "tokenizer_fingerprint"]


def load_model(
    name: str | os.PathLike[str] | None = None,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    Example:
        >>> model, tokenizer = load_model()  # the embedded default
        >>> model, tokenizer = load_model("my-folder", dtype="bfloat16")
        >>> model, tokenizer = load_model("model.Q8_0.gguf", device="cuda")

    Args:
        name: None for the embedded default, a local folder, a path that ends in .gguf, the name of a tuned model that
            comes with the package (`tuned.shipped`), or a hub id. A folder that `lococo extend` wrote loads its base
            model, with what was tuned of it.
        dtype: Floating-point type of the weights, or "auto" for the one they are stored in.
        device: Where to put the weights; None leaves them on the CPU.
        trust_remote_code: Run Python code that a folder or a hub id brings along.

    Returns:
        The model and its tokenizer. `model_id` of the model gives a stable name.

    Raises:
        ArgumentError: `dtype` is no floating-point type, or `device` is not on this machine.
        ModelError: There is no such file, or it cannot be fetched, read or converted.
        UnsupportedModelError: The model is no decoder-only causal language model.
    """
    dtype = _floating_type(dtype)
    device = _present_device(device)
    source, label = _resolve(name)
    if tuned.has_adapter(source):
        model, tokenizer = _load_tuned(source, dtype, trust_remote_code)
    else:
        with quiet(progress=source == label and sys.stderr.isatty()):
            model = _load_weights(source, label, dtype, trust_remote_code)
            tokenizer = _load_tokenizer(source, label, trust_remote_code)
        check_tokenizer(label, model, tokenizer)
    if tuned.is_tuned(source):
        tuned.remember(model, source)
    # transformers leaves the cache folder here, which differs from machine to machine.
    model.config._name_or_path = label
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def load_config(
    name: str | os.PathLike[str] | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, str]:
    """Load what `load_model` would, without its weights: the config alone, and the model's name.

    Raises:
        ModelError: There is no such file, or it cannot be fetched or read.
        UnsupportedModelError: The model is no decoder-only causal language model.
    """
    source, label = _resolve(name)
    if tuned.has_adapter(source):
        config, _ = load_config(_base(source), trust_remote_code=trust_remote_code)
        for field, value in tuned.record_of(source)["rope"].items():
            setattr(config.get_text_config(decoder=True), field, value)
        return config, label
    with quiet(progress=False):
        return _config(source, label, trust_remote_code), label


def load_tokenizer(
    name: str | os.PathLike[str] | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `load_model` would, without the model."""
    source, label = _resolve(name)
    if tuned.has_adapter(source):
        return load_tokenizer(_base(source), trust_remote_code=trust_remote_code)
    with quiet(progress=False):
        return _load_tokenizer(source, label, trust_remote_code)


def files_of(name: str | os.PathLike[str] | None = None) -> str:
    """Return the folder, or the hub id, that transformers loads a model of this name from."""
    return _resolve(name)[0]


def gguf_file(name: str | os.PathLike[str] | None = None) -> Path:
    """Return the GGUF file of a model.

    Raises:
        ModelError: If it has none.
    """
    if name is None:
        return default_model.default_gguf()
    path = Path(name).expanduser()
    if path.suffix.lower() != ".gguf" or not path.is_file():
        raise ModelError(f"{name} is no GGUF file, and llama.cpp reads no other; name one")
    return path


def model_id(model: PreTrainedModel) -> str:
    """Give a name of the model that is the same on every machine.

    Args:
        model: A model from `load_model`, or any other.

    Returns:
        The hub id, or the last part of a local folder, or the stem of a GGUF file; the architecture's name for a model
        that was never loaded.
    """
    name = str(model.config._name_or_path or "")
    if os.path.isabs(name) or os.path.isdir(name):
        return Path(name).name
    return name or str(model.config.model_type)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest what gives token ids their meaning.

    The chat template is left out: editing it changes no id, and a context file stays readable.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        16 hexadecimal digits of the SHA-256 over the vocabulary, sorted by id, and the special tokens.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], str(entry[0]))):
        digest.update(f"{index}\t{token!r}\n".encode())
    for role, special in sorted(tokenizer.special_tokens_map.items()):
        digest.update(f"{role}\t{special!s}\n".encode())
    return digest.hexdigest()[:16]


def _load_tuned(
    source: str, dtype: str | torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    # A base that was rounded to float16 and then to bfloat16, for its fingerprint, would not be known again.
    half = dtype == torch.float16
    model, tokenizer = load_model(_base(source), dtype="auto" if half else dtype, trust_remote_code=trust_remote_code)
    tuned.apply_tuned(model, source)
    if half:
        for parameter in model.parameters():  # and not the buffers: tables of angles stay exact
            parameter.data = parameter.data.half()
        model.config.dtype = torch.float16
    return model, tokenizer


def _floating_type(dtype: str | torch.dtype) -> str | torch.dtype:
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found or "auto"
    raise ArgumentError(f"dtype is {dtype!r}; expected float32, bfloat16, float16 or auto")


def _present_device(device: str | torch.device | None) -> torch.device | None:
    import torch

    if device is None:
        return None
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ArgumentError(f"device is {device!r}; expected cpu, cuda, cuda:0, mps or the like") from None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted.type == "cpu" or (accelerator and accelerator.type == wanted.type):
        return wanted
    present = f"cpu or {accelerator.type}" if accelerator else "cpu"
    raise ArgumentError(f"device is {str(wanted)!r}, which torch does not find on this machine; choose {present}")


def _resolve(name: str | os.PathLike[str] | None) -> tuple[str, str]:
    """Turn what the user named into what transformers loads, and a label that is the same everywhere."""
    if name is None:
        return str(default_model.default_folder()), default_model.DEFAULT_MODEL
    given = os.fspath(name)
    path = Path(given).expanduser()
    if path.is_dir():
        check_folder(path.resolve())
        return str(path), path.resolve().name
    if given in (shipped := tuned.shipped()):
        return str(shipped[given]), given
    if path.suffix.lower() == ".gguf" and path.is_file():
        return str(gguf.converted_folder(path)), path.stem
    if path.is_file():
        raise ModelError(f"{given} is a file; expected a folder, a *.gguf file or a hub id")
    if isinstance(name, os.PathLike) or path.suffix.lower() == ".gguf" or given.startswith((".", "/", "~")):
        raise ModelError(f"{given}: no such file or folder; expected a folder, a *.gguf file or a hub id")
    return given, given


def _base(folder: str) -> str | None:
    """Return what loads the base of a tuned model.

    Raises:
        ModelError: If it was a folder or a file, and is there no more.
    """
    name: str | None = tuned.record_of(folder)["base_model"]["name"]
    if name is not None and os.path.isabs(name) and not os.path.exists(name):
        raise ModelError(f"{folder} was tuned from the model at {name}, which is there no more; put it back")
    return name


def _load_weights(source: str, label: str, dtype: str | torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config = _config(source, label, trust_remote_code)
    with explained(label):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # transformers would raise without naming a weight
        )
    model: PreTrainedModel = loaded[0]
    check_loaded(label, loaded[1])
    return model


def _config(source: str, label: str, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    with explained(label):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    check_causal(config, label)
    return config


def _load_tokenizer(source: str, label: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with explained(f"the tokenizer of {label}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    return tokenizer
