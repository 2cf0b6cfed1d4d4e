"""The verbs that read and answer, in-process, on a tiny random model."""

import io
import json
import os
import re
import signal
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SLOTS, SMALL, WORDS, refused, save_llama, tokenizer_of

from lococo import cli, reader
from lococo.prompts import text_stream


@pytest.fixture
def context(tiny: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "ctx.safetensors"
    assert cli.main(["compress", str(book), "-o", str(path), "--model", tiny, *SLOTS]) == 0
    capsys.readouterr()
    return path


class TestRun:
    def test_the_answer_is_on_stdout_and_the_figures_on_stderr(
        self, tiny: str, book: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["run", str(book), "--ask", "Who?", "--model", tiny, *SMALL]) == 0
        said = capsys.readouterr()
        assert said.out.strip()
        assert re.search(r"read [\d,]+ tokens at [\d,]+ tokens/s in 32 slots \(mass-merge\): \d+ KiB", said.err)

    def test_json_is_the_last_line_of_stdout(self, tiny: str, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["run", str(book), "--ask", "Who?", "--model", tiny, *SMALL, "--json"]) == 0
        said = capsys.readouterr()
        result = json.loads(said.out)
        assert result["answer"] in said.err
        tokens = len(tokenizer_of(WORDS)(WORDS * 5)["input_ids"])
        assert tokens < result["tokens"] < tokens + 10  # and the opening of the turn
        # 2 layers, keys and values, 2 heads of 8 floats
        assert result["full_kv_nbytes"] == 2 * 2 * 2 * 8 * 4 * result["tokens"]
        assert result["kv_nbytes"] == 2 * 2 * 2 * 8 * 4 * (32 + 16)

    def test_enough_slots_answer_like_the_full_cache(
        self, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        short = tmp_path / "short.txt"
        short.write_text(WORDS, "utf-8")
        answers = []
        for flags in (["--compressor", "full"], ["--num-slots", "128", "--chunk-size", "16"]):
            assert cli.main(["run", str(short), "--ask", "Who?", "--model", tiny, *flags, "--max-new-tokens", "8"]) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1]

    def test_several_files_are_read_in_order_under_their_names(
        self, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in "ab":
            (tmp_path / f"{name}.md").write_text(f"This is {name}.", "utf-8")
        files = [str(tmp_path / "a.md"), str(tmp_path / "b.md")]
        path = tmp_path / "ctx.safetensors"
        assert cli.main(["compress", *files, "-o", str(path), "--model", tiny, *SLOTS]) == 0
        from lococo.inspect_context import decode
        from lococo.options import ModelOptions
        from lococo.session import resumed

        with resumed(path, ModelOptions(model=tiny)) as (session, _, ids, _):
            text = decode(session.tokenizer, ids.tolist()).replace("⏎", "\n")
        assert text == f"<|start|>user\n# {files[0]}\n\nThis is a.\n\n# {files[1]}\n\nThis is b."

    def test_standard_input(
        self, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WORDS.encode()), encoding="utf-8"))
        assert cli.main(["run", "-", "--ask", "Who?", "--model", tiny, *SMALL]) == 0
        assert "tokens/s" in capsys.readouterr().err

    def test_a_seed_repeats_a_sampled_answer(self, tiny: str, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def answer(seed: str) -> str:
            flags = ["--temperature", "2", "--top-p", "0.9", "--seed", seed]
            assert cli.main(["run", str(book), "--ask", "Who?", "--model", tiny, *SMALL, *flags]) == 0
            return capsys.readouterr().out

        assert answer("1") == answer("1")
        assert len({answer(str(seed)) for seed in range(3)}) > 1

    @pytest.mark.parametrize("budget", ["pyramid", "calibrated"])
    def test_budgets_keep_the_total(
        self, budget: str, tiny: str, book: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lococo.budgets.CALIBRATION_TOKENS", 100)
        monkeypatch.setenv("LOCOCO_CACHE", str(book.parent / "cache"))
        words = [
            "run",
            str(book),
            "--ask",
            "Who?",
            "--model",
            tiny,
            *SMALL,
            "--num-slots",
            "40",
            "--budget",
            budget,
            "--json",
        ]
        assert cli.main(words) == 0
        assert json.loads(capsys.readouterr().out)["num_slots"] == 40


class TestCompressAndAsk:
    def test_asking_a_context_is_asking_the_document(
        self, tiny: str, book: Path, context: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = context.read_bytes()
        answers = []
        for words in (["ask", str(context), "Who?"], ["run", str(book), "--ask", "Who?", *SLOTS]):
            assert cli.main([*words, "--model", tiny, "--max-new-tokens", "8", "--json"]) == 0
            answers.append(json.loads(capsys.readouterr().out)["answer"])
        assert answers[0] == answers[1] != ""
        assert context.read_bytes() == before

    def test_the_figures(self, tiny: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "a.safetensors"
        assert cli.main(["compress", str(book), "-o", str(path), "--model", tiny, *SLOTS, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["path"] == str(path)
        assert result["nbytes"] == path.stat().st_size

    def test_an_older_file_is_replaced_only_with_force(
        self, tiny: str, book: Path, context: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = context.read_bytes()
        words = ["compress", str(book), "-o", str(context), "--model", tiny, *SLOTS[:2], "--chunk-size", "8"]
        assert "exists already; choose another name, or replace it with --force" in refused(words, capsys)
        assert context.read_bytes() == before
        assert cli.main([*words, "--force"]) == 0
        assert context.read_bytes() != before

    @pytest.mark.parametrize("place", ["missing/ctx", "."])
    def test_an_output_that_cannot_be_written(
        self, place: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["compress", str(book), "-o", str(tmp_path / place), "--model", "/no/model"]
        assert re.search("no such folder|is a folder", refused(words, capsys))

    def test_a_full_disk_is_one_line_and_leaves_nothing(
        self, tiny: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        words = ["compress", str(book), "-o", str(tmp_path / "ctx"), "--model", tiny, *SLOTS]
        assert refused(words, capsys) == f"lococo: {tmp_path / 'ctx'}: No space left on device\n"
        assert [p.name for p in tmp_path.iterdir()] == ["book.txt"]

    def test_interrupting_a_long_read_leaves_no_file(
        self, tiny: str, book: Path, context: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = context.read_bytes()
        whole = reader.read

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            for number, piece in enumerate(whole(*args, **kwargs)):
                if number == 3:
                    raise KeyboardInterrupt
                yield piece

        monkeypatch.setattr(reader, "read", interrupted)
        new = context.with_name("new.safetensors")
        for flags in (["-o", str(new)], ["-o", str(context), "--force"]):
            words = ["compress", str(book), *flags, "--model", tiny, *SLOTS]
            assert refused(words, capsys, 130) == "lococo: stopped\n"
        assert context.read_bytes() == before
        assert sorted(p.name for p in context.parent.iterdir()) == ["book.txt", "ctx.safetensors"]

    @pytest.mark.parametrize("verb", [["ask", "Who?"], ["inspect"], ["chat"]])
    @pytest.mark.parametrize("damage", ["cut", "noise", "text", "other tensors"])
    def test_a_damaged_context(
        self, damage: str, verb: list[str], tiny: str, context: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from safetensors.torch import save

        data = context.read_bytes()
        context.write_bytes(
            {
                "cut": data[: len(data) // 2],
                "noise": os.urandom(500),
                "text": b"Hello!",
                "other tensors": save({"x": torch.ones(3)}),
            }[damage]
        )
        place = ["--context", str(context)] if verb == ["chat"] else [str(context)]
        line = refused([verb[0], *place, *verb[1:], "--model", tiny], capsys)
        assert "ctx.safetensors is damaged" in line

    def test_a_context_of_another_model_or_tokenizer(
        self, context: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        deeper = save_llama(tmp_path / "deeper", layers=3)
        capsys.readouterr()
        line = refused(["ask", str(context), "Who?", "--model", deeper], capsys)
        assert "tiny" in line
        assert "deeper" in line
        other = save_llama(tmp_path / "other", words="Entirely different words, so that other pairs are merged. " * 9)
        capsys.readouterr()
        line = refused(["ask", str(context), "Who?", "--model", other], capsys)
        assert "was made" in line

    def test_a_model_that_is_not_found_by_name_is_asked_for(
        self, context: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = refused(["ask", str(context), "Who?"], capsys)
        assert "was made with the model tiny, which is not found under that name; say where it is with --model" in line


class TestChat:
    def talk(self, words: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return cli.main(["chat", "--max-new-tokens", "6", *words])

    def test_turns_go_into_the_same_slots(
        self, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        typed = "Hello!\n\n/stats\n" + "And then?\n" * 9 + "/stats\n/quit\nnever read\n"
        assert self.talk(["--model", tiny, *SLOTS], typed, monkeypatch) == 0
        first, last = re.findall(r"([\d,]+) tokens so far in 32 slots: (\d+ KiB) of keys", capsys.readouterr().out)
        assert int(last[0]) > 4 * int(first[0])
        assert first[1] == last[1]

    def test_a_conversation_reads_what_the_template_says(
        self, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []
        whole = reader.read

        def noted(model: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
            for piece in whole(model, ids, *args, **kwargs):
                read.extend(piece.ids[0].tolist())
                yield piece

        monkeypatch.setattr(reader, "read", noted)
        assert self.talk(["--model", tiny, *SLOTS], "Hello!\nBye!\n", monkeypatch) == 0
        tokenizer = tokenizer_of(WORDS)
        # An answer may hold the model's random special tokens, which are not shown.
        said = tokenizer.decode(read)
        start = "<|start|>user\nHello!<|end|>\n<|start|>assistant\n"
        assert said.startswith(start)
        assert "<|end|>\n<|start|>user\nBye!<|end|>\n<|start|>assistant\n" in said[len(start) :]

    def test_piped_lines_with_a_stray_byte_are_all_answered(
        self, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\nt\xffo\n/stats\n"), encoding="utf-8"))
        assert cli.main(["chat", "--max-new-tokens", "2", "--model", tiny, *SLOTS]) == 0
        assert "tokens" in capsys.readouterr().out

    def test_it_begins_from_a_context(
        self, tiny: str, context: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.talk(["--context", str(context), "--model", tiny], "Who?\n", monkeypatch) == 0
        chatted = capsys.readouterr().out
        assert cli.main(["ask", str(context), "Who?", "--model", tiny, "--max-new-tokens", "6"]) == 0
        assert capsys.readouterr().out == chatted

    def test_interrupting_an_answer_stops_that_answer_alone(
        self, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, before = text_stream, signal.getsignal(signal.SIGINT)
        turns = []

        def interrupted(*args: Any) -> Any:
            turns.append(1)
            for piece in whole(*args):
                if len(turns) == 1:
                    signal.raise_signal(signal.SIGINT)
                yield piece

        monkeypatch.setattr("lococo.session.text_stream", interrupted)
        assert self.talk(["--model", tiny, *SLOTS, "--max-new-tokens", "30"], "Hello!\nGo on.\n", monkeypatch) == 0
        assert len(turns) == 2
        assert capsys.readouterr().out.count("[stopped]") == 1
        assert signal.getsignal(signal.SIGINT) is before


class TestInspect:
    def test_the_table_and_the_pictures(self, tiny: str, context: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["inspect", str(context), "--model", tiny]) == 0
        said = capsys.readouterr().out
        assert "mass-merge" in said
        assert len(re.findall(r"^ +[01] \|[ ░▒▓█]+\|$", said, re.MULTILINE)) == 2
        picture = context.with_name("ctx.safetensors.svg")
        assert xml.etree.ElementTree.parse(picture).getroot().tag.endswith("svg")

    def test_json_gives_everything(self, tiny: str, context: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["inspect", str(context), "--model", tiny, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert [layer["layer"] for layer in result["layers"]] == [0, 1]
        for layer in result["layers"]:
            assert len(layer["heads"]) == 2
            for head in layer["heads"]:
                assert len(head["token_index"]) == len(head["log_mass"]) == 32
                assert head["token_index"] == sorted(set(head["token_index"]))
                assert head["token_index"][-1] < result["tokens"]

    def test_one_head(self, tiny: str, context: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["inspect", str(context), "--model", tiny, "--layer", "1", "--head", "1", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert len(result["text"]) == 32
        line = refused(["inspect", str(context), "--model", tiny, "--layer", "7"], capsys)
        assert "no layer 7 with slots; there are layers 0 to 1" in line
        line = refused(["inspect", str(context), "--model", tiny, "--layer", "1", "--head", "2"], capsys)
        assert "no key/value head 2 in layer 1; there are heads 0 to 1" in line

    def test_the_picture_replaces_only_a_picture(
        self, tiny: str, context: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drawing = context.with_name("mine.svg")
        drawing.write_text("<svg>mine</svg>", "utf-8")
        words = ["inspect", str(context), "--model", tiny, "--picture"]
        assert "mine.svg exists already" in refused([*words, str(drawing)], capsys)
        assert drawing.read_text("utf-8") == "<svg>mine</svg>"
        for _ in range(2):
            assert cli.main([*words, str(context.with_name("ours.svg"))]) == 0


@pytest.mark.real_model
def test_the_real_model_answers_from_a_context(
    default_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("The capital of Atlantis is Lumira. It lies on a hill above the sea.", "utf-8")
    assert cli.main(["run", str(note), "--ask", "What is the capital of Atlantis?", "--max-new-tokens", "24"]) == 0
    assert "Lumira" in capsys.readouterr().out
