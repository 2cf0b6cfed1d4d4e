"""Rotate cached keys between positions, with the model's own rotary embedding.

Cached keys are stored after RoPE. RoPE is a group: moving a key from position p to p + k is rotating it by k, and
un-rotating it is rotating it by -p, so one operation serves merging, packing and looking ahead. Frequencies, scaling,
partial and interleaved layouts come from the model's own `rotary_emb` and `apply_rotary_pos_emb`; which dimensions of
which layers turn is seen by a probe. Models and layers without RoPE get the identity.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lococo.errors import UnsupportedModelError
from lococo.probe import STEP, Probe, modeling_function, probed

# Rotations by fewer whole positions come out of a table per type of layer, of cos and sin of 2 * TABLE - 1 angles.
TABLE = 4096

# First dimension of a key that turns, and the first behind it that does not.
Dims = tuple[int, int]
NOWHERE: Dims = (0, 0)

# A rotation explains how a key moved if it misses less than this share of it; a key that moves by less than that share
# of its length stays where it is.
SAME, ROUNDING = 0.5, 0.1

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rotary:
    """Rotations of one decoder; `Rotary.of_layer` gives the one of a layer."""

    def __init__(self, decoder: PreTrainedModel, probe: Probe | None = None) -> None:
        """Find the decoder's rotary embedding, and by a probe what each layer turns with it.

        Args:
            decoder: The base model (`model.get_decoder()`), whose modelling file also holds `apply_rotary_pos_emb`.
            probe: Of that decoder; None makes one.

        Raises:
            UnsupportedModelError: If the model rotates keys in a way that cannot be undone from here.
        """
        self._embedding: nn.Module | None = getattr(decoder, "rotary_emb", None)
        self._apply = _turning(decoder)
        # Layers that turn alike share what they have worked out.
        self._alike: dict[tuple[str, Dims | None], LayerRotary] = {}
        self._layer_types: list[str] = list(getattr(decoder.config, "layer_types", None) or [])
        self._kind = type(decoder).__name__
        self._dims: dict[int, Dims] = {}
        # Layers that cache latents, and beside them as "values" what turns.
        self.latent: set[int] = set()
        if self._apply is not None:
            probe = probe or probed(decoder)
            if probe is None:
                return
            for layer_idx, (keys, values) in probe.cached.items():
                if hasattr(probe.attention.get(layer_idx), "expand_kv"):
                    self.latent.add(layer_idx)
                    keys = torch.cat([keys, values], -1)
                self._dims[layer_idx] = self._turned(layer_idx, *keys[:, None])

    def of_layer(self, layer_idx: int) -> "LayerRotary":
        """Return the rotation of one layer (local and global layers may differ in their angles)."""
        alike = (self._layer_type(layer_idx), self._dims.get(layer_idx))
        if alike not in self._alike:
            self._alike[alike] = self._made_for(*alike)
        return self._alike[alike]

    def _made_for(self, layer_type: str, dims: Dims | None) -> "LayerRotary":
        if self._embedding is None or self._apply is None or dims == NOWHERE:
            return LayerRotary(None, None)
        embedding = self._embedding
        # The raw forward, without transformers' decorator that rescales the model's frequencies to the largest
        # position it is shown: asking for an angle must not change the model.
        forward = inspect.unwrap(type(embedding).forward)
        extra: tuple[str, ...] = ()
        if "layer_type" in inspect.signature(forward).parameters:
            extra = (layer_type,)

        def angles(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            turned = forward(embedding, x, positions, *extra)
            return (turned.real, turned.imag) if isinstance(turned, Tensor) else turned

        return LayerRotary(angles, self._apply, lambda: list(embedding.buffers()), dims)

    def _turned(self, layer_idx: int, here: Tensor, there: Tensor) -> Dims:
        """Return which dimensions of a layer's keys turn with the position, by a key at 0 and at STEP, (1 h 1 d).

        Raises:
            UnsupportedModelError: If the model's own rotation does not explain how the key moved.
        """
        moved = float((there - here).float().norm())
        missed = {dims: self._missed(layer_idx, dims, here, there) for dims in self._candidates(layer_idx, here)}
        best = min(missed, key=missed.__getitem__, default=NOWHERE)
        if missed and missed[best] < SAME * moved:
            return best
        if not _moves(torch.cat([here, there])):
            return NOWHERE
        if self._embedding is None:
            raise UnsupportedModelError(
                f"{self._kind} rotates its keys but has no `rotary_emb` module to ask for the angles; "
                "it cannot be read in slots"
            )
        raise UnsupportedModelError(
            f"{self._kind} rotates the keys of layer {layer_idx} otherwise than its `rotary_emb` says, so they cannot "
            "be rotated back; it cannot be read in slots"
        )

    def _candidates(self, layer_idx: int, key: Tensor) -> list[Dims]:
        """Return what may turn of a key: all of it (or what the model's function takes of it), its head or its tail."""
        if self._embedding is None:
            return []
        d = key.shape[-1]
        try:
            width = self._made_for(self._layer_type(layer_idx), None).width(key)
        except IndexError:  # a table of angles, which has none for the fractions that merged keys turn by (GPT-J)
            return []
        parts = [part for part in (width, 2 * width) if part < d]  # some models tell each angle once
        return [(0, d), *((0, part) for part in parts), *((d - part, d) for part in parts)]

    def _missed(self, layer_idx: int, dims: Dims, here: Tensor, there: Tensor) -> float:
        """Return how far a key rotated by STEP in these dimensions is from the one that the model put there."""
        rotary = self._made_for(self._layer_type(layer_idx), dims)
        try:
            steps = torch.tensor([[[float(STEP), 0.0]]], device=here.device)
            turned = rotary.rotate(torch.cat([here, here], 2).float(), steps)
        except RuntimeError:  # of shapes: the model's function takes another number of dimensions, or in another order
            return math.inf
        return float((turned - torch.cat([there, here], 2).float()).norm())

    def _layer_type(self, layer_idx: int) -> str:
        return self._layer_types[layer_idx] if self._layer_types else ""


def _moves(states: Tensor) -> bool:
    """Tell whether what a layer cached, (2 h 1 d), differs between two positions by more than rounding."""
    here, there = states.float()
    return bool((there - here).norm() > ROUNDING * here.norm())


def _turning(decoder: PreTrainedModel) -> Turn | None:
    """Return the function of a decoder's modelling file that rotates by (cos, sin), by one signature for all models."""
    for name in ("apply_rotary_pos_emb", "apply_rotary_emb"):
        function = modeling_function(decoder, name)
        if function is None:
            continue
        takes = list(inspect.signature(function).parameters)
        if "freqs_cis" in takes:
            return lambda x, cos, sin: function(x, x, torch.complex(cos, sin))[1]
        if takes[1] == "cos":
            return lambda x, cos, sin: function(x, cos, sin)
        return lambda x, cos, sin: function(x[:, :0], x, cos, sin)[1]
    return None


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
        apply: Turn | None,
        frequencies: Callable[[], list[Tensor]] = list,
        dims: Dims | None = None,
    ) -> None:
        """Join what the model says.

        Args:
            angles: Maps a tensor, for its device, and positions, (b s), to cos and sin; None for a model without RoPE.
            apply: Rotates (b h s d) by them.
            frequencies: What the angles are made of; others mean other angles.
            dims: Dimensions that turn; None: all.
        """
        self._angles = angles
        self._apply = apply
        self._frequencies = frequencies
        self._dims = dims
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
        first, end = self._dims or (0, x.shape[-1])
        if (first, end) != (0, x.shape[-1]):
            still, turns, rest = x.split([first, end - first, x.shape[-1] - end], -1)
            return torch.cat([still, self._rotate(turns, delta), rest], -1)
        return self._rotate(x, delta)

    def width(self, x: Tensor) -> int:
        """Return how many numbers the model has for cos at one position."""
        assert self._angles is not None
        return self._angles(x, torch.zeros(1, 1, device=x.device))[0].shape[-1]

    def _rotate(self, x: Tensor, delta: Tensor) -> Tensor:
        assert self._apply is not None
        b, h, s, d = x.shape
        wide = x.float().reshape(b * h, 1, s, d)
        steps = delta.to(wide)
        # Angles that all heads share are computed once.
        steps = steps.view(1, -1) if steps.shape[:2] == (1, 1) else steps.expand(b, h, -1).reshape(b * h, -1)
        known = self._known()
        cos, sin = self._looked_up(known, wide, steps) or self._computed(known, wide, steps)
        return self._apply(wide, cos, sin).reshape(b, h, s, d).to(x.dtype)

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
