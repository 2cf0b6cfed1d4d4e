"""Rotate cached keys between positions, with the model's own rotary embedding.

Cached keys are stored after RoPE. RoPE is a group: moving a key from position p to p + k is rotating it by k, and
un-rotating it is rotating it by -p, so one operation serves merging, packing and looking ahead. Frequencies, scaling,
partial and interleaved layouts come from the model's own `rotary_emb` and `apply_rotary_pos_emb`; models without RoPE
get the identity.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lococo.errors import UnsupportedModelError

# Rotations by fewer whole positions come out of a table per type of layer, of cos and sin of 2 * TABLE - 1 angles.
TABLE = 4096


class Rotary:
    """Rotations of one decoder; `Rotary.of_layer` gives the one of a layer."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        """Find the decoder's rotary embedding.

        Args:
            decoder: The base model (`model.base_model`), whose modelling file also holds `apply_rotary_pos_emb`.

        Raises:
            UnsupportedModelError: If the model rotates keys in a way that cannot be undone from here.
        """
        self._embedding: nn.Module | None = getattr(decoder, "rotary_emb", None)
        self._apply = modeling_function(decoder, "apply_rotary_pos_emb")
        # Layers of one type turn alike and share what they have worked out.
        self._of_type: dict[str, LayerRotary] = {}
        self._layer_types: list[str] = list(getattr(decoder.config, "layer_types", None) or [])
        if self._embedding is None and self._apply is not None:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} rotates its keys but has no `rotary_emb` module to ask for the angles; "
                "it cannot be read in slots"
            )
        if self._embedding is not None:
            config = decoder.config
            self._check_group(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def of_layer(self, layer_idx: int) -> "LayerRotary":
        """Return the rotation of one layer (local and global layers may differ in their angles)."""
        layer_type = self._layer_types[layer_idx] if self._layer_types else ""
        if layer_type not in self._of_type:
            self._of_type[layer_type] = self._made_for(layer_type)
        return self._of_type[layer_type]

    def _made_for(self, layer_type: str) -> "LayerRotary":
        if self._embedding is None or self._apply is None:
            return LayerRotary(None, None)
        embedding = self._embedding
        # The raw forward, without transformers' decorator that rescales the model's frequencies to the largest
        # position it is shown: asking for an angle must not change the model.
        forward = inspect.unwrap(type(embedding).forward)
        extra: tuple[str, ...] = ()
        if "layer_type" in inspect.signature(forward).parameters:
            extra = (layer_type,)

        def angles(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = forward(embedding, x, positions, *extra)
            return cos, sin

        return LayerRotary(angles, self._apply, lambda: list(embedding.buffers()))

    def _check_group(self, head_dim: int) -> None:
        """Probe that rotating there and back is the identity, for every kind of layer."""
        assert self._embedding is not None
        device = next((buffer.device for buffer in self._embedding.buffers()), torch.device("cpu"))
        if device.type == "meta":
            return
        probe = torch.linspace(-1, 1, head_dim, device=device).view(1, 1, 1, head_dim)
        delta = torch.full((1, 1, 1), 7.5, device=device)
        for layer_idx in range(len(self._layer_types) or 1):
            rotary = self.of_layer(layer_idx)
            back = rotary.rotate(rotary.rotate(probe, delta), -delta)
            if not torch.allclose(back, probe, atol=1e-4):
                raise UnsupportedModelError(
                    "the model's rotary embedding is not undone by rotating back; it cannot be read in slots"
                )


@dataclass
class Known:
    """What was worked out once, and holds as long as the model's frequencies do.

    Attributes:
        frequencies: The model's; one that scales with the length puts others in their place.
        factor: What the model multiplies cos and sin by.
        table: cos and sin of whole numbers of positions, (2 * TABLE - 1, 2 * angles).
        matrices: See `LayerRotary.matrix`, by its arguments.
    """

    frequencies: list[Tensor]
    factor: float | None = None
    table: Tensor | None = None
    matrices: dict[tuple[float, int, torch.device], Tensor] = field(default_factory=dict)


class LayerRotary:
    """The rotation of one layer's keys and queries; layers that share one may ask at the same time."""

    def __init__(
        self,
        angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        apply: Callable[..., tuple[Tensor, Tensor]] | None,
        frequencies: Callable[[], list[Tensor]] = list,
    ) -> None:
        self._angles = angles
        self._apply = apply
        self._frequencies = frequencies
        self._latest = Known([])

    def rotate(self, x: Tensor, delta: Tensor) -> Tensor:
        """Rotate keys or queries by a number of positions, fractional or negative.

        Args:
            x: Keys or queries after RoPE, (b h s d).
            delta: Positions to move by, broadcastable to (b h s).

        Returns:
            The rotated tensor, (b h s d), in the dtype of `x`; `x` itself for a model without RoPE.
        """
        if self._angles is None or self._apply is None:
            return x
        b, h, s, d = x.shape
        wide = x.float().reshape(b * h, 1, s, d)
        steps = delta.to(wide)
        # Angles that all heads share are computed once.
        steps = steps.view(1, -1) if steps.shape[:2] == (1, 1) else steps.expand(b, h, -1).reshape(b * h, -1)
        known = self._known()
        cos, sin = self._looked_up(known, wide, steps) or self._computed(known, wide, steps)
        _, rotated = self._apply(wide[:, :0], wide, cos, sin)
        return rotated.view(b, h, s, d).to(x.dtype)

    def matrix(self, delta: float, head_dim: int, device: torch.device) -> Tensor:
        """Return what rotates rows by `delta` positions when they are multiplied by it, (d d), float32."""
        matrices = self._known().matrices
        key = (delta, head_dim, device)
        if key not in matrices:
            with lasting():
                eye = torch.eye(head_dim, device=device)[None, None]
                matrices[key] = self.rotate(eye, torch.full((1, 1, 1), delta, device=device))[0, 0]
        return matrices[key]

    def _computed(self, known: Known, wide: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of what rotates by `steps`, (b s)."""
        assert self._angles is not None
        cos, sin = self._angles(wide, steps)
        if known.factor is None:
            # YaRN and longrope multiply cos and sin by a factor that the stored keys already carry; it is cos(0).
            known.factor = float(self._angles(wide, steps.new_zeros(1, 1))[0].flatten()[0])
        return (cos, sin) if known.factor == 1 else (cos / known.factor, sin / known.factor)

    def _looked_up(self, known: Known, wide: Tensor, steps: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the same for whole numbers up to TABLE on a CPU, where angles cost more than a look-up; else None."""
        if steps.device.type != "cpu" or not steps.numel():
            return None
        whole = steps.long()
        low, high = (int(end) for end in whole.aminmax())
        if max(-low, high) >= TABLE or not torch.equal(whole.to(steps), steps):
            return None
        if known.table is None:
            with lasting():
                every = torch.arange(1 - TABLE, TABLE, dtype=torch.float32)[None]
                known.table = torch.cat(self._computed(known, wide, every), -1)[0]
        angles = known.table.index_select(0, whole.flatten() + (TABLE - 1)).view(*steps.shape, -1)
        cos, sin = angles.chunk(2, -1)
        return cos, sin

    def _known(self) -> Known:
        now, known = self._frequencies(), self._latest
        if len(now) != len(known.frequencies) or any(a is not b for a, b in zip(now, known.frequencies, strict=True)):
            known = self._latest = Known(now)
        return known


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that may be used with gradients later, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def modeling_function(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """Return a function of the modelling file that defines the module's class, or None where it has none."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            return None
        function = getattr(sys.modules[cls.__module__], name, None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    return None
