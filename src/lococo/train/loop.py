"""The training loop, whatever is trained, with checkpoints from which it goes on as if never stopped."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from lococo.atomic import write_atomically
from lococo.compressors import of_heads
from lococo.compressors.heads import Heads
from lococo.errors import ArgumentError, FileFormatError, TrainingError
from lococo.facts import weights_fingerprint
from lococo.train.data import Corpus
from lococo.train.lessons import HeadLessons, Lesson, Lessons
from lococo.train.recipe import Recipe
from lococo.train.trained import Trained, of_heads_alone, read_checkpoint

Row = dict[str, Any]


class Schedule(Protocol):
    """What the loop reads off a recipe; see `Recipe`."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        ...

    @property
    def accumulate(self) -> int:
        """Windows per step, over all processes."""
        ...

    @property
    def stretches(self) -> int:
        """Parts of a window, after each of which a step is taken."""
        ...

    @property
    def warm_up(self) -> int:
        """Steps over which the learning rates rise."""
        ...

    @property
    def seed(self) -> int:
        """Of the windows."""
        ...


class Training:
    """What is trained, what it learns from, and the number of the next step."""

    def __init__(self, lessons: Lessons, trained: Trained, schedule: Schedule, made_with: Row) -> None:
        """Prepare a training; nothing runs yet.

        Args:
            lessons: What is learned from.
            trained: What is trained.
            schedule: How long, and how many windows a step has.
            made_with: What a checkpoint must have been made with for this training to go on from it.

        Raises:
            ArgumentError: If the windows of a step cannot be shared by the processes, or not read in stretches.
        """
        self.accelerator = Accelerator()
        if schedule.accumulate % (processes := self.accelerator.num_processes):
            raise ArgumentError(
                f"{schedule.accumulate} windows per step cannot be shared by {processes} processes; "
                "set accumulate to a multiple of them"
            )
        if schedule.stretches > 1 and schedule.accumulate > processes:
            raise ArgumentError(
                f"windows read in {schedule.stretches} stretches cannot take turns, got accumulate "
                f"{schedule.accumulate} for {processes} process{'es' * (processes > 1)}; raise batch instead"
            )
        self.lessons, self.trained, self.schedule = lessons, trained, schedule
        self.device = lessons.model.device
        self.step = 0
        # What is kept with every checkpoint and told with the results.
        self.notes: dict[str, Any] = {"seconds": 0.0, "tokens": 0}
        self._made_with = json.dumps(made_with, sort_keys=True)

    def run(self, after_step: Callable[[Row], None]) -> None:
        """Train until all steps are done.

        Args:
            after_step: Called with the step's figures: step, num_slots, tokens, tokens_per_second, and loss (nats
                per token; of the objective "attention" a share of the output's energy).

        Raises:
            TrainingError: If the loss or a gradient is not finite; all is as it was before the step. If processes do
                not stand at the same step of the same training.
        """
        self.check_agreement()
        while self.step < self.schedule.steps:
            start = time.perf_counter()
            for row in self._steps():
                self.step += 1
                seconds = time.perf_counter() - start
                self.notes["seconds"] += seconds
                self.notes["tokens"] += row["tokens"]
                after_step({**row, "step": self.step, "tokens_per_second": row["tokens"] / seconds})
                start = time.perf_counter()

    def run_saving(
        self, file: Path, held_out: Lessons, windows: int, *, save_every: int, after_step: Callable[[Row], None]
    ) -> None:
        """Train until all steps are done, with a checkpoint and a look at text that was kept apart along the way.

        Args:
            file: Of the checkpoint.
            held_out: Text that was kept apart.
            windows: Of it that are measured, at the smallest number of slots; 0: none.
            save_every: Steps between checkpoints; there are none within a window.
            after_step: See `run`; every `save_every` steps and at the last with held_out, the loss on that text.

        Raises:
            TrainingError: See `run`.
        """
        fewest = min(self.lessons.turns)
        save_every = math.ceil(save_every / self.schedule.stretches) * self.schedule.stretches

        def kept(row: Row) -> None:
            if row["step"] % save_every == 0 or row["step"] == self.schedule.steps:
                if windows:
                    row["held_out"] = self.evaluate(held_out, windows, [fewest])[str(fewest)]
                    if not math.isfinite(row["held_out"]):
                        raise TrainingError(
                            f"after step {row['step']} the loss on held-out text is not finite; the last checkpoint is "
                            "from before: go on from it with lower learning rates"
                        )
                self.save(file)
            after_step(row)

        self.run(kept)

    @torch.no_grad()
    def evaluate(self, lessons: Lessons, windows: int, num_slots: Iterable[int] = ()) -> dict[str, float]:
        """Return the loss on so many windows, by number of slots: those that are trained at, or these."""
        return {
            str(slots): math.fsum(self._window(lessons, -1, number, slots)[0] / windows for number in range(windows))
            for slots in sorted(set(num_slots or lessons.turns))
        }

    def check_agreement(self) -> None:
        """Refuse processes that do not stand at the same step of the same training.

        Raises:
            TrainingError: If they do not.
        """
        stands = gather_object([(self.step, self._made_with)])
        if len({made_with for _, made_with in stands}) > 1:
            raise TrainingError("processes were started with different recipes, models or texts; use the same for all")
        if len(steps := {step for step, _ in stands}) > 1:
            raise TrainingError(
                f"processes go on after different steps ({', '.join(map(str, sorted(steps)))}); put the output folder "
                "where all of them see it"
            )

    def _steps(self) -> Iterator[Row]:
        """Take the next step, or those of a window that is read in stretches."""
        num_slots = self.lessons.turns[self.step % len(self.lessons.turns)]
        for mean, count in self._readings(num_slots):
            exact = torch.float32 if self.device.type == "mps" else torch.float64  # which Apple's GPUs lack
            both = torch.tensor([mean, count], dtype=exact, device=self.device)
            loss, tokens = self.accelerator.reduce(both, "sum")
            self._update(loss)
            yield {"num_slots": num_slots, "loss": loss.item(), "tokens": int(tokens)}

    def _readings(self, num_slots: int) -> Iterator[tuple[float, float]]:
        """Read this process's windows; whenever a step is due, yield the share of its loss and its tokens."""
        schedule, processes = self.schedule, self.accelerator.num_processes
        first = self.step // schedule.stretches * schedule.accumulate
        windows = range(first + self.accelerator.process_index, first + schedule.accumulate, processes)
        loss, tokens = 0.0, 0.0
        for window in windows[:-1]:
            mean, count = self._window(self.lessons, schedule.seed, window, num_slots)
            loss, tokens = loss + mean / schedule.accumulate, tokens + count
        with self.lessons.lesson(schedule.seed, windows[-1], num_slots) as lesson:
            left = lesson.counted
            for parts in range(schedule.stretches, 0, -1):
                mean, counted = self._through(lesson, 1 / schedule.stretches, left / parts)
                loss, tokens = loss + mean / schedule.accumulate, tokens + lesson.tokens / schedule.stretches
                left -= counted
                if parts > 1:
                    yield loss, tokens
                    loss, tokens = 0.0, 0.0
        yield loss, tokens  # when the model is free for a look at other text

    def _window(self, lessons: Lessons, seed: int, number: int, num_slots: int) -> tuple[float, int]:
        """Read a window, add its gradient unless gradients are switched off; return its loss per token, and tokens."""
        with lessons.lesson(seed, number, num_slots) as lesson:
            return self._through(lesson)[0], lesson.tokens

    def _through(self, lesson: Lesson, share: float = 1.0, most: float = math.inf) -> tuple[float, int]:
        """Read on in a window, and send the gradients of its chunks back.

        Args:
            lesson: What is read.
            share: Of the predictions that count, for which the loss is an average.
            most: Predictions that count after which to stop.

        Returns:
            The loss per token, and how many predictions counted.
        """
        expected = lesson.counted * share
        weight = lesson.weight / (expected * self.schedule.accumulate)
        total, counted, waiting, chunks = 0.0, 0, torch.zeros((), device=self.device), 0
        for loss, count in lesson.losses:
            total += loss.item() / expected
            waiting, chunks, counted = waiting + loss * weight, chunks + 1, counted + count
            # Chunks before the first compression may have no gradient: the first that has one reaches past them.
            if 0 < lesson.compressions <= chunks and waiting.requires_grad:
                waiting.backward()
                lesson.cut()
                waiting, chunks = torch.zeros_like(waiting), 0
            if counted >= most:
                break
        if waiting.requires_grad:
            waiting.backward()
            lesson.cut()
        return total, counted

    def _update(self, loss: Tensor) -> None:
        gradients = self.trained.gradients()
        for gradient in gradients:
            # Each process has divided by the number of windows already.
            gradient.copy_(self.accelerator.reduce(gradient, "sum"))
        norm = nn.utils.clip_grad_norm_(self.trained.masters.values(), 1.0)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self.trained.forget()
            raise TrainingError(
                f"the loss of step {self.step + 1} is not finite ({loss.item()}); the last checkpoint is from before: "
                "go on from it with lower learning rates"
            )
        rise, fall = (self.step + 1) / max(1, self.schedule.warm_up), 1 - self.step / self.schedule.steps
        self.trained.step(min(1.0, rise) * fall)

    def save(self, file: Path) -> None:
        """Write a checkpoint, complete or not at all."""
        header = {"step": str(self.step), "notes": json.dumps(self.notes), "made_with": self._made_with}
        if (heads := self.trained.heads) is not None:
            header |= {"kind": heads.kind, "heads": json.dumps(heads.settings)}
        if self.accelerator.is_main_process:
            write_atomically(file, safetensors.torch.save(self.trained.state(), header))

    def load(self, file: Path) -> None:
        """Go on from a checkpoint, whose heads had the settings of these.

        Raises:
            FileFormatError: If it is damaged, or of another model or recipe.
        """
        header, tensors = read_checkpoint(file)
        if header["made_with"] != self._made_with:
            theirs, mine = json.loads(header["made_with"]), json.loads(self._made_with)
            names = [name for name in sorted(theirs | mine) if theirs.get(name) != mine.get(name)]
            said = (", ".join(f"{name} {of.get(name)}" for name in names) for of in (theirs, mine))
            raise FileFormatError(
                "{} was made with another recipe, model or text ({}) than this one ({}); use the same, or another "
                "folder".format(file, *said)
            )
        self.step, self.notes = int(header["step"]), json.loads(header["notes"])
        self.trained.load_state(tensors)


