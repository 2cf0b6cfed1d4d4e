"""Settings that GLM's classes cannot stand for are refused by name."""

from typing import Any

import pytest
from chatglm_checkpoints import CONFIG

from lococo.convert.family import FAMILIES
from lococo.convert.glm_config import glm_config, rope_parameters, sizes_of
from lococo.errors import ConversionError


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "llama"}, "has the model_type 'llama'; expected 'chatglm'"),
        ({"model_type": None}, "has the model_type None"),
        ({"architectures": ["ChatGLMForSequenceClassification"]}, "the architecture ChatGLMForSequenceClassification;"),
        ({"pre_seq_len": 128}, "reads 128 tuned keys and values before each text"),
        ({"quantization_bit": 4}, "are quantised to 4 bits"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True, and"),
        ({"post_layer_norm": False}, "post_layer_norm = False"),
        ({"rmsnorm": False}, "rmsnorm = False"),
        ({"multi_query_attention": False}, "multi_query_attention = False"),
        ({"add_bias_linear": True}, "add_bias_linear = True"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection = True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling = {'type': 'dynamic'}"),
        ({"num_layers": "28"}, "num_layers = '28'; expected a whole number from 1"),
        ({"hidden_size": True}, "hidden_size = True; expected a whole number"),
        ({"seq_length": 0}, "seq_length = 0; expected a whole number from 1"),
        ({"multi_query_group_num": 3}, "a multiple of multi_query_group_num, and kv_channels of 4; got 4, 3 and 16"),
        ({"kv_channels": 18}, "got 4, 2 and 18"),
        ({"rope_ratio": -1}, "rope_ratio = -1; expected a number above 0"),
        ({"layernorm_epsilon": "1e-5"}, "layernorm_epsilon = '1e-5'; expected a number above 0"),
        ({"eos_token_id": None}, "has no eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>'; expected ids of tokens below 512"),
        ({"eos_token_id": [2, 512]}, "eos_token_id = [2, 512]; expected ids of tokens below 512"),
        ({"pad_token_id": -1}, "pad_token_id = -1; expected ids of tokens below 512"),
        ({"attention_dropout": "much"}, "attention_dropout = 'much'; expected a number from 0 to 1"),
        ({"architectures": 3}, "architectures = 3; expected a list of names"),
        ({"architectures": "ChatGLMModel"}, "architectures = 'ChatGLMModel'; expected a list of names"),
    ],
)
def test_refused(change: dict[str, Any], line: str) -> None:
    config = CONFIG | change
    with pytest.raises(ConversionError) as caught:
        glm_config(config, sizes_of(config), FAMILIES["chatglm3"])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_settings_are_those_of_chatglms_class() -> None:
    absent = ("rope_ratio", "layernorm_epsilon", "add_qkv_bias", "rmsnorm", "post_layer_norm", "torch_dtype")
    config = {name: value for name, value in CONFIG.items() if name not in absent}
    sizes = sizes_of(config)
    made = glm_config(config, sizes, FAMILIES["chatglm3"])
    assert not sizes.attention_bias
    assert made["rms_norm_eps"] == 1e-5
    assert made["rope_parameters"]["rope_theta"] == 1e4
    assert "dtype" not in made
    del config["multi_query_attention"]
    with pytest.raises(ConversionError, match="multi_query_attention = False"):
        sizes_of(config)


@pytest.mark.parametrize(
    ("name", "ratio", "theta", "factor"),
    [
        ("chatglm3", 1, 1e4, None),
        ("chatglm3", 50, 5e5, None),
        ("glm-4", 500, 5e6, None),
        ("chatglm2", 1, 1e4, None),
        ("chatglm2", 4, 1e4, 4.0),
    ],
)
def test_rope(name: str, ratio: float, theta: float, factor: float | None) -> None:
    made = rope_parameters(ratio, FAMILIES[name])
    assert made["rope_theta"] == theta
    assert made.get("factor") == factor
    assert made["rope_type"] == ("default" if factor is None else "linear")
