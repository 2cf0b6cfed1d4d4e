"""Models that were tuned to read in slots, as a folder: an adapter of peft, heads, and what else belongs to them.

    adapter_config.json, adapter_model.safetensors    LoRA, norms and embeddings; plain peft loads all of it
    heads/config.json, heads/model.safetensors        compression heads, see `compressors.heads`
    lococo.json                                       the base model, RoPE settings, compressor, figures

The heads are a folder of their own, because transformers takes a folder with a config.json for a whole checkpoint.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lococo.atomic import write_atomically
from lococo.errors import ArgumentError, FileFormatError, ModelError
from lococo.options import check_extra

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lococo.compressors.heads import Heads

FORMAT_VERSION = 1

RECORD = "lococo.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
HEADS = "heads"

# Where a model remembers what it was tuned to be read with: a compressor's name, or a folder of heads.
TUNED_FOR = "lococo_tuned_for"

# Models that were tuned for all, a folder each.
SHIPPED = Path(__file__).parent / "extended"

# What peft puts before the names of a model's parameters in a file.
PREFIX = "base_model.model."


def base_of(model: "PreTrainedModel", name: str | None) -> dict[str, Any]:
    """Describe a base model, before anything is tuned.

    Args:
        model: As it was loaded.
        name: What `load_model` loads it by; None for the embedded default.
    """
    from lococo.facts import ModelFacts, weights_fingerprint

    if name is not None and Path(name).expanduser().exists():
        name = str(Path(name).expanduser().resolve())
    return {"name": name, "facts": ModelFacts.of(model).to_dict(), "weights": weights_fingerprint(model)}


def save_tuned(
    folder: Path,
    model: "PreTrainedModel",
    saved_modules: list[str],
    *,
    base: dict[str, Any],
    rope: dict[str, Any],
    compressor: str | None,
    heads: "Heads | None",
    selection: str,
    training: dict[str, Any],
) -> None:
    """Write what was tuned, in the model's floating-point type; the record comes last, so a folder with it is whole.

    Args:
        folder: Made if absent.
        model: With LoRA injected by peft.
        saved_modules: Names of its modules whose weights were tuned themselves: norms and embeddings.
        base: Of `base_of`.
        rope: Of `rope_scaling.scaled_rope`.
        compressor: Name of the one it was tuned with, where there are no heads; "full" for the full cache.
        heads: Trained with it.
        selection: That the heads were trained with, if they only merge.
        training: Recipe, data and figures, for the reader.
    """
    import peft
    import safetensors.torch

    from lococo.compressors.heads import save_heads
    from lococo.default_model import DEFAULT_HUB_COPY
    from lococo.facts import ModelFacts

    folder.mkdir(parents=True, exist_ok=True)
    state = {PREFIX + name: tensor for name, tensor in peft.get_peft_model_state_dict(model).items()}
    for name in saved_modules:
        for part, parameter in model.get_submodule(name).named_parameters():
            state[f"{PREFIX}{name}.{part}"] = parameter
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = base["name"] or DEFAULT_HUB_COPY
    config.inference_mode, config.modules_to_save = True, saved_modules or None
    tied = model.get_output_embeddings()
    if tied is not None and tied.weight is model.get_input_embeddings().weight:
        name = next(name for name, module in model.named_modules() if module is tied)
        if any(model.get_submodule(saved) is model.get_input_embeddings() for saved in saved_modules):
            # peft ties the two again, and looks for the weights of both.
            config.ensure_weight_tying = True
            state[f"{PREFIX}{name}.weight"] = tied.weight
    written = {name: tensor.detach().to(model.dtype).cpu().clone() for name, tensor in state.items()}
    with tempfile.TemporaryDirectory() as aside:
        config.save_pretrained(aside)
        adapter_config = (Path(aside) / ADAPTER_CONFIG).read_bytes()
    write_atomically(folder / ADAPTER, safetensors.torch.save(written, {"format": "pt"}))
    write_atomically(folder / ADAPTER_CONFIG, adapter_config)
    if heads is not None:
        save_heads(
            heads,
            folder / HEADS,
            ModelFacts.of(model),
            selection=selection,
            training=training,
            dtype=heads_dtype(model),
        )
    _write_record(folder, {"base_model": base, "rope": rope, "compressor": compressor, "training": training})


def heads_dtype(model: "PreTrainedModel") -> "torch.dtype":
    """Return what a model's heads are written as: as exactly as the model, but half precision is float16's."""
    import torch

    from lococo.compressors.heads import WRITTEN_AS

    return torch.float32 if model.dtype == torch.float32 else WRITTEN_AS


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    record = {"format_version": FORMAT_VERSION} | record
    write_atomically(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def shipped() -> dict[str, Path]:
    """Return the folders of the tuned models that come with the package, by the names that `load_model` takes."""
    return {file.parent.name: file.parent for file in sorted(SHIPPED.glob(f"*/{RECORD}"))}


def is_tuned(folder: str | os.PathLike[str]) -> bool:
    """Tell whether this is a folder that `save_tuned` or `merge` wrote."""
    return (Path(folder) / RECORD).is_file()


def has_adapter(folder: str | os.PathLike[str]) -> bool:
    """Tell whether this is a folder that `save_tuned` wrote, and so no model without its base."""
    return is_tuned(folder) and (Path(folder) / ADAPTER_CONFIG).is_file()


def record_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a tuned folder says of itself.

    Raises:
        FileFormatError: If it is damaged or of another version.
    """
    file = Path(folder) / RECORD
    try:
        record: dict[str, Any] = json.loads(file.read_text("utf-8"))
        version = record["format_version"]
        record["base_model"], record["rope"], record["compressor"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{file} is no readable record of a tuned model: {error!r}; tune it again") from error
    if version != FORMAT_VERSION:
        raise FileFormatError(f"{file} has format version {version}, this lococo reads {FORMAT_VERSION}; update lococo")
    return record


def apply_tuned(model: "PreTrainedModel", folder: str | os.PathLike[str]) -> None:
    """Make a base model what it became by tuning: LoRA in its weights, norms, embeddings, RoPE.

    Args:
        model: As `load_model` loads the base; changed in place.
        folder: That `save_tuned` wrote.

    Raises:
        ArgumentError: If peft is not installed.
        FileFormatError: If the folder is damaged, or the model is not the one that was tuned; names both.
    """
    check_extra("train", "peft")
    import peft
    import safetensors.torch
    import torch
    from peft.tuners.lora import LoraModel
    from safetensors import SafetensorError

    from lococo.rope_scaling import apply_rope

    record = record_of(folder)
    _check_base(model, record["base_model"], folder)
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        state = safetensors.torch.load_file(Path(folder) / ADAPTER)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise FileFormatError(f"{folder} holds no readable adapter: {error}; tune the model again") from error
    # What was tuned itself is copied below, and needs no second copy of its module.
    config.modules_to_save, config.ensure_weight_tying = None, False
    tuner = LoraModel(model, config, "default")
    ours = dict(model.named_parameters(remove_duplicate=False))
    missing = {name for name in ours if ".lora_" in name}
    with torch.no_grad():
        for name, tensor in state.items():
            own = name.removeprefix(PREFIX)
            for part in ("lora_A", "lora_B"):
                own = own.replace(f".{part}.weight", f".{part}.default.weight")
            if own not in ours or ours[own].shape != tensor.shape:
                raise FileFormatError(f"{folder}/{ADAPTER} has {name}, which does not fit the model; tune it again")
            ours[own].copy_(tensor)
            missing.discard(own)
    if missing:
        raise FileFormatError(f"{folder}/{ADAPTER} lacks {min(missing)} and {len(missing) - 1} others; tune it again")
    tuner.merge_and_unload()
    apply_rope(model, record["rope"])


def _check_base(model: "PreTrainedModel", recorded: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    from lococo.facts import ModelFacts, weights_fingerprint

    facts = ModelFacts.of(model)
    facts.check(recorded["facts"], str(folder))
    if (came := weights_fingerprint(model)) != recorded["weights"]:
        raise FileFormatError(
            f"{folder} was tuned from {recorded['facts']['model']} with the weights {recorded['weights']}, but the "
            f"model {facts.model} at {recorded['name']} has the weights {came}; put the one it was tuned from there"
        )


def remember(model: "PreTrainedModel", folder: str | os.PathLike[str]) -> None:
    """Let `attach(model, "auto")` take the heads, or else the compressor, that a model was tuned with."""
    heads = Path(folder) / HEADS
    setattr(model, TUNED_FOR, str(heads) if heads.is_dir() else record_of(folder)["compressor"])


def merge(folder: Path, target: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> None:
    """Write a tuned model as an ordinary checkpoint, with its heads beside it.

    Args:
        folder: That `save_tuned` wrote.
        target: Made; complete or absent.
        dtype: Of the weights; auto is that of the base.
        trust_remote_code: Run Python code that the base brings along.

    Raises:
        ArgumentError: If the target is there already.
        ModelError: If the folder is no tuned model.
    """
    from lococo.models import load_model

    if not has_adapter(folder):
        raise ModelError(f"{folder} is no tuned model; expected a folder that `lococo extend` wrote")
    if target.exists():
        raise ArgumentError(f"{target} exists already; name another folder")
    record = record_of(folder)
    model, tokenizer = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if (folder / HEADS).is_dir():
            shutil.copytree(folder / HEADS, aside / HEADS)
        _write_record(aside, record | {"rope": {}})
        aside.chmod(0o755)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
