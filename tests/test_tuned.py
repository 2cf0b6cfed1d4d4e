"""The folder of a tuned model: what it loads as, here and in plain transformers and peft."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parent / "train"))

from commands import SLOTS, WORDS, refused, tokenizer_of
from families import SMALL
from one_extension import RECIPE, corpus_in
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lococo
from lococo import cli
from lococo.attachment import window_of
from lococo.compressors import modules
from lococo.errors import ArgumentError, FileFormatError, ModelError
from lococo.models import load_config, load_tokenizer, model_id
from lococo.train.extend import extend
from lococo.train.extension import Extension
from lococo.tuned import ADAPTER, PREFIX, RECORD, merge, shipped

IDS = torch.randint(0, 128, (1, 100), generator=torch.Generator().manual_seed(0))


def save_base(folder, *, seed=0, **settings):
    tokenizer = tokenizer_of(WORDS)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)} | settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tuned_from(base, folder, *, dtype="float32", **options):
    """Tune a model; return it as it was in memory at the end."""
    model, tokenizer = lococo.load_model(base, dtype=dtype)
    recipe = Extension(**RECIPE | {"steps": 2, "held_out_windows": 0, "accumulate": 1} | options)
    corpus_in(folder.parent / "text", WORDS * 60)
    extend(model, tokenizer, recipe, folder, base=base, data=[str(folder.parent / "text")], say=lambda line: None)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base model, tuned folder, and the model that was tuned."""
    folder = tmp_path_factory.mktemp("tuned")
    base = save_base(folder / "base")
    model = tuned_from(base, folder / "tuned", embeddings_learning_rate=1e-2)
    return folder, model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_tuned_folder_is_a_model(made):
    folder, model = made
    loaded, tokenizer = lococo.load_model(folder / "tuned")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    assert (logits(loaded) - logits(lococo.load_model(folder / "base")[0])).abs().max() > 0.05
    assert lococo.models.model_id(loaded) == "tuned"
    assert [name for name, _ in loaded.named_parameters() if "lora" in name or "base_layer" in name] == []
    assert tokenizer.get_vocab() == load_tokenizer(folder / "tuned").get_vocab()
    assert load_config(folder / "tuned")[0].hidden_size == 48


def test_auto_takes_the_heads_that_were_tuned_with_the_model(made):
    folder, model = made
    loaded, _ = lococo.load_model(folder / "tuned")
    options = {"num_slots": 24, "chunk_size": 16}
    read = []
    for reader, compressor in ((loaded, "auto"), (model, str(folder / "tuned" / "heads")), (loaded, "mass-merge")):
        with lococo.attach(reader, compressor, **options) as slots, torch.no_grad():
            read.append(reader(IDS, past_key_values=slots.new_cache()).logits)
    torch.testing.assert_close(read[0], read[1], rtol=0, atol=1e-4)
    assert (read[0] - read[2]).abs().max() > 1e-3


def test_a_model_tuned_without_heads_is_read_as_it_was_tuned(tmp_path):
    tuned_from(save_base(tmp_path / "base"), tmp_path / "tuned", compressor="h2o", steps=1)
    loaded, _ = lococo.load_model(tmp_path / "tuned")
    assert lococo.attach(loaded, num_slots=24, chunk_size=16).compressor.name == "h2o"
    assert not (tmp_path / "tuned" / "heads").exists()
    tuned_from(save_base(tmp_path / "other"), tmp_path / "full", compressor="full", steps=1)
    loaded, _ = lococo.load_model(tmp_path / "full")
    assert lococo.attach(loaded, num_slots=24, chunk_size=16).compressor is None


def test_heads_keep_the_selection_that_they_were_tuned_with(tmp_path):
    base = save_base(tmp_path / "base")
    tuned_from(base, tmp_path / "tuned", compressor="h2o+lococo-paper", steps=1)
    loaded, _ = lococo.load_model(tmp_path / "tuned")
    compressor = lococo.attach(loaded, num_slots=24, chunk_size=16).compressor
    assert compressor.selection is lococo.compressors.SELECTIONS["h2o"]
    # and are tuned further with it
    tuned_from(base, tmp_path / "again", compressor=str(tmp_path / "tuned" / "heads"), steps=1)
    assert json.loads((tmp_path / "again" / "heads" / "config.json").read_text())["selection"] == "h2o"


