"""The verb `convert`, in-process, on a tiny random checkpoint."""

import json
from pathlib import Path

import pytest
from chatglm_checkpoints import save
from commands import refused

from lococo import cli


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "source")
    return tmp_path / "source"


def test_there_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, back = str(tmp_path / "glm"), str(tmp_path / "back")
    assert cli.main(["convert", "chatglm3", str(source), target]) == 0
    assert f"3 shards of chatglm3, 208 KiB, saved for GLM in {target}" in capsys.readouterr().out
    assert cli.main(["convert", "chatglm3", target, back, "--back", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["path"], result["shards"], result["family"]) == (back, 3, "chatglm3")
    assert result["config"]["model_type"] == "chatglm"
    assert "saved for ChatGLM in" in said.err
    assert {path.name: path.read_bytes() for path in source.iterdir()} == {
        path.name: path.read_bytes() for path in Path(back).iterdir()
    }


def test_a_folder_that_was_converted_is_read(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "chatglm3", str(source), str(tmp_path / "glm")]) == 0
    book = tmp_path / "book.txt"
    book.write_text("The quick brown fox jumps. " * 30, "utf-8")
    capsys.readouterr()
    words = ["run", str(book), "--ask", "Who?", "--model", str(tmp_path / "glm"), "--num-slots", "32"]
    assert cli.main([*words, "--chunk-size", "16", "--max-new-tokens", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] > 100
    # 2 layers, keys and values, 2 heads of 16 floats
    assert result["kv_nbytes"] == 2 * 2 * 2 * 16 * 4 * (32 + 16)


def test_the_family_may_be_said(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "chatglm3", str(source), str(tmp_path / "glm")]
    assert cli.main([*words, "--family", "chatglm2", "--json"]) == 0
    rope = json.loads(capsys.readouterr().out)["config"]["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 1e4, "factor": 50.0, "partial_rotary_factor": 0.5}
    line = refused([*words, "--family", "chatglm2", "--back"], capsys)
    assert "--family chatglm2 is for converting, and --back knows the family" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["none", "x"], "none does not exist; expected a folder with a checkpoint"),
        (["source", "source"], "source exists already; name another folder"),
        (
            ["source", "x", "--family", "glm"],
            "--family: expected one of 'auto', 'chatglm2', 'chatglm3', 'glm-4', got glm",
        ),
        (["source", "x", "--back"], "source has no chatglm.json"),
        (["source", "none/x"], "none/x.half-converted: No such file or directory"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: list[str],
    line: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert line in refused(["convert", "chatglm3", *words], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
