"""Which of its families a ChatGLM checkpoint belongs to: all call themselves `chatglm` and mean different things.

ChatGLM2, ChatGLM3 and GLM-4 share the names of their tensors and of nearly all settings. What differs is what
`rope_ratio` does, which tokens open a turn, and the kind of tokenizer. The model's own Python files tell, and so
they are read here, as text; nothing of them is run.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from lococo.errors import ConversionError


@dataclass(frozen=True)
class Family:
    """What `chatglm` means in one family.

    Attributes:
        name: Of the family.
        ratio_divides: Whether `rope_ratio` divides positions; otherwise it multiplies the base of RoPE.
    """

    name: str
    ratio_divides: bool


FAMILIES: Final = {
    "chatglm2": Family("chatglm2", ratio_divides=True),
    "chatglm3": Family("chatglm3", ratio_divides=False),
    "glm-4": Family("glm-4", ratio_divides=False),
}
AUTO: Final = "auto"


def family_of(source: Path, config: dict[str, Any], wanted: str = AUTO) -> Family:
    """Tell the family of a checkpoint.

    Args:
        source: Its folder.
        config: Its config.json.
        wanted: The name of a family, or auto.

    Raises:
        ConversionError: If nothing in the folder tells it, or its code does what no family does.
    """
    family = FAMILIES[wanted if wanted != AUTO else _name(source, config)]
    code = _text(source / "modeling_chatglm.py")
    scaled = re.search(r"\bbase\s*=\s*base\s*\*\s*self\.(\w+)", code)
    if scaled and scaled[1] != "rope_ratio":
        raise ConversionError(
            f"{source / 'modeling_chatglm.py'} scales RoPE by a number of its own ({scaled[1]}); expected rope_ratio: "
            "put that number into config.json, and remove the file"
        )
    if wanted == AUTO and code and "rope_ratio" not in code and config.get("rope_ratio", 1) != 1:
        raise ConversionError(
            f"config.json gives rope_ratio = {config['rope_ratio']!r}, and modeling_chatglm.py beside it does not use "
            "it; take both of one model, or say what it is for with --family"
        )
    # What the code does counts more than what its family usually does.
    if wanted == AUTO and scaled:
        return replace(family, ratio_divides=False)
    if wanted == AUTO and re.search(r"\)\s*/\s*self\.rope_ratio", code):
        return replace(family, ratio_divides=True)
    return family


def _name(source: Path, config: dict[str, Any]) -> str:
    if code := _text(source / "tokenization_chatglm.py"):
        if "tiktoken" in code:
            return "glm-4"
        return "chatglm3" if "<|assistant|>" in code else "chatglm2"
    called = str(config.get("_name_or_path", "")).lower()
    for name in FAMILIES:
        if name in called:
            return name
    raise ConversionError(
        f"{source} does not tell which family it is of (no tokenization_chatglm.py, and config.json names none); "
        f"say it with --family {'|'.join(FAMILIES)}"
    )


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""
