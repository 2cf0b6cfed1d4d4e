"""Folders that no model can be made of are refused in one line, by `load_model` and on the command line."""

import json
import shutil
from pathlib import Path

import chatglm_checkpoints
import pytest
import torch
from commands import refused, save_llama, tokenizer_of
from safetensors.torch import load_file, save_file

from lococo import cli
from lococo.errors import ModelError, UnsupportedModelError
from lococo.folders import INDEX
from lococo.models import load_config, load_model


@pytest.fixture
def folder(tiny: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    model, _ = load_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def test_an_unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="zamboni", architectures=["ZamboniForCausalLM"])
    with pytest.raises(ModelError, match=r"^broken has the architecture 'zamboni', .* upgrade transformers, or trust"):
        load_model(folder)


def test_a_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 3
    shards[1].unlink()
    said = rf"^broken lacks 1 of the {len(shards)} shards that {INDEX} names \({shards[1].name}\); copy or download"
    with pytest.raises(ModelError, match=said):
        load_model(sharded)
    shards[2].unlink()
    with pytest.raises(ModelError, match=rf"lacks 2 of the {len(shards)} shards .*{shards[1].name}, \.\.\.\)"):
        load_model(sharded)


def test_pickled_weights_alone(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    load_model(folder)  # what is safe is there as well
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match=r"^broken holds pickled weights alone \(pytorch_model.bin\)"):
        load_model(folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": [1]}', "{}"])
def test_a_damaged_index(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index, "utf-8")
    with pytest.raises(ModelError, match=rf"broken/{INDEX} is damaged .*; copy or download the folder again"):
        load_model(sharded)


def test_a_weight_of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        weights[name] = weights[name][:10].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = (
        r"^broken: model\.layers\.0\.mlp\.up_proj\.weight has the shape \[10, 32\], and \[64, 32\] by its config\.json "
    )
    with pytest.raises(ModelError, match=said + r"\(and 1 more\); use the config\.json that belongs"):
        load_model(folder)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    rows = load_model(folder)[0].get_input_embeddings().num_embeddings
    other = tokenizer_of("entirely other words, and many more of them: " + "".join(map(chr, range(200, 400))))
    other.add_tokens([f"word{number}" for number in range(rows + 5 - len(other))])
    other.save_pretrained(folder)
    said = (
        rf"^the tokenizer of broken does not belong to it: its token 'word\d+' has the id {rows}, but .* knows {rows}"
    )
    with pytest.raises(ModelError, match=said):
        load_model(folder)


def test_a_token_for_padding_alone_may_lie_beyond(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert load_model(folder)[1].pad_token_id == model.get_input_embeddings().num_embeddings


def test_a_checkpoint_in_the_format_of_meta(tmp_path: Path) -> None:
    folder = tmp_path / "Llama-2-7b"
    folder.mkdir()
    (folder / "params.json").write_text('{"dim": 4096, "n_layers": 32, "n_heads": 32}', "utf-8")
    (folder / "consolidated.00.pth").write_bytes(b"not even read")
    with pytest.raises(
        UnsupportedModelError, match=r"Meta's own format .*, a pickle, .*convert_llama_weights_to_hf"
    ) as caught:
        load_model(folder)
    assert f"--input_dir {folder} " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_half_converted(folder: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(folder, tmp_path / "new.half-converted"))
    for _ in range(2):
        with pytest.raises(ModelError, match=r"^new.half-converted is half-converted: .* stopped; delete it, and"):
            load_model(half)
        (half / "config.json").unlink(missing_ok=True)  # which is written last


def test_a_chatglm_that_was_not_converted(tmp_path: Path) -> None:
    chatglm_checkpoints.save(tmp_path / "chatglm3-6b")
    with pytest.raises(UnsupportedModelError, match=r"^chatglm3-6b .* `lococo convert chatglm3 \S+ NEW`") as caught:
        load_model(tmp_path / "chatglm3-6b")
    assert f"chatglm3 {tmp_path / 'chatglm3-6b'} NEW" in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="lococo convert chatglm3"):
        load_config(tmp_path / "chatglm3-6b")


def test_other_code_of_its_own(folder: Path) -> None:
    edit(folder / "config.json", model_type="zamboni", auto_map={"AutoConfig": "configuration_zamboni.ZamboniConfig"})
    with pytest.raises(ModelError, match=r"^broken runs on Python code .*--trust-remote-code") as caught:
        load_model(folder)
    assert "..." not in str(caught.value)


@pytest.mark.parametrize("damage", ["architecture", "shard", "shape", "tokenizer", "meta"])
def test_the_command_line_says_it_in_one_line(
    sharded: Path, damage: str, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "architecture":
        edit(sharded / "config.json", model_type="zamboni")
    elif damage == "shard":
        next(sharded.glob("model-*.safetensors")).unlink()
    elif damage == "shape":
        edit(sharded / "config.json", intermediate_size=48)
    elif damage == "tokenizer":
        tokenizer = load_model(sharded)[1]
        tokenizer.add_tokens(["one", "more"])
        tokenizer.save_pretrained(sharded)
    else:
        (sharded / "config.json").unlink()
        (sharded / "consolidated.00.pth").touch()
    capsys.readouterr()
    said = refused(["run", str(book), "--ask", "Who?", "--model", str(sharded)], capsys)
    assert "broken" in said


def test_a_folder_that_is_whole_is_read(sharded: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(book), "--ask", "Who?", "--model", str(sharded), "--num-slots", "32", "--chunk-size", "16"]
    assert cli.main([*words, "--max-new-tokens", "2"]) == 0


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    whole = save_llama(tmp_path / "whole")
    model, tokenizer = load_model(whole)
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
        tokenizer.save_pretrained(folder)
        assert (folder / INDEX).is_file()
        loaded = load_model(folder, dtype="auto")[0]
        assert loaded.dtype == dtype
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
        model = load_model(whole)[0]
