"""One tuning from beginning to end: corpus, LoRA and heads, steps, checkpoints, and the folder that comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.attachment import window_of
from lococo.compressors import Compressor, selection_of
from lococo.compressors.heads import CHECKPOINT
from lococo.compressors.learned import LearnedHeads
from lococo.errors import ArgumentError, DocumentError
from lococo.train.calibration import layer_weights
from lococo.train.data import Corpus, corpus_of
from lococo.train.extension import Extension
from lococo.train.hub import PREFIX
from lococo.train.long_lessons import LongLessons
from lococo.train.loop import Training, made_with, placed
from lococo.train.packing import check_longest
from lococo.train.run import standard_library
from lococo.train.sharding import shard
from lococo.train.trained import Trained, round_to
from lococo.train.tuning import Tuning, tune
from lococo.tuned import base_of, heads_dtype, save_tuned

Row = dict[str, Any]

# Where slots are few and texts long, a layer's loss falls with about this power of its slots (docs/log.md).
LOSS_FALLS = 2 / 3

# Tokens of the texts on which that is measured, at most: with the full cache they are read once for every layer.
CALIBRATED_TOKENS = 8192

# What a checkpoint notes the layers' weights as.
WEIGHTS = "layer_weights"


def extend(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Extension,
    output: Path,
    *,
    base: str | None,
    data: Sequence[str] = (),
    documents: int = 10_000,
    save_every: int = 20,
    say: Callable[[str], None] = print,
    after_step: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Tune a model with its heads and save both; go on where an earlier run with the same recipe stopped.

    Args:
        model: Not attached; changed in place.
        tokenizer: The model's.
        recipe: How.
        output: Folder for what was tuned; the checkpoint lies in it until it is done.
        base: What `load_model` loads the model by.
        data: Folders of text and data sets of the hub, see `data.corpus_of`; none: Python's own standard library.
        documents: Taken of each data set of the hub, at most.
        save_every: Steps between checkpoints.
        say: Called with a line for people.
        after_step: Called with each step's figures, see `Training.run_saving`.

    Returns:
        What is written into the folder's record: recipe, data, tokens, seconds, layer_weights where they were measured,
        and held_out_before and held_out, the loss on text that was kept apart.
    """
    if data:
        corpus, held_out = corpus_of(data, tokenizer, documents=documents, seed=recipe.seed)
    else:
        corpus, held_out = standard_library(tokenizer)
    corpus, held_out = _long_enough(corpus, held_out, recipe)
    if recipe.shard:
        _check_domains(corpus, held_out, recipe)
    apart = corpus.fingerprint != held_out.fingerprint
    if not apart:
        say("too few long documents to keep some apart: what is called held out is what is tuned on")
    checkpoint, described = output / CHECKPOINT, base_of(model, base)
    training, tuning = tuning_of(model if recipe.shard else placed(model), corpus, recipe)
    calibrated = _calibration_length(model, tuning, recipe)
    output.mkdir(parents=True, exist_ok=True)
    apart_lessons = LongLessons(model, tuning.compressor, held_out, replace(recipe, batch=1))
    resumed = checkpoint.exists()
    if resumed:
        training.load(checkpoint)
        say(f"going on after step {training.step} of {recipe.steps}")
    training.check_agreement()  # before processes wait for each other over what only some of them do
    if calibrated is not None:
        _share_out(training, tuning, corpus, recipe, calibrated, say)
    if not resumed:
        training.notes["held_out_before"] = _measured(training, apart_lessons, recipe)
        training.save(checkpoint)
    training.run_saving(
        checkpoint, apart_lessons, recipe.held_out_windows, save_every=save_every, after_step=after_step
    )
    _round(model, tuning)
    figures = {
        # What was tuned travels: where a folder lay is nobody's business.
        "recipe": asdict(recipe) | {"compressor": Path(recipe.compressor).name},
        "data": [source if source.startswith(PREFIX) else Path(source).resolve().name for source in data],
        "held_out_was_kept_apart": apart,
        **training.notes,
        "held_out": _measured(training, apart_lessons, recipe),
    }
    if training.accelerator.is_main_process:
        save_tuned(
            output,
            model,
            tuning.modules,
            base=described,
            rope=tuning.rope,
            compressor=None if tuning.heads is not None else _name_of(tuning.compressor),
            heads=tuning.heads,
            selection=selection_of(tuning.compressor),
            training=figures,
        )
        checkpoint.unlink(missing_ok=True)
    return figures


