"""The training loop: a frozen model, heads that learn, and checkpoints from which it goes on as if never stopped."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from lococo.atomic import write_atomically
from lococo.attachment import Attachment, attach, decoder_of, slot_layer_indices
from lococo.cache import SlotCache
from lococo.compressors import of_heads
from lococo.compressors.heads import KINDS, Heads
from lococo.compressors.learned import LearnedHeads
from lococo.compressors.nets import HeadSettings
from lococo.compressors.paper import PaperHeads
from lococo.errors import ArgumentError, FileFormatError, TrainingError
from lococo.facts import ModelFacts, weights_fingerprint
from lococo.norms import norm_names
from lococo.train.data import Corpus
from lococo.train.losses import divergences, next_token_losses, teach
from lococo.train.matching import attention_errors
from lococo.train.recipe import Recipe

Row = dict[str, Any]


def new_heads(model: PreTrainedModel, recipe: Recipe, budgets: dict[int, list[float]] | None = None) -> Heads:
    """Make untrained heads for a model; they compress as "mass-merge" does, the paper's as "chunk-mass"."""
    facts = ModelFacts.of(model)
    layers = slot_layer_indices(model)
    decoder = decoder_of(model)
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
    header, _ = _read(file)
    try:
        return KINDS[header["kind"]].of_settings(json.loads(header["heads"]))
    except (TypeError, ValueError, KeyError) as error:
        raise FileFormatError(f"{file} holds heads of another lococo ({error}); delete it to start again") from error


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header["step"], header["notes"], header["made_with"], header["heads"], KINDS[header["kind"]]
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise FileFormatError(f"{file} is not a readable checkpoint: {error!r}; delete it to start again") from error
    return header, tensors


