"""What every test file shares: offline libraries, one thread, the corpora and the default model."""

import os

# Before anything imports transformers: a test that reaches for the hub fails instead of waiting for it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models are slower on two threads than on one, and much slower on shared cores; so are commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the corpora: $LOCOCO_SHARED_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("LOCOCO_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder}; set LOCOCO_SHARED_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def default_model() -> tuple[Any, Any]:
    """The embedded default model and its tokenizer, loaded once; do not change them."""
    import lococo
    from lococo.errors import ModelError

    try:
        model, tokenizer = lococo.load_model()
    except ModelError as error:
        pytest.skip(f"no default model: {error}")
    return model, tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model, for the command line."""
    from commands import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text longer than the slots that the tests of the command line use."""
    from commands import WORDS

    path = tmp_path / "book.txt"
    path.write_text(WORDS * 5, encoding="utf-8")
    return path


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are caught and rewritten as always, and run as they stand: a C++ compiler takes seconds for each loop."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **settings: graph)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of their own for what is converted."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOCOCO_CACHE", str(folder))
    return folder
