"""Every tensor of ChatGLM has a place in GLM, and all of GLM's come from one."""

from typing import Any

import pytest
import torch
from chatglm_checkpoints import CONFIG
from transformers import GlmConfig, GlmForCausalLM

from lococo.bench.known import KNOWN
from lococo.convert.family import FAMILIES
from lococo.convert.glm_config import glm_config, sizes_of
from lococo.convert.layout import INV_FREQ, Layout

# ChatGLM3-6B-32k's own sizes; its other settings are those of the tiny one.
REAL = {"hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28, "num_attention_heads": 32, "kv_channels": 128}
REAL |= {"padded_vocab_size": 65024, "multi_query_group_num": 2}


@pytest.mark.parametrize("change", [{}, {"add_qkv_bias": False}, REAL])
def test_the_parts_are_glms_tensors(change: dict[str, Any]) -> None:
    config = CONFIG | change
    layout = Layout(sizes_of(config))
    settings = glm_config(config, sizes_of(config), FAMILIES["chatglm3"])
    with torch.device("meta"):
        model = GlmForCausalLM(GlmConfig(**settings))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: shape for parts in layout.parts.values() for name, shape in parts} == theirs
    assert layout.shapes.keys() == layout.parts.keys()
    assert layout.shapes[INV_FREQ] == tuple(model.model.rotary_emb.inv_freq.shape)


def test_chatglm3_is_what_lococo_plans_for() -> None:
    config = CONFIG | REAL
    made = glm_config(config, sizes_of(config), FAMILIES["chatglm3"])
    kind, planned = KNOWN["zai-org/chatglm3-6b-32k"]
    assert made["model_type"] == kind
    assert {name: made[name] for name in planned} == planned
