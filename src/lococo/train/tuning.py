"""What of a model is tuned: heads, LoRA, norms, embeddings, and RoPE once for all."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lococo import compressors
from lococo.attachment import slot_layer_indices, window_of
from lococo.compressors import Compressor, Shape
from lococo.compressors.heads import Heads, shipped_heads
from lococo.compressors.learned import LearnedHeads
from lococo.compressors.paper import PaperHeads
from lococo.errors import ArgumentError
from lococo.facts import ModelFacts
from lococo.norms import norm_names
from lococo.rope_scaling import apply_rope, scaled_rope
from lococo.train.extension import FULL, Extension
from lococo.train.recipe import Recipe
from lococo.train.trained import OF_MODEL, Group, new_heads, of_heads_alone
from lococo.tuned import TUNED_FOR

AUTO, FRESH = "auto", "fresh"


@dataclass(frozen=True)
class Tuning:
    """A model that is ready to be tuned.

    Attributes:
        compressor: It is read with, or "full".
        heads: Of the compressor, if it has any.
        groups: What is trained.
        modules: Names of the model's modules whose own weights are tuned.
        rope: Settings that were applied.
    """

    compressor: Compressor | str
    heads: Heads | None
    groups: list[Group]
    modules: list[str]
    rope: dict[str, Any]


def tune(model: PreTrainedModel, recipe: Extension) -> Tuning:
    """Freeze a model, put LoRA into it, scale its RoPE, and collect what is trained.

    Args:
        model: Not attached; changed in place.
        recipe: How.

    Raises:
        ArgumentError: If the compressor is unknown, LoRA finds none of its targets, or the full cache would read at
            positions that the model does not have.
        UnsupportedModelError: If the model's RoPE cannot be scaled.
    """
    if model.dtype == torch.float16:
        raise ArgumentError("gradients of single tokens vanish in float16; tune with --dtype bfloat16 or float32")
    # Heads on disk know the RoPE that they were trained with, so they are looked for first.
    compressor = starting_compressor(model, recipe)
    rope = scaled_rope(model, recipe.rope, recipe.length)
    check_targets(model, recipe.lora_targets)
    apply_rope(model, rope)
    if compressor == FULL and recipe.stretches > 1:
        raise ArgumentError(f"the full cache is tuned in one stretch, got {recipe.stretches}; set stretches to 1")
    window = window_of(model)
    if compressor == FULL and window is not None and recipe.length > window:
        raise ArgumentError(
            f"the full cache would read windows of {recipe.length} tokens beyond the model's {window} positions; "
            "scale them with rope 'yarn' or 'linear', or lower length"
        )
    model.requires_grad_(False)
    lora = _lora(model, recipe)
    modules = _tuned_modules(model, recipe)
    own = {
        name: {f"{OF_MODEL}{name}.{part}": p for part, p in model.get_submodule(name).named_parameters()}
        for name in modules
    }
    embeddings = {key: p for name in modules if _is_embedding(model, name) for key, p in own[name].items()}
    norms = {key: p for name in modules if not _is_embedding(model, name) for key, p in own[name].items()}
    heads = None if isinstance(compressor, str) else next(iter(compressors.modules(compressor)), None)
    if recipe.memory >= 0 or recipe.calibration_windows:
        if not isinstance(heads, LearnedHeads):
            raise ArgumentError(
                f"memory and calibration_windows are for heads of lococo, got compressor {recipe.compressor!r}; leave "
                "them out"
            )
        if recipe.memory >= 0:
            heads.form = replace(heads.form, memory=recipe.memory)
    groups = [
        Group(lora, recipe.lora_learning_rate, recipe.weight_decay),
        Group(norms, recipe.norms_learning_rate),
        Group(embeddings, recipe.embeddings_learning_rate, recipe.weight_decay),
    ]
    if heads is not None:
        heads = cast(Heads, heads.to(model.device).requires_grad_(False))
        rates = {"rate": recipe.heads_learning_rate, "norms_rate": recipe.norms_learning_rate}
        groups += of_heads_alone(heads, **rates)
    return Tuning(compressor, heads, groups, modules, rope)


def starting_compressor(model: PreTrainedModel, recipe: Extension) -> Compressor | str:
    """Return the compressor that a model is tuned with, its heads as they start.

    Raises:
        ArgumentError: If its name is unknown.
        FileFormatError: If heads on disk are for another model.
    """
    facts, name = ModelFacts.of(model), recipe.compressor
    if name == AUTO:
        untuned = LearnedHeads.kind if shipped_heads(facts) is not None else FRESH
        name = getattr(model, TUNED_FOR, None) or untuned
    if name == FULL:
        return FULL
    if name == FRESH:
        made = new_heads(model, _of_new_heads(recipe, LearnedHeads.kind))
        return compressors.of_heads(made, made.kind)
    selection, _, kind = name.rpartition("+")
    if kind == PaperHeads.kind:
        compressors.make(name, _shape(model, recipe))  # a selection that is unknown is told
        made = new_heads(model, _of_new_heads(recipe, kind))
        return compressors.of_heads(made, name, *([selection] if selection else []))
    made_there = compressors.make(name, _shape(model, recipe))
    if name == compressors.FROZEN and isinstance(made_there, LearnedHeads):
        # What is saved of them must not speak of changes that were left out.
        made_there.form = replace(made_there.form, norms=())
    return made_there


def _shape(model: PreTrainedModel, recipe: Extension) -> Shape:
    facts = ModelFacts.of(model)
    return Shape(dict.fromkeys(slot_layer_indices(model), recipe.num_slots), facts.head_dim, facts)


def _of_new_heads(recipe: Extension, kind: Any) -> Recipe:
    """Return how fresh heads are shaped; the model's own norms are tuned, so heads bring no changes of theirs."""
    return Recipe(
        heads=kind,
        num_slots=(recipe.num_slots,),
        chunk_size=recipe.chunk_size,
        length=recipe.length,
        calibrate_at=(),
        learned_scores=False,
        train_norms=False,
        kernel_size=recipe.kernel_size if kind == PaperHeads.kind else Recipe.kernel_size,
        mix=recipe.mix,
        seed=recipe.seed,
    )


