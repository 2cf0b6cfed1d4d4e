"""The nets of our heads: small convolutions over the temporal order of entries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lococo.compressors.mass_merge import MAX_LOG_MASS

# Numbers about an entry that the nets see besides its key and value; see `learned.facts_of`.
FACTS = 7


@dataclass(frozen=True)
class HeadSettings:
    """What makes heads of one shape.

    Attributes:
        layers: Indices of the layers that hold slots.
        num_key_value_heads: Key/value heads per layer.
        head_dim: Size of a key.
        width: Channels of the convolutions.
        kernel_size: Entries that a convolution sees, odd.
        depth: Convolutions one after the other.
        learned_scores: Raise the mass of what may be asked for later.
        learned_merge: Correct weights and masses of the merge.
        max_log_mass: Most that a slot may add to its attention logit, in nats.
        memory: How much what an entry was worth at earlier compressions counts when slots are chosen, against what it
            is worth now; from 0 to less than 1.
        norms: Names of the norms that are changed along, () for a frozen model.
        hidden_size: What those norms put out.
        budgets: Weights of the layers by number of slots, between which is interpolated; {} for uniform budgets.
    """

    layers: Sequence[int]
    num_key_value_heads: int
    head_dim: int
    width: int = 16
    kernel_size: int = 5
    depth: int = 1
    learned_scores: bool = True
    learned_merge: bool = True
    max_log_mass: float = MAX_LOG_MASS
    memory: float = 0.0
    norms: Sequence[str] = ()
    hidden_size: int = 0
    budgets: dict[int, list[float]] = field(default_factory=dict)


class Net(nn.Module):
    """One layer's net: entries to numbers per entry, zero at the start."""

    def __init__(self, settings: HeadSettings, outputs: int) -> None:
        super().__init__()
        h, d, width = settings.num_key_value_heads, settings.head_dim, settings.width
        self.content = nn.Parameter(torch.randn(h, 2 * d, width) * (2 * d) ** -0.5)
        self.facts = nn.Linear(FACTS, width)
        self.head = nn.Parameter(torch.zeros(h, 1, width))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, settings.kernel_size, padding=settings.kernel_size // 2)
            for _ in range(settings.depth)
        )
        self.out = nn.Linear(width, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, content: Tensor, facts: Tensor) -> Tensor:
        """Map directions, (b h s 2d), and facts, (b h s FACTS), to (outputs b h s)."""
        return Joined.of([self])(content, facts)[0]


@dataclass(frozen=True)
class Joined:
    """Several nets of one shape as one net, whose channels stay apart.

    Attributes:
        inward: Content and facts to channels, (h 2d+FACTS n*width).
        bias: Of those, (h 1 n*width).
        convolutions: Weight (n*width width 1 k) and bias (n*width) each.
        outward: Channels to outputs, (outputs n*width), zero between different nets.
        out_bias: Of those, (outputs).
        outputs: Of each net.
    """

    inward: Tensor
    bias: Tensor
    convolutions: list[tuple[Tensor, Tensor]]
    outward: Tensor
    out_bias: Tensor
    outputs: list[int]

    @classmethod
    def of(cls, nets: Sequence[Net]) -> "Joined":
        """Join nets; gradients flow back into them."""
        h, two_d, _ = nets[0].content.shape
        # Content comes in directions of length 1; the root makes numbers of order 1 of them.
        inward = [
            torch.cat([net.content * math.sqrt(two_d / 2), net.facts.weight.t().expand(h, -1, -1)], 1) for net in nets
        ]
        convolutions = [
            (torch.cat([each.weight for each in step])[:, :, None], torch.cat([each.bias for each in step]))
            for step in zip(*(net.convolutions for net in nets), strict=True)
        ]
        return cls(
            torch.cat(inward, -1),
            torch.cat([net.head + net.facts.bias for net in nets], -1),
            convolutions,
            torch.block_diag(*(net.out.weight for net in nets)),
            torch.cat([net.out.bias for net in nets]),
            [net.out.out_features for net in nets],
        )

    def __call__(self, content: Tensor, facts: Tensor) -> list[Tensor]:
        """Map (b h s 2d) and (b h s FACTS) to what each net says, (outputs b h s)."""
        b, h, s, _ = content.shape
        seen = torch.cat([content, facts.to(content.dtype)], -1)
        hidden = nn.functional.silu(seen @ self.inward + self.bias)
        for weight, bias in self.convolutions:
            # Two dimensions, since only they know of channels that lie side by side.
            rows = hidden.view(b * h, 1, s, -1).permute(0, 3, 1, 2)
            size = (0, weight.shape[-1] // 2)
            mixed = nn.functional.conv2d(rows, weight, bias, padding=size, groups=len(self.outputs))
            hidden = nn.functional.silu(hidden + mixed.permute(0, 2, 3, 1).view(b, h, s, -1))
        said = nn.functional.linear(hidden, self.outward, self.out_bias).permute(3, 0, 1, 2)
        return list(said.split(self.outputs))


class Joining:
    """Joins nets anew when gradients are wanted or their weights have changed, and otherwise once.

    What is written through a weight's `.data` is not noticed; write to the weight itself, under `torch.no_grad()`.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Net, ...], tuple[list[tuple[int, int]], Joined]] = {}

    def __call__(self, nets: Sequence[Net]) -> Joined:
        """Return the nets as one."""
        weights = [weight for net in nets for weight in net.parameters()]
        wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if wanted or any(weight.is_inference() for weight in weights):  # which do not say when they change
            return Joined.of(nets)
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        known = self._made.get(tuple(nets))
        if known is None or known[0] != state:
            known = self._made[tuple(nets)] = (state, Joined.of(nets))
        return known[1]