def test_a_model_in_half_precision_is_written_so_without_loss(tmp_path):
    base = save_base(tmp_path / "base")
    model = tuned_from(base, tmp_path / "tuned", dtype="bfloat16")
    written = safetensors.torch.load_file(tmp_path / "tuned" / ADAPTER)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    ours = dict(model.named_parameters())
    for name, tensor in written.items():
        own = name.removeprefix(PREFIX).replace("_A.weight", "_A.default.weight")
        assert torch.equal(ours[own.replace("_B.weight", "_B.default.weight")].float(), tensor.float()), name
    heads = safetensors.torch.load_file(tmp_path / "tuned" / "heads" / "model.safetensors")
    assert {tensor.dtype for tensor in heads.values()} == {torch.float16}


def test_a_tuned_folder_loads_in_float16(made):
    folder = made[0] / "tuned"
    loaded, _ = lococo.load_model(folder, dtype="float16")
    assert loaded.dtype == torch.float16
    assert loaded.config.dtype == torch.float16
    exact, _ = lococo.load_model(folder)
    for (name, one), other in zip(loaded.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(one, other.half()), name
    for (name, one), other in zip(loaded.named_buffers(), exact.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_plain_peft_and_transformers_load_it(made):
    import peft

    folder, model = made
    expected = logits(model)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, folder / "tuned")), expected)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.load_adapter(str(folder / "tuned"))
    torch.testing.assert_close(logits(base), expected)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder / "tuned")), expected)


def test_tied_embeddings_stay_tied(tmp_path):
    import peft

    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    model = tuned_from(base, tmp_path / "tuned", embeddings_learning_rate=1e-2, steps=1)
    loaded, _ = lococo.load_model(tmp_path / "tuned")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "tuned")), logits(model))


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_scaled_rope_comes_back_and_is_merged(tmp_path, rope):
    base = save_base(tmp_path / "base", max_position_embeddings=64)
    model = tuned_from(base, tmp_path / "tuned", rope=rope, steps=1)
    loaded, _ = lococo.load_model(tmp_path / "tuned")
    assert window_of(loaded) == load_config(tmp_path / "tuned")[0].max_position_embeddings == 128
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    merge(tmp_path / "tuned", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)
    assert merged.config.rope_parameters["rope_type"] == rope


def test_a_merged_model_is_an_ordinary_checkpoint_with_heads(made):
    folder, model = made
    merge(folder / "tuned", folder / "merged")
    plain = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-4)
    loaded, _ = lococo.load_model(folder / "merged")
    heads = lococo.attach(loaded, num_slots=24, chunk_size=16).compressor
    assert heads.kind == "lococo"
    first = next(iter(lococo.attach(lococo.load_model(folder / "tuned")[0], num_slots=24).compressor.parameters()))
    assert torch.equal(next(iter(heads.parameters())), first)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(ArgumentError, match="merged exists already"):
        merge(folder / "tuned", folder / "merged")
    with pytest.raises(ModelError, match="base is no tuned model"):
        merge(folder / "base", folder / "other")


def copied(folder, target):
    """Copy a tuned folder together with its base, to be spoilt."""
    shutil.copytree(folder / "base", target / "base")
    shutil.copytree(folder / "tuned", target / "tuned")
    record = json.loads((target / "tuned" / RECORD).read_text())
    record["base_model"]["name"] = str(target / "base")
    (target / "tuned" / RECORD).write_text(json.dumps(record))
    return target / "tuned"


def test_another_base_model_is_refused_with_both_names(made, tmp_path):
    tuned = copied(made[0], tmp_path)
    shutil.rmtree(tmp_path / "base")
    save_base(tmp_path / "base", seed=1)
    with pytest.raises(FileFormatError, match=r"tuned from base with the weights \w+, but the model base at .* has"):
        lococo.load_model(tuned)
    shutil.rmtree(tmp_path / "base")
    save_base(tmp_path / "base", num_hidden_layers=2)
    with pytest.raises(FileFormatError, match=r"made for base \(num_hidden_layers 4\).*num_hidden_layers 2"):
        lococo.load_model(tuned)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match="which is there no more; put it back"):
        lococo.load_model(tuned)