def made_with(model: PreTrainedModel, corpus: Corpus, recipe: Any) -> Row:
    """Return what a checkpoint belongs to: the model, the text, and the recipe but for its learning rates.

    A training may go on with other rates, where it ran away with these; what is trained at all must stay the same.
    """
    fields = asdict(recipe).items()
    kept = {name: value for name, value in fields if not name.endswith("learning_rate")}
    kept |= {f"{name} above 0": value > 0 for name, value in fields if name not in kept}
    facts = {"model": weights_fingerprint(model), "dtype": str(model.dtype)}
    return facts | {"text": corpus.fingerprint} | kept


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """Leave a model where it is if one process trains it; several share the devices out."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        cast(nn.Module, model).to(accelerator.device)
    return model


def head_training(model: PreTrainedModel, heads: Heads, corpus: Corpus, recipe: Recipe) -> Training:
    """Prepare a training of heads alone.

    Args:
        model: Not attached; its weights are frozen.
        heads: See `new_heads`.
        corpus: What to train on.
        recipe: How.
    """
    heads.to(placed(model).device)
    model.requires_grad_(False)
    groups = of_heads_alone(heads, rate=recipe.learning_rate, norms_rate=recipe.norms_learning_rate)
    lessons = HeadLessons(model, of_heads(heads, heads.kind), corpus, recipe)
    return Training(lessons, Trained(heads, groups), recipe, made_with(model, corpus, recipe))
