"""The tokenizer of a ChatGLM checkpoint, for transformers' AutoTokenizer.

Its special tokens are not in its file: ChatGLM's code numbers them behind the pieces. `sop` and `eop` are called
`<sop>` and `<eop>` here, as in GLM-4, because a word that is a special token would be cut out of "soporific" as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lococo.convert.templates import PREFIX, TEMPLATES
from lococo.errors import ConversionError
from lococo.options import check_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE: Final = "tokenizer.model"
MASKS: Final = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
ROLES: Final = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
END_OF_TEXT: Final = "<|endoftext|>"
IMAGE: Final = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
SPECIAL: Final = {
    "chatglm2": MASKS,
    "chatglm3": (*MASKS, *ROLES),
    "glm-4": (END_OF_TEXT, *MASKS, *ROLES, *IMAGE),
}
STOPS: Final = ("<|user|>", "<|observation|>")  # whose turn it is then


def glm_tokenizer(source: Path, family: str, vocab_size: int) -> "PreTrainedTokenizerFast":
    """Make the tokenizer of a checkpoint.

    Args:
        source: The checkpoint's folder, with tokenizer.model.
        family: Of the checkpoint.
        vocab_size: Rows of the model's embedding.

    Raises:
        ConversionError: If the file is missing, damaged or of another model.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    path = source / FILE
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; fetch the checkpoint's tokenizer")
    core, roles = (_ranked if family == "glm-4" else _pieces)(path)
    special = SPECIAL[family]
    core.add_special_tokens(list(special))
    if (size := core.get_vocab_size()) > vocab_size:
        raise ConversionError(
            f"{path} has {size:,} tokens with the special ones, and the model an embedding of {vocab_size:,} rows "
            "(padded_vocab_size); take the tokenizer that belongs to the model"
        )
    prefix = [(token, core.token_to_id(token)) for token in PREFIX]
    core.post_processor = processors.TemplateProcessing(
        single=[*PREFIX, "$A"], pair=[*PREFIX, "$A", "$B:1"], special_tokens=prefix
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=list(special),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATES[family],
        **roles,
    )


def stops_of(tokenizer: "PreTrainedTokenizerFast", config: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config.json: an answer also ends where it is somebody else's turn.

    Args:
        tokenizer: Of the model.
        config: Of GlmForCausalLM.
    """
    ids = config["eos_token_id"]
    ends: Sequence[int] = [ids] if type(ids) is int else ids
    vocabulary = tokenizer.get_vocab()
    ends = list(dict.fromkeys([*ends, *(vocabulary[token] for token in STOPS if token in vocabulary)]))
    return {"eos_token_id": ends, "pad_token_id": config["pad_token_id"]}


def _pieces(path: Path) -> tuple[Any, dict[str, str]]:
    check_extra("convert", "google.protobuf")
    from lococo.convert import sentencepiece_model

    proto = sentencepiece_model.read_model(path)
    spec = proto.trainer_spec
    unknown, end = (str(proto.pieces[index].piece) for index in (spec.unk_id, spec.eos_id))
    # ChatGLM pads with its unknown token.
    return sentencepiece_model.tokenizer_of(proto), {"unk_token": unknown, "eos_token": end, "pad_token": unknown}


def _ranked(path: Path) -> tuple[Any, dict[str, str]]:
    from lococo.convert import tiktoken_model

    core = tiktoken_model.tokenizer_of(tiktoken_model.read_ranks(path))
    return core, {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
