"""Help, flags and every bad input of the command line, in-process, on a tiny random model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SMALL, WORDS, refused, tokenizer_of
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from lococo import cli, session
from lococo.options import SlotOptions


class TestHelp:
    def test_the_first_page_lists_every_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--help"]) == 0
        page = capsys.readouterr().out
        verbs = "demo,run,compress,ask,chat,inspect,serve,train,extend,merge,ablate,eval,report,bench,plan,convert"
        assert page.startswith(f"usage: lococo [-h] [--version] {{{verbs}}} ...")
        assert "  eval perplexity   Measure what compression costs" in page

    def test_no_words_are_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 0
        assert "usage: lococo" in capsys.readouterr().out

    def test_a_group_lists_its_verbs(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["eval"]) == 0
        assert capsys.readouterr().out.startswith(
            "usage: lococo eval [-h] {perplexity,positions,needle,suite,inside} ..."
        )

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
            (["run", "x", "--ask", "caf\udce9?"], "the question is not UTF-8"),  # a byte 0xe9 on the command line
            (["ask", "x", "caf\udce9?"], "the question is not UTF-8"),
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


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from lococo.cli import main; sys.exit(main(['run', '--help']))"
    shell = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, cli.BROKEN_PIPE)


def test_one_value_where_several_may_stand_in_a_config(tmp_path, capsys):
    config = tmp_path / "recipe.yaml"
    for line in ("num_slots: 64", "data: texts"):
        config.write_text(line)
        said = refused(["train", "-o", str(tmp_path / "out"), "--config", str(config)], capsys)
        assert "put it into brackets, such as num_slots: [64]" in said
    config.write_text("")
    assert "expected lines such as num_slots: [64]" in refused(["train", "-o", "out", "--config", str(config)], capsys)
