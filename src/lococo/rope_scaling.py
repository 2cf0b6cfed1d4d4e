"""Scale a model's RoPE, so that positions beyond its window turn keys no further than positions inside did."""

from typing import Any, Literal

from transformers import PreTrainedModel

from lococo.errors import ArgumentError, UnsupportedModelError

Scaling = Literal["none", "linear", "yarn"]


def scaled_rope(model: PreTrainedModel, scaling: Scaling, length: int) -> dict[str, Any]:
    """Return the RoPE settings for texts of `length` tokens, as `apply_rope` takes them; {} for "none".

    Args:
        model: Its settings are left as they are.
        scaling: linear divides positions by length / window (position interpolation, arXiv 2306.15595); yarn leaves
            fast dimensions alone and scales slow ones (arXiv 2309.00071).
        length: Tokens.

    Raises:
        ArgumentError: If the window is as long already.
        UnsupportedModelError: If the model has no RoPE, or one that is scaled already.
    """
    if scaling == "none":
        return {}
    config, kind = model.config.get_text_config(decoder=True), type(model).__name__
    rope = dict(getattr(config, "rope_parameters", None) or {})
    window = getattr(config, "max_position_embeddings", None)
    if not rope or window is None or not hasattr(model.get_decoder(), "rotary_emb"):
        raise UnsupportedModelError(f"{kind} has no RoPE that could be scaled; expected one, use rope 'none'")
    if (came := rope.get("rope_type", "another one per type of layer")) != "default":
        raise UnsupportedModelError(
            f"the RoPE of {kind} is of type {came}, and only an unscaled one ('default') can be scaled; use rope 'none'"
        )
    if length <= window:
        raise ArgumentError(
            f"windows of {length} tokens fit the model's {window}, so RoPE needs no scaling; "
            "raise length, or use rope 'none'"
        )
    rope |= {"rope_type": scaling, "factor": length / window}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = window
    return {"rope_parameters": rope, "max_position_embeddings": length}


def apply_rope(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Give a model RoPE settings, as if it had been loaded with them.

    Args:
        model: Not attached; changed in place.
        settings: Of `scaled_rope`.
    """
    if not settings:
        return
    config, decoder = model.config.get_text_config(decoder=True), model.get_decoder()
    for name, value in settings.items():
        setattr(config, name, value)
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(model.device)
