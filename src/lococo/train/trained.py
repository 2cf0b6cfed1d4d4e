"""What a training changes: parameters in groups with rates of their own, and what a checkpoint keeps of them."""

import json
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import safetensors
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lococo.attachment import slot_layer_indices
from lococo.compressors.heads import KINDS, Heads
from lococo.compressors.learned import LearnedHeads
from lococo.compressors.nets import HeadSettings
from lococo.compressors.paper import PaperHeads
from lococo.errors import ArgumentError, FileFormatError
from lococo.facts import ModelFacts
from lococo.norms import norm_names
from lococo.train.recipe import Recipe

# Before the names of a model's own parameters; those of heads stand alone.
OF_MODEL = "model:"

# Where a parameter keeps the handle of the hook that moves its gradient.
HOOK = "lococo_gradient_hook"


@dataclass(frozen=True)
class Group:
    """Parameters that are trained at the same rate.

    Attributes:
        parameters: By name; see `OF_MODEL`.
        rate: Learning rate at its highest.
        weight_decay: Of AdamW.
    """

    parameters: dict[str, nn.Parameter]
    rate: float
    weight_decay: float = 0.0


class Trained:
    """Heads, parameters of the model, and their optimiser.

    Weights in half precision are too coarse for small steps: of those the optimiser moves copies in float32, which are
    rounded into the model after every step.
    """

    def __init__(self, heads: Heads | None, groups: Sequence[Group]) -> None:
        """Prepare an optimiser; nothing moves yet.

        Args:
            heads: Kept whole in every checkpoint; None where nothing is learned about compression.
            groups: What is trained; groups that are empty or have no rate stay as they are.

        Raises:
            ArgumentError: If nothing is left to train.
        """
        self.heads = heads
        moving = [group for group in groups if group.parameters and group.rate]
        if not moving:
            raise ArgumentError("nothing is left to train: every learning rate is 0; raise one of them")
        self.parameters = {name: p for group in moving for name, p in group.parameters.items()}
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [self.masters[name] for name in group.parameters],
                    "lr": group.rate,
                    "peak": group.rate,
                    "weight_decay": group.weight_decay,
                }
                for group in moving
            ],
            betas=(0.9, 0.98),
        )
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            if (master := self.masters[name]) is not parameter:
                if (former := getattr(parameter, HOOK, None)) is not None:
                    former.remove()  # of another training, which would take the gradient away
                hook = partial(_move_gradient, weakref.ref(master))
                setattr(parameter, HOOK, parameter.register_post_accumulate_grad_hook(hook))

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the optimiser will use, zeros where there is none."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [cast(Tensor, master.grad) for master in self.masters.values()]

    def step(self, share: float) -> None:
        """Move everything by one step, at a share of each group's highest rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.step()
        self.forget()
        self._round()

    def forget(self) -> None:
        """Drop the gradients."""
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return heads, the model's parameters that are trained, and Adam's moments, by name."""
        tensors = {} if self.heads is None else {f"heads.{n}": t for n, t in self.heads.state_dict().items()}
        tensors |= {f"tuned.{name}": master for name, master in self.masters.items() if name.startswith(OF_MODEL)}
        for name, master in self.masters.items():
            moments = self.optimizer.state.get(master, {})
            tensors |= {f"adam.{name}.{key}": torch.as_tensor(value) for key, value in moments.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        if self.heads is not None:
            of_heads = {n.removeprefix("heads."): t for n, t in tensors.items() if n.startswith("heads.")}
            self.heads.load_state_dict(of_heads)
        for name, master in self.masters.items():
            if name.startswith(OF_MODEL):
                master.copy_(tensors[f"tuned.{name}"])
            prefix = f"adam.{name}."
            moments = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if moments:
                # Adam counts its steps on the CPU.
                moved = {key: value if key == "step" else value.to(master) for key, value in moments.items()}
                self.optimizer.state[master] = moved
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def _move_gradient(reference: weakref.ref[nn.Parameter], parameter: Tensor) -> None:
    """Add a gradient to that of the optimiser's copy: sums over many chunks would be rounded in half precision."""
    master, gradient = reference(), parameter.grad
    if master is None or gradient is None:  # the training is over
        return
    master.grad = gradient.to(master.dtype) if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())


@torch.no_grad()
def round_to(dtype: torch.dtype, parameters: Iterable[nn.Parameter]) -> None:
    """Round to what will be written, so that what is measured is what is loaded later."""
    for parameter in parameters:
        parameter.copy_(parameter.to(dtype))


def of_heads_alone(heads: Heads, *, rate: float, norms_rate: float) -> list[Group]:
    """Return the groups of heads: their changes of norms, and the rest but for scores, which are fitted apart."""
    named = {name: p for name, p in heads.named_parameters() if not name.startswith("scorers.")}
    norms = {name: p for name, p in named.items() if name.startswith("norms.")}
    others = {name: p for name, p in named.items() if name not in norms}
    return [Group(norms, norms_rate), Group(others, rate)]


def new_heads(model: PreTrainedModel, recipe: Recipe, budgets: dict[int, list[float]] | None = None) -> Heads:
    """Make untrained heads for a model; they compress as "mass-merge" does, the paper's as "chunk-mass"."""
    facts = ModelFacts.of(model)
    layers = slot_layer_indices(model)
    decoder = cast(PreTrainedModel, model.get_decoder())
    torch.manual_seed(recipe.seed)
    if recipe.heads == PaperHeads.kind:
        return PaperHeads(
            dict.fromkeys(layers, recipe.num_slots[0]),
            facts.head_dim,
            kernel_size=recipe.kernel_size,
            heavy_share=recipe.heavy_share,
            mix=recipe.mix,
            unrotated=recipe.unrotated,
        )
    return LearnedHeads(
        HeadSettings(
            layers=layers,
            num_key_value_heads=facts.num_key_value_heads,
            head_dim=facts.head_dim,
            width=recipe.width,
            kernel_size=recipe.kernel_size,
            depth=recipe.depth,
            learned_scores=recipe.learned_scores,
            learned_merge=recipe.learned_merge,
            max_log_mass=recipe.max_log_mass,
            norms=norm_names(decoder) if recipe.train_norms else (),
            hidden_size=decoder.config.get_text_config(decoder=True).hidden_size,
            budgets=budgets or {},
        )
    )


def heads_in(file: Path) -> Heads:
    """Make heads of the settings that a checkpoint keeps; `Training.load` fills them.

    Raises:
        FileFormatError: If the file is damaged.
    """
    header, _ = read_checkpoint(file)
    try:
        return KINDS[header["kind"]].of_settings(json.loads(header["heads"]))
    except (TypeError, ValueError, KeyError) as error:
        raise FileFormatError(f"{file} holds heads of another lococo ({error}); delete it to start again") from error


def read_checkpoint(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the header and the tensors of a checkpoint.

    Raises:
        FileFormatError: If the file is damaged.
    """
    try:
        with safetensors.safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header["step"], header["notes"], header["made_with"]
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise FileFormatError(f"{file} is not a readable checkpoint: {error!r}; delete it to start again") from error
    return header, tensors
