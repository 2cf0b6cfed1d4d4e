"""How heads are trained: every field is a flag of `lococo train` and a line of a recipe in YAML."""

from dataclasses import dataclass
from typing import Literal, get_args

from lococo.errors import ArgumentError
from lococo.options import check_kinds

Heads = Literal["lococo", "lococo-paper"]
Objective = Literal["distillation", "next-token", "attention"]

# Documents of a data set of the hub that a training takes at most by default, and that an evaluation leaves out.
TRAINING_DOCUMENTS = 10_000


@dataclass(frozen=True)
class Recipe:
    """How heads are trained.

    Attributes:
        heads: lococo, or lococo-paper: the convolutions of the paper, for one number of slots.
        objective: distillation: the full cache's predictions; next-token: the text itself, as the paper trains;
            attention: what every layer's attention puts out, each layer alone, norms left out.
        num_slots: Mean slots per layer, one or more, which take turns.
        chunk_size: Tokens per forward pass.
        length: Tokens of a window.
        steps: Optimiser steps.
        accumulate: Windows per step, over all processes.
        learning_rate: Of the heads, at its highest.
        norms_learning_rate: Of the norms' changes.
        width: Channels of the convolutions.
        kernel_size: Entries that a convolution sees, odd.
        depth: Convolutions one after the other.
        mix: Start of the paper's n, the share of the mixture in a slot that is one; 0 is eviction.
        heavy_share: Share of the slots that the paper's heads keep as they are.
        unrotated: Let the paper's heads mix keys before RoPE, not after it.
        warm_up: Steps over which the learning rates rise; afterwards they fall to 0.
        learned_scores: Let the heads keep what may be asked for later, fitted after the last step.
        score_windows: Windows that scores are fitted to.
        score_epochs: Times that they are fitted to each.
        recall_weight: What the answers to questions about a text count beside look-ahead mass.
        learned_merge: Let the heads correct weights and masses of the merge.
        max_log_mass: Most that a slot may add to its attention logit, in nats; 0: nothing.
        train_norms: Let the model's norms change by a little while it reads slots.
        calibrate_at: Numbers of slots at which the layers' shares are measured before training; none: uniform.
        compare_every: Predictions of every so many tokens are compared.
        compressions: How many compressions back the gradient reaches; 0: all of the window.
        seed: Of the weights' start and of the windows.
    """

    heads: Heads = "lococo"
    objective: Objective = "distillation"
    num_slots: tuple[int, ...] = (64, 128, 64, 256, 64, 512)
    chunk_size: int = 256
    length: int = 2048
    steps: int = 200
    accumulate: int = 1
    learning_rate: float = 2e-3
    norms_learning_rate: float = 1e-3
    warm_up: int = 5
    width: int = 16
    kernel_size: int = 5
    depth: int = 1
    mix: float = 0.0
    heavy_share: float = 0.5
    unrotated: bool = False
    learned_scores: bool = True
    score_windows: int = 24
    score_epochs: int = 8
    recall_weight: float = 1.0
    learned_merge: bool = True
    max_log_mass: float = 3.0
    train_norms: bool = True
    calibrate_at: tuple[int, ...] = (64,)
    compare_every: int = 2
    compressions: int = 0
    seed: int = 0

    @property
    def stretches(self) -> int:
        """A step is taken after whole windows: heads learn from the windows that they are compared in."""
        return 1

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "num_slots", tuple(self.num_slots))
        object.__setattr__(self, "calibrate_at", tuple(self.calibrate_at))
        for name, kind in (("heads", Heads), ("objective", Objective)):
            if getattr(self, name) not in get_args(kind):
                raise ArgumentError(
                    f"expected {name} to be one of {', '.join(get_args(kind))}, got {getattr(self, name)}"
                )
        for name in ("num_slots", "calibrate_at", "chunk_size", "steps", "accumulate", "width", "kernel_size", "depth"):
            values = getattr(self, name)
            if any(value < 1 for value in (values if isinstance(values, tuple) else (values,))):
                raise ArgumentError(f"expected {name} to be at least 1, got {values}")
        for name in ("score_windows", "score_epochs", "compare_every"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "norms_learning_rate",
            "warm_up",
            "compressions",
            "recall_weight",
            "max_log_mass",
        ):
            if getattr(self, name) < 0:
                raise ArgumentError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ArgumentError(f"expected seed to be a number of 64 bits, got {self.seed}")
        if not 0 <= self.heavy_share < 1:
            raise ArgumentError(f"expected heavy_share to be from 0 to less than 1, got {self.heavy_share}")
        if not self.num_slots:
            raise ArgumentError("expected at least one number in num_slots")
        most = max(*self.num_slots, *self.calibrate_at, 0)
        if most + 2 * self.chunk_size > self.length:
            raise ArgumentError(
                f"windows of {self.length} tokens hold no two chunks of {self.chunk_size} beyond {most} slots; "
                f"raise length to {most + 2 * self.chunk_size} or more"
            )
        if self.kernel_size % 2 == 0:
            raise ArgumentError(f"expected an odd kernel_size, got {self.kernel_size}")
        norms_learn = self.train_norms and self.objective != "attention"
        if self.heads == "lococo" and not self.learned_merge and not norms_learn:
            raise ArgumentError("nothing is left to train but scores; switch on learned_merge or train_norms")
        if self.heads == "lococo-paper" and (len(set(self.num_slots)) > 1 or self.calibrate_at or self.learned_scores):
            raise ArgumentError(
                "the paper's heads are made for one number of slots, the same in every layer, and have no scores; "
                "expected one number in num_slots, none in calibrate_at and learned_scores off"
            )
