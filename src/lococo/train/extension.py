"""How a model is tuned to read far beyond its window: every field is a flag of `lococo extend`, and a line in YAML."""

from dataclasses import dataclass
from typing import Literal, get_args

from lococo.errors import ArgumentError
from lococo.options import check_kinds

FULL = "full"

Rope = Literal["none", "linear", "yarn"]
Begin = Literal["random", "beginning"]


@dataclass(frozen=True)
class Extension:
    """How a model and its heads are tuned.

    Attributes:
        compressor: auto (what the model was tuned with before, or the heads that come with lococo for it, or else fresh
            ones), fresh (new heads of ours),
            lococo-paper (new ones of the paper; h2o+lococo-paper with another selection), a folder of heads, a name
            without heads such as h2o, with which the model alone is tuned, or full, which keeps every token and needs
            memory for it.
        num_slots: Mean slots per layer.
        chunk_size: Tokens per forward pass.
        length: Tokens of a window, a multiple of chunk_size.
        steps: Optimiser steps.
        batch: Windows that are read side by side, which is faster on a GPU; one whose documents end elsewhere than the
            others' is read after them.
        accumulate: Batches per step, over all processes.
        stretches: Parts of a window, after each of which a step is taken; the next goes on from the slots that it left.
        compressions: How many compressions back the gradient reaches; memory grows with it, but not with length.
            0: all of the window.
        memory: How much what an entry was worth at earlier compressions counts when the heads choose slots, against
            what it is worth now, below 1; -1: as the heads have it.
        calibration_windows: Texts of up to 8,192 tokens, within the model's own window, on which is measured before
            tuning which layers need their slots; 0: shares as the heads have them.
        heads_learning_rate: Of the heads, at its highest; it falls to 0; 0: they stay as they are.
        lora_learning_rate: Of LoRA.
        norms_learning_rate: Of the model's norms, and of the changes of norms that heads bring along.
        embeddings_learning_rate: Of the embeddings; 0: they stay as they are.
        weight_decay: Of AdamW, for LoRA and embeddings.
        warm_up: Steps over which the learning rates rise.
        lora_rank: Of LoRA's matrices.
        lora_alpha: LoRA counts alpha / rank.
        lora_targets: Last parts of the names of the layers that get LoRA.
        rope: none, positions packed into the window; linear, as the paper does, or yarn: RoPE is scaled by
            length / window.
        begin: Where in a document a window begins: at random places, or always at its beginning.
        short_documents: Fill windows with documents of any length, and go on although none is as long as a window.
        shard: Share the weights that stay as they are out among processes (FSDP), for models that one device cannot
            hold, though each process's host must; every window is one document then, so that all read the same number
            of chunks.
        held_out_windows: Windows of text kept apart on which the loss is measured, before, after and along the way.
        kernel_size: Of the paper's convolutions.
        mix: Start of the paper's n; 0 is eviction.
        seed: Of LoRA's and fresh heads' start and of the windows.
    """

    compressor: str = "auto"
    num_slots: int = 512
    chunk_size: int = 256
    length: int = 32768
    steps: int = 1000
    batch: int = 1
    accumulate: int = 1
    stretches: int = 1
    compressions: int = 1
    memory: float = -1.0
    calibration_windows: int = 0
    heads_learning_rate: float = 1e-3
    lora_learning_rate: float = 2e-4
    norms_learning_rate: float = 2e-4
    embeddings_learning_rate: float = 0.0
    weight_decay: float = 0.0
    warm_up: int = 0
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    rope: Rope = "none"
    begin: Begin = "random"
    short_documents: bool = False
    shard: bool = False
    held_out_windows: int = 2
    kernel_size: int = 21
    mix: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for name, kind in (("rope", Rope), ("begin", Begin)):
            if getattr(self, name) not in get_args(kind):
                raise ArgumentError(
                    f"expected {name} to be one of {', '.join(get_args(kind))}, got {getattr(self, name)}"
                )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ArgumentError(f"expected seed to be a number of 64 bits, got {self.seed}")
        counts = ("num_slots", "chunk_size", "length", "steps", "batch", "accumulate", "stretches")
        for name in (*counts, "lora_rank", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        rates = [name for name in vars(self) if name.endswith("learning_rate")]
        for name in (*rates, "compressions", "calibration_windows", "weight_decay", "warm_up", "held_out_windows"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        if not (0 <= self.memory < 1 or self.memory == -1):
            raise ArgumentError(f"expected memory to be from 0 to less than 1, or -1, got {self.memory}")
        if self.length % self.chunk_size:
            fits = max(1, self.length // self.chunk_size) * self.chunk_size
            raise ArgumentError(
                f"expected a length that is a multiple of the chunk_size of {self.chunk_size}, got {self.length}; "
                f"use {fits} or {fits + self.chunk_size}"
            )
        least = self.num_slots + 2 * self.chunk_size
        if self.compressor != FULL and self.length < least:
            raise ArgumentError(
                f"windows of {self.length} tokens hold no two chunks of {self.chunk_size} beyond {self.num_slots} "
                f"slots; raise length to {-(-least // self.chunk_size) * self.chunk_size} or more"
            )
        if self.steps % self.stretches:
            raise ArgumentError(
                f"expected steps that are a multiple of the {self.stretches} stretches of a window, got {self.steps}"
            )
        if self.stretches > 1 and (self.compressor == FULL or not self.compressions):
            raise ArgumentError(
                f"windows whose gradient is whole are read in one stretch, got {self.stretches}; set stretches to 1, "
                "and raise accumulate for full"
            )
        if self.shard and (self.short_documents or self.calibration_windows):
            raise ArgumentError(
                "shard reads windows of one document each and cannot hold weights in float32 to measure layers, got "
                f"short_documents {self.short_documents} and calibration_windows {self.calibration_windows}; leave "
                "both out, and name a folder of heads that were measured before as compressor"
            )
        if not self.lora_targets:
            raise ArgumentError("expected at least one name in lora_targets; to leave LoRA out, set its rate to 0")