class Training:
    """Heads, optimiser and the number of the next step."""

    def __init__(self, model: PreTrainedModel, heads: Heads, corpus: Corpus, recipe: Recipe) -> None:
        """Prepare a training; nothing runs yet.

        Args:
            model: Not attached; its weights are frozen.
            heads: See `new_heads`.
            corpus: What to train on.
            recipe: How.

        Raises:
            ArgumentError: If the windows of a step cannot be shared by the processes.
        """
        self.accelerator = Accelerator()
        if recipe.accumulate % (processes := self.accelerator.num_processes):
            raise ArgumentError(
                f"{recipe.accumulate} windows per step cannot be shared by {processes} processes; "
                "set accumulate to a multiple of them"
            )
        # One process computes where the model is; several share the devices out.
        self.device = model.device if self.accelerator.num_processes == 1 else self.accelerator.device
        self.model = cast(PreTrainedModel, cast(nn.Module, model).to(self.device)).requires_grad_(False)
        self.heads = heads.to(self.device)
        self.compressor = of_heads(self.heads, heads.kind)
        self.corpus = corpus
        self.recipe = recipe
        self.step = 0
        # What is kept with every checkpoint and told with the heads.
        self.notes: dict[str, Any] = {"seconds": 0.0, "tokens": 0}
        # Scores are fitted apart, see `scores`.
        named = {name: p for name, p in heads.named_parameters() if not name.startswith("scorers.")}
        self.trained = list(named.values())
        norms = [p for name, p in named.items() if name.startswith("norms.")]
        others = [p for name, p in named.items() if not name.startswith("norms.")]
        groups = [(norms, recipe.norms_learning_rate), (others, recipe.learning_rate)]
        self.optimizer = torch.optim.Adam(
            [{"params": group, "lr": peak, "peak": peak} for group, peak in groups if group], betas=(0.9, 0.98)
        )

    def run(self, after_step: Callable[[Row], None]) -> None:
        """Train until all steps are done.

        Args:
            after_step: Called with the step's figures: step, num_slots, tokens, tokens_per_second, and loss (nats
                per token; of the objective "attention" a share of the output's energy).

        Raises:
            TrainingError: If the loss or a gradient is not finite; the heads are as they were before the step.
        """
        while self.step < self.recipe.steps:
            start = time.perf_counter()
            row = self._one_step()
            self.step += 1
            seconds = time.perf_counter() - start
            self.notes["seconds"] += seconds
            self.notes["tokens"] += row["tokens"]
            after_step({**row, "step": self.step, "tokens_per_second": row["tokens"] / seconds})

    @torch.no_grad()
    def evaluate(self, corpus: Corpus, windows: int, num_slots: Iterable[int] = ()) -> dict[str, float]:
        """Return the loss on so many windows of a corpus, by number of slots: those that are trained at, or these."""
        return {
            str(slots): math.fsum(
                self._window(self._ids(corpus, -1, number, slots), slots) / windows for number in range(windows)
            )
            for slots in sorted(set(num_slots or self.recipe.num_slots))
        }

    def _one_step(self) -> Row:
        recipe, processes = self.recipe, self.accelerator.num_processes
        num_slots = recipe.num_slots[self.step % len(recipe.num_slots)]
        loss, tokens = torch.zeros((), device=self.device), 0
        for number in range(self.accelerator.process_index, recipe.accumulate, processes):
            ids = self._ids(self.corpus, recipe.seed, self.step * recipe.accumulate + number, num_slots)
            loss += self._window(ids, num_slots) / recipe.accumulate
            tokens += ids.numel() * processes
        loss = self.accelerator.reduce(loss, "sum")
        self._share_gradients()
        self._update(loss)
        return {"num_slots": num_slots, "loss": loss.item(), "tokens": tokens}

    def _ids(self, corpus: Corpus, seed: int, number: int, num_slots: int) -> Tensor:
        least = num_slots + 2 * self.recipe.chunk_size
        ids = corpus.window(seed, number, length=self.recipe.length, least=least)
        return torch.tensor([ids], device=self.device)

    def _window(self, ids: Tensor, num_slots: int) -> float:
        """Read a window, add its gradient unless gradients are switched off, and return its loss per token."""
        recipe = self.recipe
        with self._attached(num_slots) as slots:
            # From the first compression of any layer on.
            first = min(slots.slots_per_layer) + recipe.chunk_size
            compared = torch.arange(first, ids.shape[1] - 1, recipe.compare_every, device=ids.device)
            cache = slots.new_cache()
            assert isinstance(cache, SlotCache)
            if recipe.objective == "next-token":
                losses = next_token_losses(self.model, ids, cache, compared)
            else:
                teacher = teach(slots, self.model, ids, compared)
                differ = divergences if recipe.objective == "distillation" else attention_errors
                losses = differ(self.model, ids, cache, teacher)
            return self._through(losses, cache, len(compared), num_slots)

    def _through(self, losses: Iterator[tuple[Tensor, int]], cache: SlotCache, count: int, num_slots: int) -> float:
        """Send the gradients of a window's chunks back; return its loss per token."""
        # With more slots less is lost, and it has to be seen beside what fewer slots lose.
        weight = math.sqrt(num_slots / min(self.recipe.num_slots)) / count
        total, waiting, chunks = 0.0, torch.zeros((), device=self.device), 0
        for loss, _ in losses:
            total += loss.item() / count
            waiting, chunks = waiting + loss * weight, chunks + 1
            if chunks == self.recipe.compressions and waiting.requires_grad:
                self._scaled(waiting).backward()
                cache.detach()
                waiting, chunks = torch.zeros_like(waiting), 0
        if waiting.requires_grad:
            self._scaled(waiting).backward()
        return total

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss / self.recipe.accumulate

    def _attached(self, num_slots: int) -> Attachment:
        return attach(self.model, self.compressor, num_slots=num_slots, chunk_size=self.recipe.chunk_size)

    def _share_gradients(self) -> None:
        """Add the gradients of all processes up; each has divided by the number of windows already."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, "sum")

    def _update(self, loss: Tensor) -> None:
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self.optimizer.zero_grad()
            raise TrainingError(
                f"the loss of step {self.step + 1} is not finite ({loss.item()}); the last checkpoint is from before: "
                "go on from it with lower learning rates"
            )
        rise, fall = (self.step + 1) / max(1, self.recipe.warm_up), 1 - self.step / self.recipe.steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, rise) * fall
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, file: Path) -> None:
        """Write a checkpoint, complete or not at all."""
        tensors = {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        for name, parameter in self.heads.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam.{name}.{key}": torch.as_tensor(value) for key, value in state.items()}
        header = {
            "step": str(self.step),
            "notes": json.dumps(self.notes),
            "made_with": self._made_with(),
            "kind": self.heads.kind,
        }
        header["heads"] = json.dumps(self.heads.settings)
        cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.accelerator.is_main_process:
            write_atomically(file, safetensors.torch.save(cpu, header))

    def load(self, file: Path) -> None:
        """Go on from a checkpoint, whose heads had the settings of these.

        Raises:
            FileFormatError: If it is damaged, or of another model or recipe.
        """
        header, tensors = _read(file)
        made_with = header["made_with"]
        if made_with != self._made_with():
            raise FileFormatError(
                f"{file} was made with another recipe, model or text ({made_with}) than this one "
                f"({self._made_with()}); use the same, or another folder"
            )
        self.step, self.notes = int(header["step"]), json.loads(header["notes"])
        self.heads.load_state_dict({n.removeprefix("heads."): t for n, t in tensors.items() if n.startswith("heads.")})
        for name, parameter in self.heads.named_parameters():
            prefix = f"adam.{name}."
            state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if state:
                # Adam counts its steps on the CPU.
                moved = {key: value if key == "step" else value.to(parameter) for key, value in state.items()}
                self.optimizer.state[parameter] = moved

    def _made_with(self) -> str:
        # A training may go on with other rates, where it ran away with these.
        kept = {name: value for name, value in asdict(self.recipe).items() if not name.endswith("learning_rate")}
        facts = {"model": weights_fingerprint(self.model), "dtype": str(self.model.dtype)}
        return json.dumps(facts | {"text": self.corpus.fingerprint} | kept, sort_keys=True)
