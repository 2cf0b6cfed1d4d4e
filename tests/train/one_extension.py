"""A small tuning, for the tests and for processes of their own."""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from families import SMALL
from one_training import Letters
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from lococo.train.data import Corpus, Document
from lococo.train.extend import extend, tuning_of
from lococo.train.extension import Extension
from lococo.train.processes import first_process

RECIPE = {
    "compressor": "fresh",
    "num_slots": 24,
    "chunk_size": 16,
    "length": 128,
    "steps": 4,
    "accumulate": 1,
    "heads_learning_rate": 1e-2,
    "lora_learning_rate": 1e-2,
    "norms_learning_rate": 1e-2,
    "lora_rank": 2,
    "lora_alpha": 4,
}

WORDS = " ".join(random.Random(0).choices(["one", "two", "three", "many"], k=2000))


def llama(**settings):
    """A small Llama, a new one every time."""
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | settings)).eval()


def corpus_in(folder, *texts):
    """A corpus of one domain, a document per text."""
    folder.mkdir(exist_ok=True)
    documents = []
    for number, text in enumerate(texts or (WORDS,)):
        file = folder / f"{number}.txt"
        file.write_text(text)
        documents.append(Document(file, 0, len(text.encode())))
    return Corpus({"": documents}, Letters())


def tuning(folder, *, model=None, corpus=None, **options):
    """Prepare a tuning on one file, of a Llama by default; return it and what is tuned."""
    recipe = Extension(**RECIPE | options)
    return tuning_of(model or llama(), corpus or corpus_in(folder), recipe)


def whole(source, target):
    """Tune from beginning to end; the losses of all steps lie beside what comes of it."""
    losses = []
    extend(
        llama(),
        Letters(),
        Extension(**RECIPE | {"accumulate": 2, "steps": 3, "held_out_windows": 1}),
        target,
        base=None,
        data=[str(source)],
        save_every=2,
        say=lambda line: None,
        after_step=lambda row: losses.append(row["loss"]),
    )
    if first_process():
        (target / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    whole(Path(sys.argv[1]), Path(sys.argv[2]))
