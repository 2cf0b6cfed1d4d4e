import json

import pytest
import safetensors.torch
import torch
from families import tiny, tokens

import lococo
from lococo.compressors.heads import save_heads
from lococo.errors import FileFormatError
from lococo.facts import ModelFacts


@pytest.fixture
def saved(tmp_path):
    attached = lococo.attach(tiny(), "lococo-paper", num_slots=40, chunk_size=16)
    heads = attached.compressor.merge
    for mix in heads.mix.values():
        torch.nn.init.constant_(mix, 0.2)
    save_heads(heads, tmp_path / "heads", ModelFacts.of(tiny()), training={"steps": 3})
    return attached.compressor, tmp_path / "heads"


@torch.no_grad()
def test_saved_heads_are_the_same_heads(saved):
    compressor, folder = saved
    ids = tokens(1, 150)
    outputs = []
    for one in (compressor, str(folder)):
        with lococo.attach(tiny(), one, num_slots=40, chunk_size=16) as slots:
            outputs.append(tiny()(ids, past_key_values=slots.new_cache()).logits)
    assert torch.equal(*outputs)
    assert json.loads((folder / "config.json").read_text())["training"] == {"steps": 3}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_heads_of_another_shape_are_refused(saved):
    _, folder = saved
    with pytest.raises(FileFormatError, match=r"slots 40 in each of 4 layers.*slots 50 in each of 4 layers"):
        lococo.attach(tiny(), str(folder), num_slots=50, chunk_size=16)


def test_heads_of_another_model_are_refused(saved):
    _, folder = saved
    with pytest.raises(FileFormatError, match=r"rope .*but the model here is"):
        lococo.attach(tiny("llama-yarn"), str(folder), num_slots=40, chunk_size=16)


CONFIGS = {
    "version": lambda config: config.update(format_version=99),
    "no base model": lambda config: config.pop("base_model"),
    "null base model": lambda config: config.update(base_model=None),
    "unknown selection": lambda config: config.update(selection="bogus"),
    "odd selection": lambda config: config.update(selection=["h2o"]),
    "unknown setting": lambda config: config["settings"].update(depth=3),
    "odd setting": lambda config: config["settings"].update(kernel_size="wide"),
    "other kernel": lambda config: config["settings"].update(kernel_size=5),
    "no head_dim": lambda config: config["settings"].pop("head_dim"),
}


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "truncated", "not json", *CONFIGS])
def test_damaged_heads_are_refused(saved, damage):
    _, folder = saved
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "not json":
        config.write_text("{")
    elif damage in CONFIGS:
        content = json.loads(config.read_text())
        CONFIGS[damage](content)
        config.write_text(json.dumps(content))
    else:
        (folder / damage).unlink()
    with pytest.raises(FileFormatError, match=str(folder)):
        lococo.attach(tiny(), str(folder), num_slots=40, chunk_size=16)


def test_weights_of_other_shapes_are_told_in_few_words(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["kernel_size"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match="take both files of one training") as refused:
        lococo.attach(tiny(), str(folder), num_slots=40, chunk_size=16)
    assert "size mismatch for convolutions.0.weight" in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(folder))


def test_weights_that_are_not_finite_are_refused(saved):
    _, folder = saved
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["mix.2"] = torch.tensor(torch.nan)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(FileFormatError, match="weights that are not finite"):
        lococo.attach(tiny(), str(folder), num_slots=40, chunk_size=16)


def test_a_training_that_has_not_ended_is_called_so(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(FileFormatError, match="has not ended; run the same `lococo train` once more"):
        lococo.attach(tiny(), str(tmp_path), num_slots=40, chunk_size=16)


def test_a_folder_does_not_take_the_place_of_a_compressor(saved, tmp_path, monkeypatch):
    (tmp_path / "mass-merge").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lococo.attach(tiny(), "mass-merge", num_slots=40).compressor.name == "mass-merge"
    # heads are known by where they are, from wherever they are asked for
    assert lococo.attach(tiny(), "heads", num_slots=40).compressor.name == str(tmp_path / "heads")
