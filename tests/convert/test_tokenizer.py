"""AutoTokenizer loads the converted tokenizer, whose ids and prompts are ChatGLM's."""

from pathlib import Path

import pytest
import sentencepiece
from chatglm_checkpoints import TEXT, ranks, save
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lococo.convert.chatglm import convert
from lococo.convert.tokenizer import glm_tokenizer
from lococo.errors import ArgumentError, ConversionError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who jumps?"},
    {"role": "assistant", "content": "The fox."},
    {"role": "user", "content": " Over what?\n"},
]


def loaded(folder: Path, family: str) -> PreTrainedTokenizerBase:
    save(folder / "source", family=family)
    convert(folder / "source", folder / "target")
    return AutoTokenizer.from_pretrained(folder / "target", trust_remote_code=False)


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_ids_are_those_of_chatglm(family: str, tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, family)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "source" / "tokenizer.model"))
    first = oracle.vocab_size()  # ChatGLM numbers its special tokens from there
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"] if family == "chatglm3" else []
    special = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *roles]
    assert tokenizer.convert_tokens_to_ids(special) == list(range(first, first + len(special)))
    assert len(tokenizer) == first + len(special)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0, 0)
    for text in (TEXT, "", "soporific sops", "🦊\n\n x"):
        assert tokenizer(text).input_ids == [first + 1, first + 3, *oracle.encode(text)]
        assert tokenizer(text, add_special_tokens=False).input_ids == oracle.encode(text)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_padding_goes_to_the_left(tmp_path: Path) -> None:
    both = loaded(tmp_path, "chatglm3")(["fox", "The quick brown fox"], padding=True)
    assert both["input_ids"][0][:2] == [0, 0]
    assert both["attention_mask"][0][:2] == [0, 0]
    assert set(both) == {"input_ids", "attention_mask"}


def test_turns_are_those_of_chatglm3(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, "chatglm3")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "source" / "tokenizer.model"))
    first = oracle.vocab_size()
    roles = {role: first + 5 + index for index, role in enumerate(("system", "user", "assistant", "observation"))}
    expected = [first + 1, first + 3]
    for message in TALK:
        # Its code gives the role's line and the text to sentencepiece apart.
        expected += [roles[message["role"]], *oracle.encode("\n"), *oracle.encode(message["content"])]
    expected.append(roles["assistant"])
    assert tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"] == expected
    tools = [
        {"role": "assistant", "metadata": "weather", "content": "tool_call(city='Rome')"},
        {"role": "tool", "content": "{}"},
    ]
    said = tokenizer.apply_chat_template(tools, tokenize=False)
    assert said == "[gMASK]<sop><|assistant|>weather\n tool_call(city='Rome')<|observation|>\n {}"


def test_rounds_are_those_of_chatglm2(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, "chatglm2")
    said = tokenizer.apply_chat_template(TALK[1:], tokenize=False, add_generation_prompt=True)
    rounds = "[Round 1]\n\n问\uff1aWho jumps?\n\n答\uff1aThe fox.\n\n[Round 2]\n\n问\uff1a Over what?\n\n\n答\uff1a"
    assert said == "[gMASK]<sop>" + rounds


def test_glm_4(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, "glm-4")
    bytes_first = len(ranks().splitlines())
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|observation|>"]) == [
        bytes_first + offset for offset in (0, 2, 4, 7, 9)
    ]
    assert tokenizer("the the").input_ids == [bytes_first + 2, bytes_first + 4, 257, 258]
    assert tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True) == TEXT
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>",) * 2 + ("left",)
    said = tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert said == "[gMASK]<sop><|system|>\nBe brief.<|user|>\nWho jumps?<|assistant|>"


@pytest.mark.parametrize("error", [None, ModuleNotFoundError("No module named 'google'")])
def test_what_reads_sentencepiece_models_may_be_absent(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "source")

    def absent(name: str) -> None:
        if error:
            raise error

    monkeypatch.setattr("lococo.options.importlib.util.find_spec", absent)
    with pytest.raises(ArgumentError, match=r"needs google.protobuf; install `lococo\[convert\]`"):
        glm_tokenizer(tmp_path / "source", "chatglm3", 512)


def test_a_tokenizer_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "pieces")
    save(tmp_path / "ranks", family="glm-4")
    with pytest.raises(ConversionError, match="line 1: expected a token in base64 and its rank"):
        glm_tokenizer(tmp_path / "pieces", "glm-4", 512)
    with pytest.raises(ConversionError, match=r"is no sentencepiece model|holds no pieces"):
        glm_tokenizer(tmp_path / "ranks", "chatglm3", 512)
