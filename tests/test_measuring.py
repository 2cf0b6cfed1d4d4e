"""The verbs that train and measure, in-process, on a tiny random model."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import WORDS, refused

from lococo import cli
from lococo.results import Results


class TestPerplexity:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        for domain in ("prose", "web"):
            (tmp_path / "data" / domain).mkdir(parents=True)
            for number in range(2):
                (tmp_path / "data" / domain / f"{number}.txt").write_text(WORDS * (6 + number), "utf-8")
        return tmp_path / "data"

    def words(self, data: Path, target: Path, tiny: str) -> list[str]:
        words = ["eval", "perplexity", "--data", str(data), "--compressor", "h2o", "mass-merge", "--num-slots", "32"]
        return [
            *words,
            "--chunk-size",
            "16",
            "--max-length",
            "120",
            "--max-windows",
            "2",
            "--json",
            str(target),
            "--model",
            tiny,
        ]

    def test_data_sets_of_the_hub_are_domains(
        self, tiny: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = []

        def fetch(source: str, *, documents: int, seed: int, skip: int) -> Path:
            asked.append((source, skip))
            return data / "prose"

        monkeypatch.setattr("lococo.train.hub.fetch", fetch)
        words = self.words(data, tmp_path / "out.jsonl", tiny)
        words[3:4] = ["hf:owner/name", "hf:owner/other:part"]
        assert cli.main(words) == 0
        # Beyond the documents that a training takes.
        assert asked == [("hf:owner/name", 10_000), ("hf:owner/other:part", 10_000)]
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
        assert {row["domain"] for row in rows} == {"hf:owner/name", "hf:owner/other:part"}
        capsys.readouterr()
        words[3:5] = [str(data), "hf:owner/name"]
        assert "expected one folder, or data sets of the hub" in refused(words, capsys)

    def test_one_object_per_line(
        self, tiny: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "out.jsonl"
        assert cli.main(self.words(data, target, tiny)) == 0
        rows = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
        assert {(row["domain"], row["compressor"]) for row in rows} == {
            (domain, name) for domain in ("prose", "web") for name in ("full", "h2o", "mass-merge")
        }
        for row in rows:
            assert {
                "task",
                "domain",
                "compressor",
                "num_slots",
                "chunk_size",
                "max_length",
                "tokens",
                "nll",
                "gap",
            } <= set(row)
        assert "mass-merge" in capsys.readouterr().out
        assert not list(tmp_path.glob("*.partial"))

    def test_an_interrupted_run_keeps_the_older_result(
        self, tiny: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "out.jsonl"
        target.write_text("older\n", "utf-8")

        def evaluate(*args: Any, results: Results, **kwargs: Any) -> None:
            results.add({"domain": "prose"})
            raise KeyboardInterrupt

        monkeypatch.setattr("lococo.eval.perplexity.evaluate", evaluate)
        assert refused(self.words(data, target, tiny), capsys, 130) == "lococo: stopped\n"
        assert target.read_text("utf-8") == "older\n"
        [row] = map(json.loads, (tmp_path / "out.jsonl.partial").read_text("utf-8").splitlines())
        assert row == {"domain": "prose", "about": row["about"]}

    def test_no_such_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = self.words(tmp_path / "none", tmp_path / "out.jsonl", "/no/model")
        assert "no such folder; expected one with a subfolder per domain" in refused(words, capsys)


class TestTrain:
    @pytest.mark.parametrize("recipe", ["smollm2-135m", "redpajama", "proof-pile-2", "paper"])
    def test_the_recipes_can_be_read(self, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
        file = Path(__file__).parent.parent / "recipes" / f"{recipe}.yaml"
        cli.main(["train", "--config", str(file), "-o", "heads", "--print_config"])
        printed = capsys.readouterr().out
        for line in file.read_text().splitlines():
            if line.startswith("steps"):
                assert line in printed

    WORDS = ("--num-slots", "24", "40", "--chunk-size", "16", "--length", "120", "--steps", "2", "--accumulate", "1")

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        folder = tmp_path / "texts" / "prose"
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.txt").write_text(f"{number} " + WORDS * 5, encoding="utf-8")
        return tmp_path / "texts"

    def test_trained_heads_read(
        self, tiny: str, data: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        heads = tmp_path / "heads"
        flags = [
            "--data",
            str(data),
            "-o",
            str(heads),
            "--model",
            tiny,
            *self.WORDS,
            "--learned-scores",
            "--score-windows",
            "3",
            "--json",
        ]
        assert cli.main(["train", *flags, "--calibrate-at", "24"]) == 0
        said = capsys.readouterr()
        figures = json.loads(said.out)
        assert figures["held_out"].keys() == {"24", "40"}
        assert figures == json.loads((heads / "config.json").read_text())["training"]
        assert "loss on held-out text" in said.err
        words = ["run", str(book), "--ask", "Who?", "--model", tiny, "--max-new-tokens", "3", "--json"]
        assert cli.main([*words, "--compressor", str(heads), "--num-slots", "30", "--chunk-size", "16"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["compressor"], result["num_slots"]) == (str(heads), 30)
        assert "holds heads already" in refused(["train", *flags], capsys)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--data", "nowhere"], "--data nowhere: no such folder"),
            (["--data", "EMPTY"], "expected text to train on"),
            (["--data", "SHORT"], "found hardly any; train with fewer slots"),
            (["--data", "DATA", "--kernel-size", "4"], "expected an odd kernel_size, got 4"),
            (["--data", "DATA", "--length", "40"], "raise length to 72 or more"),
            (["--data", "DATA", "--steps", "0"], "expected steps to be at least 1, got 0"),
            (["--data", "DATA", "--save-every", "0"], "--save-every must be at least 1"),
            (["--data", "DATA", "--no-learned-merge", "--no-train-norms"], "nothing is left to train but scores"),
        ],
    )
    def test_bad_input(
        self,
        tiny: str,
        data: Path,
        tmp_path: Path,
        words: list[str],
        message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "short").mkdir()
        (tmp_path / "short" / "a.txt").write_text("few words")
        places = {"DATA": str(data), "EMPTY": str(tmp_path / "empty"), "SHORT": str(tmp_path / "short")}
        words = [places.get(word, word) for word in words]
        few = ["--score-windows", "1", "--calibrate-at"]
        assert message in refused(
            ["train", "-o", str(tmp_path / "out"), "--model", tiny, *self.WORDS, *few, *words], capsys
        )
        assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("empty", ["data", "compressor", "lengths"])
@pytest.mark.parametrize("verb", ["eval perplexity", "eval needle", "eval positions", "eval inside", "bench"])
def test_an_empty_list_in_a_recipe_is_named(
    verb: str, empty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, text = tmp_path / "recipe.json", tmp_path / "texts" / "a.txt"
    text.parent.mkdir()
    text.write_text(WORDS)
    takes = {
        "eval perplexity": ["data", "compressor"],
        "eval needle": ["compressor", "lengths"],
        "eval positions": ["data", "compressor", "lengths"],
        "eval inside": ["compressor"],
        "bench": ["compressor", "lengths"],
    }[verb]
    if empty not in takes:
        return
    given: dict[str, Any] = {"data": [str(text.parent)], "compressor": ["h2o"], "lengths": [10]}
    recipe.write_text(json.dumps({name: given[name] for name in takes} | {empty: []}))
    words = [*verb.split(), *([str(text)] if verb == "eval inside" else []), "--config", str(recipe)]
    words += ["--data", str(text.parent)] if verb == "eval needle" else []
    line = refused([*words, "--json", str(tmp_path / "a.jsonl"), "--model", "nowhere/model"], capsys)
    assert f"--{empty} is empty; name one or more" in line
