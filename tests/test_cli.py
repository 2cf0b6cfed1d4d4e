"""Every verb of the command line and every bad input, in-process, on a tiny random model."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SLOTS, SMALL, WORDS, refused, save_llama, tokenizer_of
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lococo import cli, reader, session
from lococo.options import SlotOptions
from lococo.prompts import Prompt, text_stream


@pytest.fixture
def context(tiny: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "ctx.safetensors"
    assert cli.main(["compress", str(book), "-o", str(path), "--model", tiny, *SLOTS]) == 0
    capsys.readouterr()
    return path


class TestHelp:
    def test_the_first_page_lists_every_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--help"]) == 0
        page = capsys.readouterr().out
        assert page.startswith(
            "usage: lococo [-h] [--version] {demo,run,compress,ask,chat,inspect,train,ablate,eval,report,bench} ..."
        )
        assert "  eval perplexity   Measure what compression costs" in page

    def test_no_words_are_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 0
        assert "usage: lococo" in capsys.readouterr().out

    def test_a_group_lists_its_verbs(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["eval"]) == 0
        assert capsys.readouterr().out.startswith("usage: lococo eval [-h] {perplexity,needle,suite,inside} ...")

    @pytest.mark.parametrize("verb", cli.VERBS)
    def test_every_flag_is_explained(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*verb.split(), "--help"]) == 0
        page = " ".join(capsys.readouterr().out.split())
        flags = [name.replace("_", "-") for name in cli.flag_names(cli.VERBS[verb])]
        for flag in flags:
            assert re.search(rf"--{flag}(, --no-{flag})?( [A-Z{{][^ ]*)?( \[[A-Z]+ \.\.\.\])? [A-Z0-9a-z]", page), flag

    @pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["eval", "perplexity", "--help"], ["--version"]])
    def test_help_never_imports_torch(self, words: list[str]) -> None:
        code = f"import sys; from lococo.cli import main; main({words!r}); sys.exit('torch' in sys.modules)"
        assert (
            subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
        )

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert re.fullmatch(r"lococo \d+\.\d+\.\d+\n", capsys.readouterr().out)


class TestFlags:
    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["rum"], "no such command: 'rum'; did you mean 'run'?"),
            (["eval", "zzz"], "no such command: 'eval zzz'; see `lococo --help`"),
            (["run", "x", "--num_slots", "3", "--ask", "y"], "unrecognized arguments: --num_slots 3"),
            (["run", "x"], "the following arguments are required: --ask"),
            (["run", "x", "--ask", "y", "--num-slots", "many"], "--num-slots: expected a whole number, got many"),
            (
                ["run", "x", "--ask", "y", "--positions", "z"],
                "--positions: expected one of 'packed', 'original', got z",
            ),
            (["run", "x", "--ask", "y", "--num-slots", "0"], "--num-slots must be at least 1, got 0"),
            (["run", "x", "--ask", "y", "--chunk-size", "-4"], "--chunk-size must be at least 1, got -4"),
            (["run", "x", "--ask", "y", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
            (["run", "x", "--ask", "y", "--temperature", "-1"], "expected temperature >= 0"),
            (["run", "x", "--ask", " "], "the question is empty"),
            (["ask", "none.safetensors", "y"], "none.safetensors does not exist; expected a context"),
            (["compress", "x", "-o", "y", "--compressor", "full"], "compressor 'full' makes no slots"),
            (["run", "x", "--ask", "y", "--config", "none.yaml"], "--config: File does not exist"),
            (["inspect", "pyproject.toml", "--head", "1"], "--head 1 needs the layer it is in"),
        ],
    )
    def test_a_mistake_is_told_in_one_line(
        self, words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(Path(__file__).parent.parent)
        assert line in refused(words, capsys)

    def test_yaml_gives_flags_and_the_command_line_wins(
        self, tiny: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"model: {tiny}\nnum_slots: 24\nchunk_size: 16\nmax_new_tokens: 3\njson: true\n", "utf-8")
        assert cli.main(["run", str(book), "--ask", "Who?", "--config", str(recipe), "--num-slots", "40"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["num_slots"], result["chunk_size"]) == (40, 16)


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


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "content", "line"),
        [
            ("empty.txt", b"", "empty.txt is empty; expected some text"),
            ("blank.txt", b" \n ", "blank.txt is empty but for white space"),
            ("program", b"\x7fELF\0\0", "program is a program (ELF); expected text"),
            ("data.bin", b"abc\0def", "data.bin is binary (a NUL at byte 3)"),
            ("latin.txt", "café au lait".encode("latin-1"), "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
        ],
    )
    @pytest.mark.parametrize("verb", ["run", "compress"])
    def test_a_document_that_is_no_text(
        self, verb: str, name: str, content: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        output = tmp_path / "ctx.safetensors"
        # No model of that name exists: the document is looked at first.
        flags = ["--ask", "y"] if verb == "run" else ["-o", str(output)]
        assert line in refused([verb, str(path), *flags, "--model", "/no/model"], capsys)
        assert not output.exists()

    def test_a_bad_byte_far_into_a_long_document_leaves_no_file(
        self, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lococo.documents.PIECE_BYTES", 1000)
        path = tmp_path / "long.txt"
        path.write_bytes(b"x y z\n" * 200 + b"\xff")
        output = tmp_path / "ctx.safetensors"
        words = ["compress", str(path), "-o", str(output), "--model", tiny, "--num-slots", "32", "--chunk-size", "200"]
        assert "byte 0xff at offset 1200" in refused(words, capsys)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["long.txt"]

    def test_a_missing_document(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "none.txt: no such file" in refused(["run", "none.txt", "--ask", "y"], capsys)

    def test_a_document_shorter_than_the_slots_is_kept_whole(
        self, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "short.txt"
        path.write_text("Hi.", "utf-8")
        assert cli.main(["run", str(path), "--ask", "Who?", "--model", tiny, *SMALL]) == 0
        assert capsys.readouterr().out

    def test_original_positions_end_with_the_window(
        self, tiny: str, book: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        book.write_text(WORDS * 6, "utf-8")
        words = ["run", str(book), "--ask", "y", "--model", tiny, *SMALL]
        line = refused([*words, "--positions", "original"], capsys)
        assert "the model was trained for 256 and positions are 'original'; use --positions packed" in line
        line = refused([*words, "--compressor", "full"], capsys)
        assert "compressor 'full' keeps every position; use --compressor mass-merge" in line
        assert cli.main(words) == 0

    @pytest.mark.parametrize(
        ("flags", "line"),
        [
            (["--num-slots", "5000"], "do not fit the model's window of 256"),
            (["--chunk-size", "5000"], "do not fit the model's window of 256"),
            (["--num-slots", "8"], "needs at least 9 slots"),
            (["--num-slots", "4", "--compressor", "streaming-llm"], "needs at least 5 slots"),
            (["--compressor", "mass-murge"], "did you mean 'mass-merge'?"),
            (["--dtype", "int8"], "--dtype: expected one of"),
            (["--device", "abacus"], "device is 'abacus'; expected cpu, cuda"),
        ],
    )
    def test_settings_out_of_range(
        self, flags: list[str], line: str, tiny: str, book: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert line in refused(["run", str(book), "--ask", "y", "--model", tiny, *SMALL, *flags], capsys)

    def test_models_without_a_cache_to_compress(
        self, tmp_path: Path, book: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tokenizer = tokenizer_of(WORDS)
        mamba = MambaForCausalLM(
            MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
        )
        t5 = T5ForConditionalGeneration(
            T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        )
        for name, model, line in (
            ("mamba", mamba, "nothing to compress"),
            ("t5", t5, "t5 is an encoder-decoder model"),
        ):
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
            capsys.readouterr()
            assert line in refused(["run", str(book), "--ask", "y", "--model", str(tmp_path / name)], capsys)

    def test_no_such_model(self, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(["run", str(book), "--ask", "y", "--model", "./no/model"], capsys)
        assert "./no/model: no such file or folder" in line


@pytest.mark.parametrize("name", ["auto", "lococo", "lococo-frozen", "full"])
def test_compressors_that_the_model_decides_on_are_not_refused_before_it_is_loaded(name: str) -> None:
    session._check_compressor(SlotOptions(compressor=name))


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
        assert refused(words, capsys) == "lococo: No space left on device\n"
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
        whole = text_stream
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
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


class TestText:
    def test_half_a_character_waits_for_its_other_half(self) -> None:
        tokenizer = tokenizer_of(WORDS)
        text = "Zebras: 狐狸 🦓 naïve\n"
        ids = tokenizer(text)["input_ids"]
        pieces = list(text_stream(tokenizer, ids))
        assert "".join(pieces) == text
        assert len(pieces) > 5
        assert not any("\ufffd" in piece for piece in pieces)

    def test_what_never_becomes_a_character_is_given_at_the_end(self) -> None:
        tokenizer = tokenizer_of(WORDS)
        ids = tokenizer("ok 狐")["input_ids"][:-1]
        assert "".join(text_stream(tokenizer, ids)) == tokenizer.decode(ids)

    def test_a_prompt_is_what_the_template_makes_of_the_whole(self) -> None:
        tokenizer = tokenizer_of(WORDS)
        prompt = Prompt.of(tokenizer)
        document, question = tokenizer("The fox.")["input_ids"], prompt.question_ids("Who?", after="document")
        messages = [{"role": "user", "content": "The fox.\n\nWho?"}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt.opening_ids() + document + question[0].tolist()) == whole

    def test_special_tokens_in_a_question_are_plain_text(self) -> None:
        tokenizer = tokenizer_of(WORDS)
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        ids = Prompt.of(tokenizer).question_ids("What is <|end|>?", after="opening")[0].tolist()
        assert ids.count(end) == 1

    def test_a_model_without_a_chat_template_gets_plain_text(self) -> None:
        tokenizer = tokenizer_of(WORDS)
        tokenizer.chat_template = None
        ids = Prompt.of(tokenizer).question_ids("Who?", after="document")[0].tolist()
        assert tokenizer.decode(ids) == "\n\nQuestion: Who?\nAnswer:"


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from lococo.cli import main; sys.exit(main(['run', '--help']))"
    shell = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, cli.BROKEN_PIPE)


@pytest.mark.real_model
def test_the_real_model_answers_from_a_context(
    default_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("The capital of Atlantis is Lumira. It lies on a hill above the sea.", "utf-8")
    assert cli.main(["run", str(note), "--ask", "What is the capital of Atlantis?", "--max-new-tokens", "24"]) == 0
    assert "Lumira" in capsys.readouterr().out
