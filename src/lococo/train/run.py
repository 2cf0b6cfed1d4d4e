"""One training from beginning to end: corpus, budgets, steps, checkpoints, and the heads that come of it."""

import math
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.attachment import window_of
from lococo.compressors import of_heads
from lococo.compressors.heads import CHECKPOINT, WRITTEN_AS, save_heads
from lococo.compressors.learned import LearnedHeads
from lococo.errors import ArgumentError, DocumentError, TrainingError
from lococo.facts import ModelFacts
from lococo.train.calibration import layer_weights
from lococo.train.data import Corpus, Document, corpus_of, split
from lococo.train.hub import PREFIX
from lococo.train.lessons import HeadLessons
from lococo.train.loop import head_training, placed
from lococo.train.recall import recall_window
from lococo.train.recipe import Recipe
from lococo.train.scores import Example, collect, fit
from lococo.train.trained import heads_in, new_heads, round_to

Row = dict[str, Any]

# Windows on which the layers' shares are measured, and the groups of layers that share one.
CALIBRATION_WINDOWS = 6
CALIBRATION_GROUPS = 15

# Windows that were kept apart, on which the heads are measured before and after; one for each of a few domains.
HELD_OUT_WINDOWS = 4

# And those on which they are measured along the way.
HELD_OUT_BETWEEN = 2


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    output: Path,
    *,
    data: Sequence[str] = (),
    documents: int = 10_000,
    save_every: int = 20,
    say: Callable[[str], None] = print,
    after_step: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Train heads and save them; go on where an earlier run with the same recipe stopped.

    Args:
        model: Not attached.
        tokenizer: The model's.
        recipe: How.
        output: Folder for the heads; the checkpoint lies in it until they are done.
        data: Folders of text and data sets of the hub, see `data.corpus_of`; none: Python's own standard library.
        documents: Taken of each data set of the hub, at most.
        save_every: Steps between checkpoints.
        say: Called with a line for people.
        after_step: Called with each step's figures, see `Training.run_saving`.

    Returns:
        What is written into the heads' config: recipe, tokens, seconds, and held_out_before and held_out, the loss by
        number of slots on text that was kept apart.

    Raises:
        ArgumentError: If the recipe does not fit the model.
        DocumentError: If there is no text, or none that is long enough.
        FileFormatError: If the checkpoint is damaged or of another training.
        TrainingError: If a loss is not finite; the last good checkpoint is kept.
    """
    if data:
        corpus, held_out = corpus_of(data, tokenizer, documents=documents, seed=recipe.seed)
    else:
        corpus, held_out = standard_library(tokenizer)
    window = window_of(model)
    if window is not None and recipe.length > window:
        raise ArgumentError(
            f"windows of {recipe.length} tokens leave the model's own of {window}, beyond which the full cache teaches "
            "nothing; lower length"
        )
    corpus, held_out = _long_enough(corpus, held_out, recipe)
    apart = corpus.fingerprint != held_out.fingerprint
    if not apart:
        say("too few long documents to keep some apart: what is called held out is what is trained on")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / CHECKPOINT
    resumed = checkpoint.exists()
    if resumed:
        heads = heads_in(checkpoint)
        training = head_training(model, heads, corpus, recipe)
        training.load(checkpoint)
        say(f"going on after step {training.step} of {recipe.steps}")
    else:
        budgets = {}
        for num_slots in recipe.calibrate_at:
            say(f"measuring the layers' shares of {num_slots} slots")
            budgets[num_slots] = _weights(placed(model), corpus, recipe, num_slots, say)
        heads = new_heads(model, recipe, budgets)
        training = head_training(model, heads, corpus, recipe)
    lessons = HeadLessons(model, of_heads(heads, heads.kind), held_out, recipe)
    if not resumed:
        training.notes["held_out_before"] = training.evaluate(lessons, HELD_OUT_WINDOWS)
        training.save(checkpoint)
    training.run_saving(checkpoint, lessons, HELD_OUT_BETWEEN, save_every=save_every, after_step=after_step)
    if isinstance(heads, LearnedHeads) and recipe.learned_scores:
        fit_scores(model, heads, corpus, recipe, say)
    round_to(WRITTEN_AS, heads.parameters())
    after = training.evaluate(lessons, HELD_OUT_WINDOWS)
    if not all(map(math.isfinite, after.values())):
        raise TrainingError(
            f"with the heads as they ended the loss on held-out text is not finite ({after}), so they are not written; "
            f"delete {checkpoint} and train with lower learning rates"
        )
    figures = {
        "recipe": {key: value for key, value in vars(recipe).items()},
        # Heads travel: where a folder lay is nobody's business.
        "data": [source if source.startswith(PREFIX) else Path(source).resolve().name for source in data],
        "held_out_was_kept_apart": apart,
        **training.notes,
        "held_out": after,
    }
    if training.accelerator.is_main_process:
        save_heads(heads, output, ModelFacts.of(model), training=figures, dtype=WRITTEN_AS)
        checkpoint.unlink(missing_ok=True)
    return figures


def _long_enough(corpus: Corpus, held_out: Corpus, recipe: Recipe) -> tuple[Corpus, Corpus]:
    """Refuse documents that are too short now, not after an hour; where few are long enough, use all for both."""
    least = max(*recipe.num_slots, *recipe.calibrate_at, 0) + 2 * recipe.chunk_size
    try:
        for part, seed in ((corpus, recipe.seed), (held_out, -1)):
            part.window(seed, 0, length=recipe.length, least=least)
    except DocumentError:
        whole = corpus.joined(held_out)
        whole.window(recipe.seed, 0, length=recipe.length, least=least)
        return whole, whole
    return corpus, held_out


def standard_library(tokenizer: PreTrainedTokenizerBase) -> tuple[Corpus, Corpus]:
    """Return Python's own standard library as a corpus, which every machine has."""
    folder = Path(sysconfig.get_path("stdlib"))
    # Below the folder: the folder itself may lie in one of such a name.
    files = sorted(
        path for path in folder.rglob("*.py") if not {"site-packages", "test"} & {*path.relative_to(folder).parts}
    )
    documents = [Document(path, 0, path.stat().st_size) for path in files if path.stat().st_size > 0]
    topics = folder / "pydoc_data" / "topics.py"
    if not documents:
        raise DocumentError(f"Python's standard library is not at {folder}; name a folder of text with --data")
    domains = {"code": [d for d in documents if d.file != topics], "prose": [d for d in documents if d.file == topics]}
    return split(domains, tokenizer, held_out=0.05)