def tuning_of(model: PreTrainedModel, corpus: Corpus, recipe: Extension) -> tuple[Training, Tuning]:
    """Prepare a tuning in the training loop.

    Args:
        model: Not attached, as it was loaded; changed in place.
        corpus: What to train on.
        recipe: How.
    """
    # Of the model before it is tuned.
    belongs_to = made_with(model, corpus, recipe)
    tuning = tune(model, recipe)
    if recipe.shard:
        device = shard(model, (p for group in tuning.groups for p in group.parameters.values()))
        if tuning.heads is not None:
            tuning.heads.to(device)
    lessons = LongLessons(model, tuning.compressor, corpus, recipe)
    return Training(lessons, Trained(tuning.heads, tuning.groups), recipe, belongs_to), tuning


def _calibration_length(model: PreTrainedModel, tuning: Tuning, recipe: Extension) -> int | None:
    """Return how long the texts are on which the layers' shares are measured; None where they are not measured."""
    if not recipe.calibration_windows or not isinstance(tuning.heads, LearnedHeads):
        return None
    # The full cache, which is compared with, knows no more positions than the window's.
    most = min(recipe.length, CALIBRATED_TOKENS, (window_of(model) or recipe.length) - recipe.chunk_size)
    if most < (least := recipe.num_slots + 2 * recipe.chunk_size):
        raise ArgumentError(
            f"calibration compares texts of up to {most} tokens with the full cache, and {recipe.num_slots} slots "
            f"and two chunks are {least}; lower num_slots or chunk_size, or set calibration_windows to 0"
        )
    return most


def _share_out(
    training: Training, tuning: Tuning, corpus: Corpus, recipe: Extension, length: int, say: Callable[[str], None]
) -> None:
    """Give the heads the layers' weights, measured now or by the run that this one goes on with."""
    heads = cast(LearnedHeads, tuning.heads)
    if WEIGHTS not in training.notes:
        say(f"measuring which layers need their share of {recipe.num_slots} slots")
        training.notes[WEIGHTS] = layer_weights(
            training.lessons.model,
            heads,
            corpus,
            num_slots=recipe.num_slots,
            chunk_size=recipe.chunk_size,
            length=length,
            windows=recipe.calibration_windows,
            batch=recipe.batch,
            power=LOSS_FALLS,
            seed=recipe.seed + 1,
            say=say,
        )
    heads.form = replace(heads.form, budgets=heads.form.budgets | {recipe.num_slots: training.notes[WEIGHTS]})


def _name_of(compressor: Compressor | str) -> str:
    return compressor if isinstance(compressor, str) else compressor.name


def _round(model: PreTrainedModel, tuning: Tuning) -> None:
    round_to(model.dtype, (parameter for name, parameter in model.named_parameters() if ".lora_" in name))
    if tuning.heads is not None:
        round_to(heads_dtype(model), tuning.heads.parameters())


def _measured(training: Training, lessons: LongLessons, recipe: Extension) -> dict[str, float]:
    if not recipe.held_out_windows:
        return {}
    # From the beginning, whatever is trained on: what a reader of whole documents will see.
    whole = replace(lessons, recipe=replace(lessons.recipe, begin="beginning"))
    return training.evaluate(whole, recipe.held_out_windows)


def _long_enough(corpus: Corpus, held_out: Corpus, recipe: Extension) -> tuple[Corpus, Corpus]:
    """Refuse documents that are all too short; where only those kept apart are long enough, use all for both."""
    if recipe.short_documents:
        return corpus, held_out
    try:
        check_longest(corpus, recipe.length)
    except DocumentError:
        whole = corpus.joined(held_out)
        check_longest(whole, recipe.length)
        return whole, whole
    return corpus, held_out


def _check_domains(corpus: Corpus, held_out: Corpus, recipe: Extension) -> None:
    """Refuse text in which some domain has no document that fills a window alone."""
    read = [(corpus, "")]
    if recipe.held_out_windows:
        read.append((held_out, ", or set held_out_windows to 0"))
    for part, remedy in read:
        for name, documents in part.domains.items():
            try:
                check_longest(Corpus({name: documents}, part.tokenizer), recipe.length)
            except DocumentError as error:
                kind = f"domain {name!r}" if name else "text"
                raise DocumentError(
                    f"shard reads windows of one document each, and {kind} has none of {recipe.length} tokens; lower "
                    f"length, or name longer documents with --data{remedy}"
                ) from error
