import pytest
from families import tiny
from transformers import MambaConfig, MambaForCausalLM

from lococo.errors import FileFormatError, UnsupportedModelError
from lococo.facts import ModelFacts


def test_facts_are_read_off_the_config():
    facts = ModelFacts.of(tiny("gpt2"))
    assert (facts.num_hidden_layers, facts.num_key_value_heads, facts.head_dim, facts.rope) == (4, 4, 12, {})
    assert ModelFacts.of(tiny("llama")).num_key_value_heads == 2
    assert ModelFacts.of(tiny("llama-yarn")).rope["rope_type"] == "yarn"


def test_the_same_shape_under_another_name_passes():
    recorded = ModelFacts.of(tiny()).to_dict()
    ModelFacts.of(tiny()).check(recorded | {"model": "somewhere/else"}, "file")
    with pytest.raises(
        FileFormatError, match=r"file was made for m .head_dim 64., but the model here is .* .head_dim 12."
    ):
        ModelFacts.of(tiny()).check(recorded | {"model": "m", "head_dim": 64}, "file")


def test_models_without_heads_have_no_facts():
    with pytest.raises(UnsupportedModelError, match="no attention heads"):
        ModelFacts.of(MambaForCausalLM(MambaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, state_size=4)))
