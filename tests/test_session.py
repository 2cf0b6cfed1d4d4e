"""What the verbs read is what the chat template makes of document and question."""

from pathlib import Path

import pytest
from commands import TEMPLATE, WORDS, save_llama, tokenizer_of
from tokenizers_of_kinds import sentencepiece_of
from transformers import LlamaForCausalLM

from lococo.files import Text
from lococo.options import AnswerOptions, ModelOptions, SlotOptions
from lococo.session import opened

SLOTS = SlotOptions(num_slots=32, chunk_size=16, compressor="mass-merge")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_document_and_questions_make_one_conversation(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_llama(tmp_path / "model")
    if kind == "sentencepiece":
        tokenizer = sentencepiece_of(WORDS)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
    tokenizer = tokenizer_of(WORDS) if kind == "bytes" else sentencepiece_of(WORDS)
    tokenizer.chat_template = TEMPLATE
    read: list[int] = []
    with opened(ModelOptions(model=folder), SLOTS) as session:
        forward = session.model.forward

        def noting(**inputs):  # type: ignore[no-untyped-def]
            read.extend(inputs["input_ids"][0].tolist())
            return forward(**inputs)

        monkeypatch.setattr(session.model, "forward", noting)
        cache = session.slots.new_cache()
        # Longer than the buffer, and with a special token that is spelled out.
        document = WORDS * 3 + "<|end|>"
        session.read(cache, Text([document[:50], document[50:]]))
        messages = [{"role": "user", "content": f"{document}\n\nWho?"}]
        how = AnswerOptions(max_new_tokens=3)
        list(session.answer(cache, "Who?", how))
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(read[:-3]) == whole
        before = len(read)
        list(session.answer(cache, "And then?", how, after="answer"))
        assert tokenizer.decode(read[before:-3]) == "<|end|>\n<|start|>user\nAnd then?<|end|>\n<|start|>assistant\n"
        assert cache.seen == len(read)
    if kind == "bytes":  # what was spelled out in the document is text: two turns of the user and one answer have ended
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        assert read[: before - 3].count(end) == 1
        assert read[before:-3].count(end) == 2
