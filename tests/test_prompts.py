"""What a model is told, and how its answer becomes text."""

import pytest
from commands import WORDS, tokenizer_of
from tokenizers import pre_tokenizers
from tokenizers_of_kinds import sentencepiece_of
from transformers import PreTrainedTokenizerFast

from lococo.prompts import Prompt, text_stream
from lococo.tokenization import encode_stream


def test_half_a_character_waits_for_its_other_half() -> None:
    tokenizer = tokenizer_of(WORDS)
    text = "Zebras: 狐狸 🦓 naïve\n"
    ids = tokenizer(text)["input_ids"]
    pieces = list(text_stream(tokenizer, ids))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_never_becomes_a_character_is_given_at_the_end() -> None:
    tokenizer = tokenizer_of(WORDS)
    ids = tokenizer("ok 狐")["input_ids"][:-1]
    assert "".join(text_stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_prompt_is_what_the_template_makes_of_the_whole() -> None:
    tokenizer = tokenizer_of(WORDS)
    prompt = Prompt.of(tokenizer)
    document, question = tokenizer("The fox.")["input_ids"], prompt.question_ids("Who?", after="document")
    messages = [{"role": "user", "content": "The fox.\n\nWho?"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt.opening_ids() + document + question[0].tolist()) == whole


def test_special_tokens_in_a_question_are_plain_text() -> None:
    tokenizer = tokenizer_of(WORDS)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ids = Prompt.of(tokenizer).question_ids("What is <|end|>?", after="opening")[0].tolist()
    assert ids.count(end) == 1


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('tools alone') }}",
        "{{ 1 / 0 }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    ],
)
def test_a_model_without_a_chat_template_gets_plain_text(template: str | None) -> None:
    tokenizer = tokenizer_of(WORDS)
    tokenizer.chat_template = template
    ids = Prompt.of(tokenizer).question_ids("Who?", after="document")[0].tolist()
    assert tokenizer.decode(ids) == "\n\nQuestion: Who?\nAnswer:"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "system by default": "<|im_start|>system\nYou help.<|im_end|>\n" + CHATML,
    "trimmed": (
        "{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|e|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|h|>assistant<|e|>\n\n{% endif %}"
    ),
    "no system": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<sot>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<eot>\n{% endfor %}"
        "{% if add_generation_prompt %}<sot>model\n{% endif %}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "bytes after a space", "sentencepiece"])
def test_the_parts_of_a_prompt_are_encoded_as_the_whole(kind: str, template: str) -> None:
    tokenizer = sentencepiece_of(WORDS) if kind == "sentencepiece" else tokenizer_of(WORDS)
    if kind == "bytes after a space":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = template
    prompt = Prompt.of(tokenizer)
    opening = prompt.opening_ids()

    def encoded(text: str, *, continues: bool) -> list[int]:
        return [token for ids in encode_stream(tokenizer, [text], continues=continues) for token in ids]

    ids = opening + encoded("The fox.", continues=prompt.continues(opening))
    ids += prompt.question_ids("Who?", after="document")[0].tolist()
    messages = [{"role": "user", "content": "The fox.\n\nWho?"}]
    assert ids == whole_ids(tokenizer, messages)
    ids += encoded("It.", continues=True) + prompt.question_ids("And?", after="answer")[0].tolist()
    more = [{"role": "assistant", "content": "It."}, {"role": "user", "content": "And?"}]
    assert ids == whole_ids(tokenizer, messages + more)
    alone = prompt.question_ids("The fox.\n\nWho?", after="opening")[0].tolist()
    assert alone == whole_ids(tokenizer, messages)


def whole_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
