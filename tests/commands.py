"""What the tests of the command line share: a tiny saved model, a text, and what a refusal looks like."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lococo import cli

WORDS = "The quick brown fox jumps over the lazy dog, and 7 naïve zebras – 狐狸 – follow it home. "
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SMALL = ["--num-slots", "32", "--chunk-size", "16", "--max-new-tokens", "5"]
SLOTS = SMALL[:4]


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=special, chat_template=TEMPLATE, model_max_length=10**9
    )


def save_llama(folder: Path, *, words: str = WORDS, layers: int = 2, seed: int = 0, window: int = 256) -> str:
    tokenizer = tokenizer_of(words)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def refused(words: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Run a command that must fail, and return the one line it says."""
    assert cli.main(words) == status
    said = capsys.readouterr()
    assert said.err.startswith("lococo: ")
    assert said.err.count("\n") == 1, said.err
    assert said.out == ""
    return said.err
