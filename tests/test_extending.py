"""`lococo extend` and `lococo merge`, and what they make as `--model` of the other commands, on a tiny random model."""

import json
from pathlib import Path

import pytest
from commands import SLOTS, SMALL, WORDS, refused, save_llama

from lococo import cli, tuned
from lococo.eval.positions import summary

TUNE = ["--num-slots", "24", "--chunk-size", "16", "--length", "64", "--steps", "2", "--held-out-windows", "1"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for domain in ("books", "web"):
        for part in ("train", "val"):
            (folder / domain / part).mkdir(parents=True)
            for number in range(3):
                (folder / domain / part / f"{number}.txt").write_text(f"{domain} {number} " + WORDS * 20, "utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: str, texts: Path) -> Path:
    folder = tmp_path_factory.mktemp("made") / "long"
    words = ["extend", "--model", tiny, "--data", str(texts), "-o", str(folder), "--compressor", "fresh", *TUNE]
    assert cli.main(words) == 0
    return folder


RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("extend-*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_can_be_read(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(RECIPES) == 5
    assert f"--config recipes/{file.name}" in file.read_text()
    cli.main(["extend", "--config", str(file), "-o", "long", "--print_config"])
    printed = capsys.readouterr().out
    for line in file.read_text().splitlines():
        if line.startswith(("steps", "rope", "compressor", "length")):
            assert line in printed


def test_a_tuned_folder_is_a_model_to_every_command(
    made: Path, book: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(made)]
    assert cli.main(["run", str(book), "--ask", "Who?", *model, *SMALL, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["model"] == "long"
    assert figures["compressor"] == str(made / "heads")
    context = str(tmp_path / "book.safetensors")
    assert cli.main(["compress", str(book), "-o", context, *model, *SLOTS]) == 0
    assert cli.main(["ask", context, "Who?", *model, "--max-new-tokens", "2"]) == 0
    rows = str(tmp_path / "rows.jsonl")
    words = ["eval", "perplexity", "--data", str(texts), "--compressor", "auto", "--max-length", "64", "--json", rows]
    assert cli.main([*words, *model, *SLOTS, "--max-windows", "1"]) == 0
    assert cli.main(["plan", *model, "--context", "1024", *SLOTS]) == 0
    capsys.readouterr()


def test_models_are_compared_by_place_in_the_text(
    made: Path, tiny: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "eval",
        "positions",
        "--data",
        str(texts),
        "--compressor",
        "auto",
        "full",
        "--lengths",
        "128",
        "256",
        "512",
    ]
    words += ["--model", tiny, "--models", str(made), *SLOTS, "--max-documents", "2"]
    target, picture = tmp_path / "rows.jsonl", tmp_path / "plot.svg"
    assert cli.main([*words, "--json", str(target), "--plot", str(picture)]) == 0
    assert "books: nats per token" in capsys.readouterr().out
    rows = summary([json.loads(line) for line in target.read_text().splitlines()])
    # The full cache ends with the window of 256.
    read = {(row["model"], row["compressor"], row["length"]): row["nll"] for row in rows if row["domain"] == "web"}
    kinds = [("auto", 128), ("auto", 256), ("auto", 512), ("full", 128), ("full", 256)]
    assert list(read) == [(model, *kind) for model in (Path(tiny).name, "long") for kind in kinds]
    assert read[Path(tiny).name, "auto", 512] != read["long", "auto", 512]
    assert picture.stat().st_size > 5000


def test_a_merged_model_answers_as_the_tuned_one(
    made: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "shipped", lambda: {"Tuned-32K": made})
    assert cli.main(["merge", "Tuned-32K", "-o", str(tmp_path / "whole"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "whole")}
    answers = []
    for model in (made, tmp_path / "whole"):
        assert cli.main(["run", str(book), "--ask", "Who?", "--model", str(model), *SMALL, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]


def test_a_tuned_model_is_tuned_further(made: Path, texts: Path, tmp_path: Path) -> None:
    heads = ["--compressor", str(made / "heads")]
    words = ["extend", "--model", str(made), "--data", str(texts), "-o", str(tmp_path / "longer"), *heads, *TUNE]
    assert cli.main(words) == 0
    record = json.loads((tmp_path / "longer" / "lococo.json").read_text())
    assert record["base_model"]["name"] == str(made)
    assert cli.main(["merge", str(tmp_path / "longer"), "-o", str(tmp_path / "whole")]) == 0


def test_what_is_refused(
    made: Path, tiny: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["extend", "--model", tiny, "--data", str(texts), "-o", str(tmp_path / "new"), *TUNE]
    assert "holds a tuned model already" in refused([*words, "-o", str(made)], capsys)
    assert "multiple of the chunk_size of 16, got 70" in refused([*words, "--length", "70"], capsys)
    assert "no layers named query" in refused([*words, "--lora-targets", "query"], capsys)
    assert "fit the model's 256" in refused([*words, "--rope", "linear"], capsys)
    assert "the longest has" in refused([*words, "--length", "160000"], capsys)
    assert "did you mean 'h2o'" in refused([*words, "--compressor", "h2oo"], capsys)
    assert "--rope: expected one of" in refused([*words, "--rope", "dynamic"], capsys)
    other = save_llama(tmp_path / "other", seed=1)
    capsys.readouterr()
    assert "is no tuned model" in refused(["merge", other, "-o", str(tmp_path / "whole")], capsys)
    assert not (tmp_path / "new").exists()
