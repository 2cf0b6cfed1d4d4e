"""What a file that belongs to a model records about it, and the comparison when the file comes back."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from lococo.errors import FileFormatError, UnsupportedModelError


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a model's key/value cache.

    Attributes:
        model: Name of the model.
        architecture: transformers' name of its kind.
        num_hidden_layers: Decoder layers.
        num_key_value_heads: Key/value heads of a layer.
        head_dim: Size of a key.
        vocab_size: Tokens the model knows.
        rope: Its RoPE settings, {} for a model without.
    """

    model: str
    architecture: str
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope: dict[str, Any]

    @staticmethod
    def of(model: PreTrainedModel) -> "ModelFacts":
        """Read them off a model's config.

        Raises:
            UnsupportedModelError: If the config names no attention heads, as those of Mamba models.
        """
        from lococo.models import model_id

        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", None)
        if not heads:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no attention heads, so no key/value cache that slots could replace; "
                "use a decoder model with attention"
            )
        return ModelFacts(
            model=model_id(model),
            architecture=config.model_type,
            num_hidden_layers=config.num_hidden_layers,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            rope=dict(getattr(config, "rope_parameters", None) or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return them as JSON takes them."""
        return asdict(self)

    def check(self, recorded: dict[str, Any], what: str) -> None:
        """Compare with what a file recorded.

        Args:
            recorded: The `to_dict()` of the model the file was made for.
            what: The file, for the message.

        Raises:
            FileFormatError: If they differ; names both sides. The same model under another name is let through.
        """
        if not isinstance(recorded, dict):
            raise FileFormatError(f"{what} is damaged: it does not say which model it was made for; make it again")
        mine = self.to_dict()
        differing = [key for key in mine if key != "model" and recorded.get(key) != mine[key]]
        if differing:
            theirs = ", ".join(f"{key} {recorded.get(key)}" for key in differing)
            ours = ", ".join(f"{key} {mine[key]}" for key in differing)
            raise FileFormatError(
                f"{what} was made for {recorded.get('model', 'another model')} ({theirs}), "
                f"but the model here is {self.model} ({ours}); load it with the model it was made for"
            )


# Values that are looked at in every weight.
SAMPLED_VALUES = 8


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a short hash of a few values of every weight, "" for a model without any (meta device).

    Values are rounded to bfloat16 first, so that a model has the same fingerprint in float32 and in bfloat16. Quantised
    weights count as they are stored, also those that are buffers or tensors of another kind.
    """
    digest = hashlib.sha256()
    for name, weight in sorted([*model.named_parameters(), *_stored_buffers(model)], key=lambda each: each[0]):
        for part in _plain_parts(weight.detach()):
            if part.is_meta:
                return ""
            sample = part.flatten()[:: max(1, part.numel() // SAMPLED_VALUES)]
            digest.update(name.encode() + sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored_buffers(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Return the buffers that are saved with a model: packed weights and their scales, but no table of angles."""
    stored = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the ordinary tensors that a tensor is made of: itself, or what a subclass (of torchao) wraps."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))
