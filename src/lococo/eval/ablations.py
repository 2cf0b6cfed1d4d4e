"""Ablations: one part of the heads or their training changed at a time, trained, and measured on the same text.

A table in YAML names the common recipe, where the heads are measured, and per row what differs. Trainings that rows
share run once. What is done is found again after an interruption: what rows share in the output folder, and rows in the
file of results alone, which can be taken to another machine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo import compressors
from lococo.attachment import attach, slot_layer_indices, window_of
from lococo.budgets import BUDGETS
from lococo.compressors.heads import read_config
from lococo.compressors.learned import LearnedHeads
from lococo.corpora import domains
from lococo.errors import ArgumentError, DocumentError
from lococo.eval import perplexity
from lococo.facts import ModelFacts, weights_fingerprint
from lococo.options import check_kinds
from lococo.results import Results, Row, key_of
from lococo.train.recipe import Recipe
from lococo.train.run import train
from lococo.train.trained import new_heads


@dataclass(frozen=True)
class Use:
    """Where heads are measured.

    Attributes:
        num_slots: Mean slots per layer, one or more.
        chunk_size: Tokens per forward pass.
        max_length: Tokens of a window.
        max_windows: Windows per domain.
        budget: See `budgets.slots_for`.
    """

    num_slots: tuple[int, ...] = (64, 256)
    chunk_size: int = 256
    max_length: int = 2048
    max_windows: int = 3
    budget: str = "own"

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "num_slots", tuple(dict.fromkeys(self.num_slots)))
        for name in ("num_slots", "chunk_size", "max_windows"):
            values = getattr(self, name)
            if any(value < 1 for value in (values if isinstance(values, tuple) else (values,))):
                raise ArgumentError(f"expected {name} to be at least 1, got {values}")
        if not self.num_slots:
            raise ArgumentError("expected at least one number in num_slots")
        if self.max_length <= 2 * self.chunk_size:
            raise ArgumentError(
                f"windows of {self.max_length} tokens have none beyond the second chunk of {self.chunk_size}; raise "
                "max_length"
            )
        if self.budget not in BUDGETS:
            raise ArgumentError(f"unknown budget {self.budget!r}; expected one of {', '.join(BUDGETS)}")


@dataclass(frozen=True)
class Ablation:
    """One row of the table.

    Attributes:
        subject: What is varied, such as "kernel size".
        name: Its value here.
        use: Where it is measured.
        recipe: How its heads are trained; None: nothing is trained, `compressor` runs.
        compressor: Name of a compressor without heads of its own.
    """

    subject: str
    name: str
    use: Use
    recipe: Recipe | None = None
    compressor: str = ""


@dataclass
class _Parts:
    base: Row = field(default_factory=dict)
    use: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("base", "use"):
            _check_mapping(name, getattr(self, name))
        if not isinstance(self.rows, list) or not all(isinstance(row, dict) for row in self.rows):
            raise ValueError(f"rows is no list of rows but {self.rows!r}")


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds {value!r}, not names with values")


def read_table(file: Path) -> list[Ablation]:
    """Read a table of ablations.

    Raises:
        ArgumentError: If it has another shape, or a recipe that cannot be.
    """
    import yaml

    try:
        read = yaml.safe_load(file.read_text("utf-8"))
        _check_mapping("the file", read)
        parts = _Parts(**read)
        made = [_ablation(parts, dict(row)) for row in parts.rows]
    except (yaml.YAMLError, TypeError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"{file}: expected base, use and rows of ablations, each with subject and name: {error}"
        ) from error
    if not made:
        raise ArgumentError(f"{file} has no rows")
    names = [(row.subject, row.name) for row in made]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ArgumentError(
            f"{file}: two rows are called {', '.join(twice[0])}, and their figures would be averaged; rename one"
        )
    return made


def _ablation(parts: _Parts, row: Row) -> Ablation:
    subject, name = str(row.pop("subject")), str(row.pop("name"))
    compressor, changed, used = str(row.pop("compressor", "")), row.pop("recipe", {}), row.pop("use", {})
    for part, value in (("recipe", changed), ("use", used)):
        _check_mapping(f"{subject}, {name}: {part}", value)
    if unknown := set(parts.use | used) - {part.name for part in fields(Use)}:
        raise ValueError(f"{subject}, {name}: use has no {', '.join(sorted(unknown))}")
    use = Use(**{key: _tuple(value) for key, value in (parts.use | used).items()})
    if row or (compressor and changed):
        wrong = ", ".join(row) or "compressor and recipe"
        raise ValueError(f"{subject}, {name} has {wrong}; expected use, and one of recipe and compressor")
    if compressor:
        return Ablation(subject, name, use, compressor=compressor)
    if unknown := set(parts.base | changed) - {part.name for part in fields(Recipe)}:
        raise ValueError(f"{subject}, {name}: a recipe has no {', '.join(sorted(unknown))}")
    return Ablation(subject, name, use, Recipe(**{key: _tuple(value) for key, value in (parts.base | changed).items()}))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def run(
    ablations: list[Ablation],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Path,
    output: Path,
    results: Results,
    say: Callable[[str], None] = print,
) -> None:
    """Train and measure every row that is not known.

    Args:
        ablations: See `read_table`.
        model: Not attached.
        tokenizer: The model's.
        data: Text, one subfolder per domain, each with parts to train and to measure on, see `corpora.domains`.
        output: Folder for heads and for what was measured, of any number of models and corpora.
        results: Where rows of `perplexity.evaluate` go, each with subject, name, and what the heads were trained with:
            steps, seconds and tokens.
        say: Called with a line for people.
    """
    _check(ablations, model, data)
    fixed = {"model": weights_fingerprint(model), "dtype": str(model.dtype), "text": _text(data)}
    output = output.resolve() / key_of(fixed)
    output.mkdir(parents=True, exist_ok=True)
    kept = Results(output / "measured.jsonl")
    for ablation in ablations:
        key = key_of(fixed | _made_with(ablation, model))
        count = len(domains(data)) * len(ablation.use.num_slots)
        results.together(key, count, partial(_measured, ablation, model, tokenizer, data, output, kept, say))


def _text(data: Path) -> list[tuple[str, int]]:
    """Return what tells texts apart without reading them."""
    files = sorted(path for path in data.rglob("*") if path.is_file())
    return [(path.relative_to(data).as_posix(), path.stat().st_size) for path in files]


def _made_with(ablation: Ablation, model: PreTrainedModel) -> Row:
    """Return all of a row that its figures depend on; what it is called as well, since rows carry it."""
    use, how = ablation.use, {"methods": compressors.METHODS, "heads": LearnedHeads.revision}
    if ablation.recipe is not None:
        return vars(ablation) | how | {"recipe": vars(ablation.recipe), "use": vars(use)}
    # A folder of heads may hold others by the next time.
    attached = attach(model, ablation.compressor, num_slots=use.num_slots[0], chunk_size=use.chunk_size)
    return vars(ablation) | how | {"of": attached.fingerprint(), "use": vars(use)}


def _measured(
    ablation: Ablation,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    output: Path,
    kept: Results,
    say: Callable[[str], None],
) -> list[Row]:
    name = _trained(ablation, model, tokenizer, data, output, say)
    say(f"{ablation.subject}, {ablation.name}: measuring")
    measured = perplexity.evaluate(model, tokenizer, data=data, compressors=[name], results=kept, **vars(ablation.use))
    own = [row for row in measured if row["compressor"] == Path(name).name]
    return [{"subject": ablation.subject, "name": ablation.name} | row | _trained_with(name) for row in own]


def _check(ablations: list[Ablation], model: PreTrainedModel, data: Path) -> None:
    """Refuse now what would only be seen after hours of training."""
    train_files, own = domains(data, "train"), domains(data, "val")
    for domain in train_files.keys() & own.keys():
        if set(train_files[domain]) & set(own[domain]):
            raise DocumentError(
                f"domain {domain!r} of {data} would be trained and measured on the same files; split it into folders "
                "or .jsonl files named train and val"
            )
    limit = window_of(model)
    for ablation in ablations:
        longest = max(ablation.use.max_length, 0 if ablation.recipe is None else ablation.recipe.length)
        if limit is not None and longest > limit:
            raise ArgumentError(
                f"{ablation.subject}, {ablation.name}: windows of {longest} tokens leave the model's own of {limit}; "
                "lower length or max_length"
            )
        for num_slots in ablation.use.num_slots:
            _check_fit(ablation, model, num_slots)


def _check_fit(ablation: Ablation, model: PreTrainedModel, num_slots: int) -> None:
    """Refuse a row whose heads cannot be used with so many slots."""
    if ablation.recipe is None:
        attach(model, ablation.compressor, num_slots=num_slots, chunk_size=ablation.use.chunk_size)
        return
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # their shape alone
        heads = new_heads(model, ablation.recipe)
    slots = dict.fromkeys(slot_layer_indices(model), num_slots)
    if mismatch := heads.mismatch(slots, ModelFacts.of(model).head_dim):
        raise ArgumentError(
            f"{ablation.subject}, {ablation.name}: its heads would be made for {mismatch}; use them as they are trained"
        )
    least = compressors.of_heads(heads, heads.kind).min_slots()
    if min(num_slots, *ablation.recipe.num_slots) < least:
        raise ArgumentError(
            f"{ablation.subject}, {ablation.name}: its heads need at least {least} slots in a layer; raise num_slots"
        )


def _trained(
    ablation: Ablation,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    output: Path,
    say: Callable[[str], None],
) -> str:
    """Return the compressor of a row, trained if need be."""
    if ablation.recipe is None:
        return ablation.compressor
    folder = output / key_of(vars(ablation.recipe))
    if not (folder / "config.json").exists():
        say(f"{ablation.subject}, {ablation.name}: training in {folder}")
        train(model, tokenizer, ablation.recipe, folder, data=[str(data)], say=say)
    return str(folder)


def _trained_with(name: str) -> Row:
    """Return what heads cost, and their folder's own name; nothing for a compressor without heads."""
    if not Path(name).is_dir():
        return {}
    training = read_config(Path(name))["training"]
    costs = {key: training[key] for key in ("seconds", "tokens")}
    return {"compressor": Path(name).name, "steps": training["recipe"]["steps"]} | costs


def summary(rows: list[Row]) -> list[Row]:
    """Return, per subject, name, number of slots and chunk size, the mean gap over domains and its 95 % interval.

    Args:
        rows: Of `run`.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("subject", "name", "num_slots", "chunk_size")), []).append(row)
    made = []
    for (subject, name, num_slots, chunk_size), same in groups.items():
        low, high = perplexity.mean_interval(same)
        gap = sum(row["gap"] for row in same) / len(same)
        by_domain = {row["domain"]: row["gap"] for row in same}
        made.append(
            {
                "subject": subject,
                "name": name,
                "num_slots": num_slots,
                "chunk_size": chunk_size,
                "gap": gap,
                "low": low,
                "high": high,
                "by_domain": by_domain,
            }
        )
    return made
