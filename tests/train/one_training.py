"""A small training, for the tests and for processes of their own."""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from families import SMALL, VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from lococo.train.data import Corpus, Document
from lococo.train.loop import head_training
from lococo.train.recipe import Recipe
from lococo.train.trained import new_heads

RECIPE = {
    "num_slots": (24, 40),
    "chunk_size": 16,
    "length": 120,
    "steps": 4,
    "accumulate": 2,
    "compare_every": 1,
    "calibrate_at": (),
}

CORPUS = " ".join(random.Random(0).choices(["one", "two", "three", "many"], k=2000))


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


def training(folder, *, resumed=None, model=None, **options):
    """Prepare a training on one file, of a Llama by default."""
    file = folder / "text.txt"
    file.write_text(CORPUS)
    set_seed(0)
    model = model or LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    recipe = Recipe(**RECIPE | options)
    corpus = Corpus({"": [Document(file, 0, len(CORPUS))]}, Letters())
    return head_training(model, resumed or new_heads(model, recipe), corpus, recipe)


def figures_of(training):
    """Train, and return what must not depend on how many processes do."""
    losses = []
    training.run(lambda row: losses.append(row["loss"]))
    total = sum(parameter.double().abs().sum().item() for parameter in training.trained.heads.parameters())
    return {"processes": training.accelerator.num_processes, "losses": losses, "sum": total}


if __name__ == "__main__":
    one = training(Path(sys.argv[1]))
    figures = figures_of(one)
    if one.accelerator.is_main_process:
        Path(sys.argv[2]).write_text(json.dumps(figures))
