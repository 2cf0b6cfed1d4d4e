"""The family is what the checkpoint's own files say it is."""

from pathlib import Path

import pytest
from chatglm_checkpoints import CONFIG, TOKENIZATION

from lococo.convert.family import family_of
from lococo.errors import ConversionError

BASE = "        base = base * self.rope_ratio\n"
POSITIONS = "        seq_idx = torch.arange(seq_len, dtype=dtype, device=device) / self.rope_ratio\n"


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize(("name", "divides"), [("chatglm2", True), ("chatglm3", False), ("glm-4", False)])
def test_its_tokens_tell(name: str, divides: bool, tmp_path: Path) -> None:
    family = family_of(written(tmp_path, tokenization_chatglm=TOKENIZATION[name]), {})
    assert (family.name, family.ratio_divides) == (name, divides)


@pytest.mark.parametrize(("called", "name"), [("THUDM/chatglm2-6b", "chatglm2"), ("/x/GLM-4-9b-chat", "glm-4")])
def test_its_name_tells(called: str, name: str, tmp_path: Path) -> None:
    assert family_of(tmp_path, {"_name_or_path": called}).name == name


def test_what_its_code_does_with_rope_ratio_counts_most(tmp_path: Path) -> None:
    written(tmp_path, tokenization_chatglm=TOKENIZATION["chatglm2"], modeling_chatglm=BASE)
    assert not family_of(tmp_path, CONFIG).ratio_divides
    written(tmp_path, tokenization_chatglm=TOKENIZATION["chatglm3"], modeling_chatglm=POSITIONS)
    assert family_of(tmp_path, CONFIG).ratio_divides
    assert not family_of(tmp_path, CONFIG, "chatglm3").ratio_divides  # unless the user says otherwise


def test_code_with_a_number_of_its_own_is_refused(tmp_path: Path) -> None:
    written(tmp_path, modeling_chatglm="base = base * self.ratio")
    with pytest.raises(ConversionError, match=r"scales RoPE by a number of its own \(ratio\); expected rope_ratio"):
        family_of(tmp_path, CONFIG)


def test_code_that_has_no_use_for_rope_ratio_is_refused(tmp_path: Path) -> None:
    written(tmp_path, tokenization_chatglm=TOKENIZATION["chatglm3"], modeling_chatglm="class RotaryEmbedding: pass")
    with pytest.raises(ConversionError, match=r"rope_ratio = 50, and modeling_chatglm.py beside it does not use it"):
        family_of(tmp_path, CONFIG)
    assert family_of(tmp_path, CONFIG | {"rope_ratio": 1}).name == "chatglm3"
    assert family_of(tmp_path, CONFIG, "chatglm3").name == "chatglm3"


def test_nothing_that_tells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"say it with --family chatglm2\|chatglm3\|glm-4"):
        family_of(tmp_path, {"_name_or_path": "/models/mine"})
    assert family_of(tmp_path, {}, "chatglm2").name == "chatglm2"