def check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Refuse names of layers that the model lacks.

    Raises:
        ArgumentError: Lists those that it has.
    """
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    missing = [t for t in targets if not any(name.rpartition(".")[2] == t for name in linear)]
    if missing:
        there = sorted({name.rpartition(".")[2] for name in linear})
        raise ArgumentError(
            f"{type(model).__name__} has no layers named {', '.join(missing)} for LoRA; expected lora_targets among "
            f"{', '.join(there)}"
        )


def _lora(model: PreTrainedModel, recipe: Extension) -> dict[str, nn.Parameter]:
    """Put LoRA into the model, without any effect yet, and return its parameters, in float32 whatever the model's."""
    import peft

    targets = [module for name, module in model.named_modules() if name.rpartition(".")[2] in recipe.lora_targets]
    config = peft.LoraConfig(
        r=recipe.lora_rank,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets),
        lora_alpha=recipe.lora_alpha,
        target_modules=list(recipe.lora_targets),
        lora_dropout=0.0,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    torch.manual_seed(recipe.seed)
    peft.inject_adapter_in_model(config, cast(nn.Module, model))
    model.eval()
    made = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for parameter in made.values():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.float()
    return {OF_MODEL + name: parameter for name, parameter in made.items()}


def _tuned_modules(model: PreTrainedModel, recipe: Extension) -> list[str]:
    """Return the names of norms and embeddings that have a learning rate."""
    decoder = cast(nn.Module, model.get_decoder())
    norms = {id(decoder.get_submodule(name)) for name in norm_names(cast(PreTrainedModel, decoder))}
    wanted = norms if recipe.norms_learning_rate else set()
    if recipe.embeddings_learning_rate:
        wanted = wanted | {id(model.get_input_embeddings())}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _is_embedding(model: PreTrainedModel, name: str) -> bool:
    return model.get_submodule(name) is model.get_input_embeddings()
