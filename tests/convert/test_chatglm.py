"""A converted checkpoint computes what the checkpoint did, and goes back byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_checkpoints import save, save_shards
from chatglm_oracle import logits
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GlmForCausalLM

import lococo
from lococo.convert.chatglm import convert, convert_back
from lococo.errors import ConversionError, FileFormatError

CASES = {
    "chatglm3": {"family": "chatglm3"},
    "chatglm3 without rope_ratio": {"family": "chatglm3", "rope_ratio": 1},
    "chatglm3 without bias": {"family": "chatglm3", "add_qkv_bias": False},
    "chatglm2": {"family": "chatglm2"},
    "glm-4": {"family": "glm-4"},
}
QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"


def converted(folder: Path, **options: Any) -> tuple[GlmForCausalLM, dict[str, torch.Tensor], dict[str, Any]]:
    weights, config = save(folder / "source", **options)
    convert(folder / "source", folder / "target")
    model, info = AutoModelForCausalLM.from_pretrained(folder / "target", dtype="auto", output_loading_info=True)
    assert type(model) is GlmForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), weights, config


def batch(length: int = 20, pads: tuple[int, ...] = (0, 7, 13)) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 300, (len(pads), length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return ids, mask


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestTheSameModel:
    @pytest.mark.parametrize("start", [0, 8200, 24000])
    @pytest.mark.parametrize("pads", [(0, 0, 0), (0, 7, 13)])
    @pytest.mark.parametrize("name", CASES)
    def test_logits_are_those_of_chatglm(self, name: str, pads: tuple[int, ...], start: int, tmp_path: Path) -> None:
        model, weights, config = converted(tmp_path, **CASES[name])
        ids, mask = batch(pads=pads)
        # Far from the beginning, and far from one another: RoPE only sees differences.
        positions = start + 400 * (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            came = model(ids, attention_mask=mask, position_ids=positions).logits
        right, wrong = (
            logits(weights, config, ids, mask, positions, divides=divides)
            for divides in ((True, False) if name == "chatglm2" else (False, True))
        )
        real = mask.bool()
        assert (came - right)[real].abs().max() < 1e-5
        if config["rope_ratio"] != 1:  # the other reading of rope_ratio is another model
            assert (came - wrong)[real].abs().max() > 0.1

    def test_the_config_says_what_chatglm_means(self, tmp_path: Path) -> None:
        for name, theta, kind in (("chatglm3", 5e5, "default"), ("chatglm2", 1e4, "linear"), ("glm-4", 5e6, "default")):
            save(tmp_path / name, family=name)
            convert(tmp_path / name, tmp_path / f"{name}-glm")
            config = AutoConfig.from_pretrained(tmp_path / f"{name}-glm")
            assert config.model_type == "glm"
            assert config.rope_parameters["rope_theta"] == theta
            assert config.rope_parameters["rope_type"] == kind
            assert config.rope_parameters["partial_rotary_factor"] == 0.5
            assert (config.rope_parameters.get("factor") == 4.0) == (name == "chatglm2")
            if name == "glm-4":
                assert (config.eos_token_id, config.pad_token_id) == ([259, 266, 268], 259)
                assert (config.max_position_embeddings, config.rms_norm_eps) == (131072, 1.5625e-07)
            else:
                assert (config.eos_token_id, config.pad_token_id) == (2, 0)
                assert (config.max_position_embeddings, config.rms_norm_eps) == (32768, 1e-5)

    def test_half_precision_is_kept(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        weights, _ = save(source, torch_dtype="bfloat16")
        save_shards(source, {name: tensor.bfloat16() for name, tensor in weights.items()}, 3)
        convert(source, tmp_path / "target")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="auto")
        fused = torch.cat([getattr(model.model.layers[1].self_attn, f"{part}_proj").weight for part in "qkv"])
        assert fused.dtype == torch.bfloat16
        assert torch.equal(fused, weights[QKV].bfloat16())


class TestSlots:
    @pytest.mark.parametrize("family", ["chatglm3", "chatglm2"])
    def test_enough_slots_are_the_full_cache_and_few_are_compressed(self, family: str, tmp_path: Path) -> None:
        model, _, _ = converted(tmp_path, family=family)
        ids, mask = batch(length=90)
        with torch.no_grad():
            full = model(ids, attention_mask=mask).logits
            with lococo.attach(model, "mass-merge", num_slots=96, chunk_size=16) as slots:
                whole = model(ids, attention_mask=mask, past_key_values=slots.new_cache()).logits
            with lococo.attach(model, "mass-merge", num_slots=32, chunk_size=16) as slots:
                cache = slots.new_cache()
                few = model(ids, attention_mask=mask, past_key_values=cache).logits
        real = mask.bool()
        assert (whole - full)[real].abs().max() < 1e-4
        # The first row alone reads without padding in front, so it is compressed once 32 + 16 tokens are read.
        assert (few - full)[0, :48].abs().max() < 1e-4
        assert (few - full)[0, 64:].abs().max() > 1e-3
        assert max(cache.slot_layers[0].filled) <= 48

    def test_it_answers_by_its_chat_template(self, tmp_path: Path) -> None:
        save(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "target")
        model, tokenizer = lococo.load_model(tmp_path / "target")
        from lococo.prompts import Prompt

        prompt = Prompt.of(tokenizer)
        assert (prompt.opening, prompt.closing) == ("[gMASK]<sop><|user|>\n ", "<|assistant|>")
        assert prompt.turn == "<|user|>\n "
        user, observation = tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
        assert model.generation_config.eos_token_id == [2, user, observation]


class TestBack:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("name", CASES)
    def test_every_byte_comes_back(self, name: str, shards: int, tmp_path: Path) -> None:
        save(tmp_path / "source", **CASES[name], shards=shards)
        there = convert(tmp_path / "source", tmp_path / "target")
        back = convert_back(tmp_path / "target", tmp_path / "back")
        before, after = contents(tmp_path / "source"), contents(tmp_path / "back")
        assert before == after
        assert sum(name.endswith(".safetensors") for name in after) == shards == there.shards == back.shards
        assert there.family == back.family == CASES[name]["family"]

    def test_odd_headers_come_back_as_well(self, tmp_path: Path) -> None:
        # Metadata, spaces and an order of tensors that no library would write by itself.
        weights, _ = save(tmp_path / "source", shards=1)
        path = tmp_path / "source" / "model.safetensors"
        entries: dict[str, Any] = {}
        data = b""
        for name in sorted(weights, reverse=True):
            raw = weights[name].numpy().tobytes()
            kind = "F16" if weights[name].dtype == torch.float16 else "F32"
            entries[name] = {"data_offsets": [len(data), len(data) + len(raw)], "shape": list(weights[name].shape)}
            entries[name]["dtype"] = kind
            data += raw
        text = json.dumps(entries | {"__metadata__": {"format": "pt", "說": "好"}}, indent=1) + "   "
        path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
        convert(tmp_path / "source", tmp_path / "target")
        with safe_open(tmp_path / "target" / "model.safetensors", "pt") as shard:
            assert torch.equal(
                shard.get_tensor("model.norm.weight"), weights["transformer.encoder.final_layernorm.weight"]
            )
            assert shard.metadata()["說"] == "好"
        convert_back(tmp_path / "target", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(tmp_path / "source")

    def test_weights_that_were_saved_anew_are_refused(self, tmp_path: Path) -> None:
        model, _, _ = converted(tmp_path)
        model.save_pretrained(tmp_path / "target", max_shard_size="60KB")
        with pytest.raises(ConversionError, match=r"model-00001-of-00003.safetensors (is missing|was saved anew)"):
            convert_back(tmp_path / "target", tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_a_folder_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        save(tmp_path / "source")
        with pytest.raises(ConversionError, match=r"source has no chatglm.json, which `lococo convert` writes"):
            convert_back(tmp_path / "source", tmp_path / "back")

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ({"format_version": 9}, "is of format 9; expected 1"),
            ({"shards": {"a": 1}}, "chatglm.json is damaged"),
            ({"shards": {}}, "word_embeddings.weight and 16 other tensors that config.json asks for are in no shard"),
        ],
    )
    def test_a_damaged_sidecar_is_refused(self, change: dict[str, Any], line: str, tmp_path: Path) -> None:
        save(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "target")
        path = tmp_path / "target" / "chatglm.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
        with pytest.raises((ConversionError, FileFormatError), match=line):
            convert_back(tmp_path / "target", tmp_path / "back")
