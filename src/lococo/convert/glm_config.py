"""The settings of a ChatGLM checkpoint, in the words of transformers' GlmConfig.

Everything that changes what the model computes is either put into other words or has to be what GLM's classes do.
A setting that is absent has the value that ChatGLM's own configuration class gives it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lococo.convert.family import Family
from lococo.errors import ConversionError

ARCHITECTURES: Final = frozenset(
    {"ChatGLMModel", "ChatGLMForConditionalGeneration", "ChatGLMForCausalLM"}
)  # the last is a name that some fine-tunings give
ROPE_BASE: Final = 10000
ROTARY_SHARE: Final = 0.5  # of each head; fixed in ChatGLM's code


@dataclass(frozen=True)
class Fixed:
    """A setting that GLM's classes have one value for.

    Attributes:
        expected: That value.
        absent: The value that ChatGLM gives it where config.json says nothing.
    """

    expected: Any
    absent: Any


FIXED: Final = {
    "multi_query_attention": Fixed(True, absent=False),
    "add_bias_linear": Fixed(False, absent=False),
    "apply_residual_connection_post_layernorm": Fixed(False, absent=False),
    "post_layer_norm": Fixed(True, absent=True),
    "rmsnorm": Fixed(True, absent=True),
    "fp32_residual_connection": Fixed(False, absent=False),
    "interleaved_qkv": Fixed(False, absent=False),
    "tie_word_embeddings": Fixed(False, absent=False),  # ChatGLM has an output layer of its own in any case
    "rope_scaling": Fixed(None, absent=None),
    "vision_config": Fixed(None, absent=None),
}


@dataclass(frozen=True)
class Sizes:
    """What the shapes of all tensors follow from; GLM's names.

    Attributes:
        vocab_size: Rows of the embedding, those that no token has included.
        hidden_size: Numbers per token between layers.
        intermediate_size: Numbers per token inside the feed-forward layer.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads.
        head_dim: Numbers per head.
        attention_bias: Whether queries, keys and values have a bias.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Read the sizes of a ChatGLM checkpoint.

    Args:
        config: Its config.json.

    Raises:
        ConversionError: If it is no ChatGLM checkpoint, or one that GLM's classes cannot stand for.
    """
    _check(config)
    sizes = Sizes(
        vocab_size=_whole(config, "padded_vocab_size"),
        hidden_size=_whole(config, "hidden_size"),
        intermediate_size=_whole(config, "ffn_hidden_size"),
        num_hidden_layers=_whole(config, "num_layers"),
        num_attention_heads=_whole(config, "num_attention_heads"),
        num_key_value_heads=_whole(config, "multi_query_group_num"),
        head_dim=_whole(config, "kv_channels"),
        attention_bias=bool(config.get("add_qkv_bias", False)),
    )
    if sizes.num_attention_heads % sizes.num_key_value_heads or sizes.head_dim % 4:
        raise ConversionError(
            "config.json: expected num_attention_heads to be a multiple of multi_query_group_num, and kv_channels of "
            f"4; got {sizes.num_attention_heads}, {sizes.num_key_value_heads} and {sizes.head_dim}"
        )
    return sizes


def glm_config(config: Mapping[str, Any], sizes: Sizes, family: Family) -> dict[str, Any]:
    """Return config.json for GlmForCausalLM.

    Args:
        config: Of the ChatGLM checkpoint, which `sizes_of` has accepted.
        sizes: Of it.
        family: It belongs to.

    Raises:
        ConversionError: If a setting is missing or none that GLM's classes could take.
    """
    made: dict[str, Any] = {"architectures": ["GlmForCausalLM"], "model_type": "glm"}
    made |= vars(sizes)
    made["hidden_act"] = "silu"
    made["attention_dropout"] = _share(config, "attention_dropout")
    made["max_position_embeddings"] = _whole(config, "seq_length")
    made["rms_norm_eps"] = _positive(config, "layernorm_epsilon", 1e-5)
    made["rope_parameters"] = rope_parameters(_positive(config, "rope_ratio", 1), family)
    made["use_cache"] = bool(config.get("use_cache", True))
    made["tie_word_embeddings"] = False
    # GlmConfig would put GLM-4's ids where there are none.
    if config.get("eos_token_id") is None:
        raise ConversionError("config.json has no eos_token_id, which ends an answer; add it (2 in ChatGLM2 and 3)")
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        made[name] = _ids(config, name, sizes.vocab_size)
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        made["dtype"] = dtype
    return made


def rope_parameters(ratio: float, family: Family) -> dict[str, Any]:
    """Return GLM's settings of RoPE.

    Source: modeling_chatglm.py of each family. ChatGLM3 and GLM-4 multiply the base by `rope_ratio` and leave
    positions as they are; ChatGLM2-6B-32k divides positions by it and leaves the base, which transformers calls
    linear.

    Args:
        ratio: `rope_ratio`, 1 where there is none.
        family: Of the checkpoint.
    """
    made: dict[str, Any] = {"rope_type": "default", "rope_theta": float(ROPE_BASE)}
    if family.ratio_divides and ratio != 1:
        made |= {"rope_type": "linear", "factor": float(ratio)}
    elif not family.ratio_divides:
        made["rope_theta"] = float(ROPE_BASE * ratio)
    return made | {"partial_rotary_factor": ROTARY_SHARE}


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what GLM's classes cannot stand for."""
    if (kind := config.get("model_type")) != "chatglm":
        raise ConversionError(
            f"config.json has the model_type {kind!r}; expected 'chatglm', as ChatGLM2, ChatGLM3 and GLM-4-9B have"
        )
    architectures = config.get("architectures") or ["ChatGLMModel"]
    if type(architectures) is not list:
        raise ConversionError(f"config.json has architectures = {architectures!r}; expected a list of names")
    if strange := [name for name in architectures if name not in ARCHITECTURES]:
        raise ConversionError(
            f"config.json has the architecture {strange[0]}; expected {' or '.join(sorted(ARCHITECTURES))}"
        )
    if config.get("quantization_bit"):
        raise ConversionError(
            f"the weights are quantised to {config['quantization_bit']} bits (quantization_bit); take the checkpoint "
            "that they were made from"
        )
    if config.get("pre_seq_len"):
        raise ConversionError(
            f"the model reads {config['pre_seq_len']} tuned keys and values before each text (pre_seq_len), for which "
            "GLM's classes have no place; take a checkpoint without prefix tuning"
        )
    for name, fixed in FIXED.items():
        if (found := config.get(name, fixed.absent)) != fixed.expected:
            raise ConversionError(
                f"config.json has {name} = {found!r}, and GLM's classes do {fixed.expected!r} alone; "
                "such a checkpoint cannot be converted"
            )


def _whole(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ConversionError(f"config.json has {name} = {value!r}; expected a whole number from 1")
    return value


def _positive(config: Mapping[str, Any], name: str, absent: float) -> float:
    value = config.get(name, absent)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ConversionError(f"config.json has {name} = {value!r}; expected a number above 0")
    return float(value)


def _share(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name) or 0.0
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ConversionError(f"config.json has {name} = {value!r}; expected a number from 0 to 1")
    return float(value)


def _ids(config: Mapping[str, Any], name: str, vocab_size: int) -> int | list[int] | None:
    value: int | list[int] | None = config.get(name)
    for token in value if type(value) is list else [value]:
        if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
            raise ConversionError(f"config.json has {name} = {value!r}; expected ids of tokens below {vocab_size:,}")
    return value
