"""A checkpoint that cannot be converted, or a conversion that is stopped, leaves nothing that looks like a model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_checkpoints import save, save_shards
from safetensors.torch import load_file, save_file

from lococo.convert import chatglm
from lococo.convert.chatglm import convert, convert_back
from lococo.errors import ArgumentError, ConversionError, FileFormatError

SHARD = "model-00002-of-00003.safetensors"
QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"


class TestRefused:
    """Each leaves nothing behind."""

    def refused(self, folder: Path, line: str, error: type[Exception] = ConversionError) -> None:
        with pytest.raises(error, match=line) as caught:
            convert(folder / "source", folder / "target")
        assert "\n" not in str(caught.value)
        assert not list(folder.glob("target*"))

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        save(tmp_path / "source")
        (tmp_path / "source" / SHARD).unlink()
        self.refused(tmp_path, rf"lacks 1 of 3 shards \({SHARD}, ...\); fetch them")

    def test_a_shard_that_is_cut_off(self, tmp_path: Path) -> None:
        save(tmp_path / "source")
        path = tmp_path / "source" / SHARD
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(tmp_path, rf"{SHARD} is damaged: its header tells of [\d,]+ bytes", FileFormatError)

    def test_a_tensor_of_another_shape(self, tmp_path: Path) -> None:
        weights, _ = save(tmp_path / "source")
        save_shards(tmp_path / "source", weights | {QKV: weights[QKV][:-1].contiguous()}, 3)
        self.refused(tmp_path, rf"{QKV} is 127 x 32, and by config.json it should be 128 x 32")

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        weights, _ = save(tmp_path / "source")
        del weights[QKV]
        save_shards(tmp_path / "source", weights, 3)
        self.refused(tmp_path, rf"{QKV} and 0 other tensors that config.json asks for are in no shard")

    def test_a_tensor_too_many(self, tmp_path: Path) -> None:
        weights, _ = save(tmp_path / "source")
        extra = "transformer.prefix_encoder.embedding.weight"
        save_shards(tmp_path / "source", weights | {extra: torch.ones(4)}, 3)
        self.refused(tmp_path, f"holds {extra}, which a ChatGLM of config.json's sizes does not have")

    def test_a_tensor_in_two_shards(self, tmp_path: Path) -> None:
        weights, _ = save(tmp_path / "source")
        path = tmp_path / "source" / "model-00003-of-00003.safetensors"
        save_file(load_file(path) | {QKV: weights[QKV]}, path)
        self.refused(tmp_path, rf"{QKV} is in model-0000\d-of-00003.safetensors and in model-00003")

    def test_pickled_weights(self, tmp_path: Path) -> None:
        save(tmp_path / "source", shards=1)
        (tmp_path / "source" / "model.safetensors").unlink()
        self.refused(tmp_path, "holds no weights; expected model.safetensors.index.json")
        (tmp_path / "source" / "pytorch_model-00001-of-00007.bin").write_bytes(b"\x80")
        self.refused(
            tmp_path, r"pickled weights alone \(pytorch_model-00001-of-00007.bin\).*fetch the model's safetensors"
        )

    def test_a_tokenizer_of_another_model(self, tmp_path: Path) -> None:
        save(tmp_path / "source", padded_vocab_size=400)
        self.refused(tmp_path, "has 429 tokens with the special ones, and the model an embedding of 400 rows")

    def test_a_missing_tokenizer(self, tmp_path: Path) -> None:
        save(tmp_path / "source")
        (tmp_path / "source" / "tokenizer.model").unlink()
        self.refused(tmp_path, "tokenizer.model does not exist; fetch the checkpoint's tokenizer")

    def test_a_target_that_exists(self, tmp_path: Path) -> None:
        save(tmp_path / "source")
        (tmp_path / "target").mkdir()
        with pytest.raises(ArgumentError, match=r"target exists already; name another folder, or delete it"):
            convert(tmp_path / "source", tmp_path / "target")
        assert not list((tmp_path / "target").iterdir())

    def test_a_half_converted_folder(self, tmp_path: Path) -> None:
        save(tmp_path / "source")
        half = tmp_path / "target.half-converted"
        half.mkdir()
        with pytest.raises(ArgumentError, match=r"target.half-converted is half-converted: a conversion to"):
            convert(tmp_path / "source", tmp_path / "target")
        for verb in (convert, convert_back):
            with pytest.raises(ArgumentError, match="is half-converted: the conversion that made it was stopped"):
                verb(half, tmp_path / "new")

    @pytest.mark.parametrize("name", ["../b.safetensors", "..", "", None, ["b.safetensors"]])
    def test_an_index_that_leads_elsewhere(self, name: object, tmp_path: Path) -> None:
        save(tmp_path / "source")
        index = tmp_path / "source" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}), "utf-8")
        self.refused(tmp_path, "names no shards in its own folder", FileFormatError)

    @pytest.mark.parametrize(("text", "line"), [("{", "is no JSON"), ("[]", "is a JSON list; expected an object")])
    def test_a_config_that_is_damaged(self, text: str, line: str, tmp_path: Path) -> None:
        save(tmp_path / "source")
        (tmp_path / "source" / "config.json").write_text(text, "utf-8")
        self.refused(tmp_path, line, FileFormatError)


class TestInterrupted:
    def test_an_error_on_the_way_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path / "source")
        whole = chatglm.rewrite

        def stopped(source: Path, *args: Any, **options: Any) -> Any:
            if source.name == SHARD:
                raise KeyboardInterrupt
            return whole(source, *args, **options)

        monkeypatch.setattr(chatglm, "rewrite", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "source", tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_killed_process_leaves_a_folder_that_says_so(self, tmp_path: Path) -> None:
        save(tmp_path / "source")
        code = """if True:
            import os, signal, sys
            from pathlib import Path
            from lococo.convert import chatglm

            def killed(done, total):
                os.kill(os.getpid(), signal.SIGKILL)

            chatglm.convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=killed)
        """
        target = tmp_path / "target"
        call = [sys.executable, "-c", code, str(tmp_path / "source"), str(target)]
        assert subprocess.run(call, capture_output=True, timeout=120, check=False).returncode == -9
        assert not target.exists()
        assert (tmp_path / "target.half-converted").is_dir()
        with pytest.raises(ArgumentError, match="is half-converted"):
            convert(tmp_path / "source", target)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process holds")
def test_a_shard_is_never_in_memory(tmp_path: Path) -> None:
    # One shard of 146 MiB, nearly all of it the two embeddings, in a process of its own that is watched from inside.
    # The most that a process ever held, as the system tells it, would include what its parent held.
    save(tmp_path / "source", shards=1, padded_vocab_size=400_000, hidden_size=48, num_layers=1)
    shard = (tmp_path / "source" / "model.safetensors").stat().st_size
    assert shard > 140 << 20
    code = """if True:
        import resource, sys, threading
        from pathlib import Path
        from lococo.convert import chatglm, tokenizer

        def held():
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        def watch():
            while not done.wait(0.001):
                samples.append(held())

        tokenizer.glm_tokenizer(Path(sys.argv[1]), "chatglm3", 1 << 20)  # what it imports is no part of this
        samples, done = [held()], threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        chatglm.convert(Path(sys.argv[1]), Path(sys.argv[2]))
        chatglm.convert_back(Path(sys.argv[2]), Path(sys.argv[3]))
        done.set()
        watcher.join()
        print(max(samples) - samples[0], len(samples))
    """
    folders = [str(tmp_path / name) for name in ("source", "target", "back")]
    call = [sys.executable, "-c", code, *folders]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True)
    more, samples = map(int, done.stdout.split())
    assert samples > 20
    assert more < shard / 4