def fit_scores(
    model: PreTrainedModel, heads: LearnedHeads, corpus: Corpus, recipe: Recipe, say: Callable[[str], None]
) -> None:
    """Fit the scores to windows of their own, read with heads whose other parts are trained."""
    say(f"reading {recipe.score_windows} windows to fit scores to")
    examples: dict[int, list[Example]] = {}
    for number in range(recipe.score_windows):
        num_slots = recipe.num_slots[number % len(recipe.num_slots)]
        least = num_slots + 2 * recipe.chunk_size
        window = recall_window(corpus, corpus.tokenizer, recipe.seed + 2, number, length=recipe.length, least=least)
        taken = collect(model, heads, window, num_slots=num_slots, chunk_size=recipe.chunk_size, number=number)
        for layer_idx, more in taken.items():
            examples.setdefault(layer_idx, []).extend(more)
    fitted = fit(heads, examples, recall_weight=recipe.recall_weight, epochs=recipe.score_epochs, seed=recipe.seed)
    before, after = zip(*fitted.values(), strict=True)
    means = [sum(figures) / len(figures) for figures in (before, after)]
    say(f"mass of what goes, looked ahead and asked for, held out: {means[0]:.4f} before, {means[1]:.4f} after")


def _weights(
    model: PreTrainedModel, corpus: Corpus, recipe: Recipe, num_slots: int, say: Callable[[str], None]
) -> list[float]:
    return layer_weights(
        model,
        "mass-merge",
        corpus,
        num_slots=num_slots,
        chunk_size=recipe.chunk_size,
        length=min(recipe.length, num_slots + 4 * recipe.chunk_size),
        windows=CALIBRATION_WINDOWS,
        groups=CALIBRATION_GROUPS,
        seed=recipe.seed + 1,
        say=say,
    )