def test_damaged_folders(made, tmp_path):
    tuned = copied(made[0], tmp_path)
    whole = {name: part.clone() for name, part in safetensors.torch.load_file(tuned / ADAPTER).items()}
    lora = [name for name in whole if ".lora_" in name]
    safetensors.torch.save_file({name: whole[name] for name in whole if name != lora[0]}, tuned / ADAPTER)
    with pytest.raises(FileFormatError, match=r"lacks model.layers.*lora_A.* and 0 others"):
        lococo.load_model(tuned)
    safetensors.torch.save_file(
        whole | {"base_model.model.model.other.weight": whole[lora[0]].clone()}, tuned / ADAPTER
    )
    with pytest.raises(FileFormatError, match=r"has base_model.model.model.other.weight, which does not fit"):
        lococo.load_model(tuned)
    (tuned / ADAPTER).write_bytes(b"no such thing")
    with pytest.raises(FileFormatError, match="no readable adapter"):
        lococo.load_model(tuned)
    record = json.loads((tuned / RECORD).read_text())
    (tuned / RECORD).write_text(json.dumps(record | {"format_version": 99}))
    with pytest.raises(FileFormatError, match="format version 99, this lococo reads 1"):
        lococo.load_model(tuned)
    (tuned / RECORD).write_text("{}")
    with pytest.raises(FileFormatError, match="no readable record"):
        lococo.load_model(tuned)


def test_a_context_moves_with_the_model_that_was_tuned(made, tmp_path):
    folder, _ = made
    first, second = (Path(shutil.copytree(folder / "tuned", tmp_path / name)) for name in ("here", "there"))
    words = [*SLOTS, "--model"]
    (tmp_path / "book.txt").write_text(WORDS * 5)
    context = tmp_path / "ctx.safetensors"
    assert cli.main(["compress", str(tmp_path / "book.txt"), "-o", str(context), *words, str(first)]) == 0
    assert lococo.describe_context(context).compressor == "auto"
    assert str(tmp_path).encode() not in context.read_bytes()
    shutil.rmtree(first)
    assert cli.main(["ask", str(context), "Who?", "--max-new-tokens", "3", "--model", str(second)]) == 0
    changed = safetensors.torch.load_file(second / "heads" / "model.safetensors")
    safetensors.torch.save_file(
        {name: tensor + 1 for name, tensor in changed.items()}, second / "heads" / "model.safetensors"
    )
    model, tokenizer = lococo.load_model(second)
    with (
        lococo.attach(model, num_slots=32, chunk_size=16) as slots,
        pytest.raises(FileFormatError, match=r"other settings \(heads: \w+ in the file, \w+ here\)"),
    ):
        lococo.load_context(context, slots, tokenizer)


def test_heads_in_a_folder_that_moved_are_asked_for(made, tmp_path, capsys):
    folder, _ = made
    heads, moved = tmp_path / "heads", tmp_path / "moved"
    shutil.copytree(folder / "tuned" / "heads", heads)
    (tmp_path / "book.txt").write_text(WORDS * 5)
    context, base = str(tmp_path / "ctx.safetensors"), ["--model", str(folder / "base")]
    read = ["compress", str(tmp_path / "book.txt"), "-o", context, "--compressor", str(heads)]
    assert cli.main([*read, *SLOTS, *base]) == 0
    heads.rename(moved)
    capsys.readouterr()
    asked = ["ask", context, "Who?", *base]
    assert f"made with the heads in {heads}, where there are none; say with --heads-folder" in refused(asked, capsys)
    assert cli.main([*asked, "--heads-folder", str(moved), "--max-new-tokens", "3"]) == 0


def test_models_that_come_with_the_package_are_small_and_known_by_name():
    assert list(shipped()) == ["SmolLM2-135M-Instruct-32K"]
    for folder in shipped().values():
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 5_000_000
        assert (folder / "README.md").is_file()
        assert not list(folder.rglob("*.bin"))


def test_a_model_that_comes_with_the_package_loads_by_its_name(default_model):
    base, _ = default_model
    model, tokenizer = lococo.load_model("SmolLM2-135M-Instruct-32K")
    assert model_id(model) == "SmolLM2-135M-Instruct-32K"
    assert window_of(model) == 8192
    heads = lococo.attach(model, num_slots=512).compressor
    own = lococo.attach(base, num_slots=512).compressor
    assert heads.name == str(shipped()["SmolLM2-135M-Instruct-32K"] / "heads")
    assert own.name == "lococo"
    theirs, ours = (dict(next(iter(modules(each))).state_dict()) for each in (heads, own))
    assert any(not torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    # Scores are left as they were, since no gradient reaches a choice.
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items() if name.startswith("scorers."))
    ids = tokenizer("It was a bright cold day in April, and the clocks", return_tensors="pt").input_ids
    assert not torch.allclose(model(ids).logits, base(ids).logits, atol=0.1)
