"""What a model is told, and how its answer becomes text."""

from commands import WORDS, tokenizer_of

from lococo.prompts import Prompt, text_stream


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


def test_a_model_without_a_chat_template_gets_plain_text() -> None:
    tokenizer = tokenizer_of(WORDS)
    tokenizer.chat_template = None
    ids = Prompt.of(tokenizer).question_ids("Who?", after="document")[0].tolist()
    assert tokenizer.decode(ids) == "\n\nQuestion: Who?\nAnswer:"
