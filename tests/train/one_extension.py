"""A small tuning, for the tests and for processes of their own."""

import os
import random
import signal
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


def whole(source, target, killed_after=0, **options):
    """Tune from beginning to end, or until a step after which the process is killed; losses lie beside the folder."""

    def noted(row):
        if not first_process():
            return
        with target.with_suffix(".losses").open("a") as file:
            print(row["loss"], file=file)
        if row["step"] == killed_after:  # which ends the others as well
            os.kill(os.getpid(), signal.SIGKILL)

    extend(
        llama(),
        Letters(),
        Extension(**RECIPE | {"accumulate": 2, "steps": 3, "held_out_windows": 1} | options),
        target,
        base=None,
        data=[str(source)],
        save_every=2,
        say=lambda line: None,
        after_step=noted,
    )


if __name__ == "__main__":
    whole(*map(Path, sys.argv[1:3]), int(sys.argv[3]), shard=sys.argv[4] == "shard")
