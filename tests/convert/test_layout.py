"""Every tensor of ChatGLM has a place in GLM, and all of GLM's come from one."""

from checkpoints import CONFIG
from transformers import GlmConfig, GlmForCausalLM

from lococo.convert.family import FAMILIES
from lococo.convert.glm_config import glm_config, sizes_of
from lococo.convert.layout import INV_FREQ, Layout


def test_the_parts_are_glms_tensors() -> None:
    for bias in (True, False):
        config = CONFIG | {"add_qkv_bias": bias}
        layout = Layout(sizes_of(config))
        settings = glm_config(config, sizes_of(config), FAMILIES["chatglm3"])
        model = GlmForCausalLM(
            GlmConfig(**{key: settings[key] for key in settings if key not in ("architectures", "dtype")})
        )
        theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert {name: shape for parts in layout.parts.values() for name, shape in parts} == theirs
        assert layout.shapes.keys() == layout.parts.keys()
        assert layout.shapes[INV_FREQ] == tuple(model.model.rotary_emb.inv_freq.shape)
