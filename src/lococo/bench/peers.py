"""What one would use in place of slots: other caches of transformers, kvpress and llama.cpp.

`python -m lococo.bench.peers` installs the last two: llama-cpp-python is compiled for this environment, and kvpress
gets one of its own, since it needs an older transformers. What is absent is left out of a comparison, and said so.
"""

import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lococo.bench.readers import Reader, Setting, Transformers, Work, with_full_cache, with_quantized_cache
from lococo.cached import cache_folder

INSTALL = "install it with `python -m lococo.bench.peers`"

# Bytes of a number in llama.cpp's caches; 32 numbers of 8 bits share a scale of 16.
GGML_BYTES = {"f16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Peer:
    """A way of reading that is not ours.

    Attributes:
        opened: Opens its reader.
        needs: Package that it needs, "" for none.
        apart: Whether that package lives in an environment of its own.
        batches: Whether it reads several rows side by side.
    """

    opened: Callable[[Setting], AbstractContextManager[Reader]]
    needs: str = ""
    apart: bool = False
    batches: bool = True

    def absent(self) -> str:
        """Say why it cannot be measured here; "" if it can."""
        if self.apart:  # its environment may be there without it, if an installation was interrupted
            of_its_own = environment(self.needs)
            packages = [*of_its_own.glob("lib/python*/site-packages"), of_its_own / "Lib" / "site-packages"]
            there = any((folder / self.needs).is_dir() for folder in packages)
        else:
            there = not self.needs or find_spec(self.needs) is not None
        return "" if there else f"{self.needs} is not installed; {INSTALL}"


def environment(package: str) -> Path:
    """Return the folder of the environment that a package has for itself."""
    return cache_folder() / "peers" / package


def python_of(package: str) -> Path:
    """Return the interpreter of the environment that a package has for itself."""
    windows = sys.platform == "win32"
    return environment(package) / ("Scripts/python.exe" if windows else "bin/python")


@contextmanager
def _kvpress(setting: Setting, press: str) -> Iterator[Reader]:
    """Read with kvpress, which compresses once, when it has read the whole prompt with the full cache."""
    import kvpress  # type: ignore[import-not-found, unused-ignore]
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    name = str(setting.model)
    how = {"dtype": getattr(torch, setting.dtype), "trust_remote_code": setting.trust_remote_code}
    model: Any = AutoModelForCausalLM.from_pretrained(name, **how).eval()
    if setting.device is not None:
        model = model.to(setting.device)

    class Pressed(Transformers):
        length = 0

        def inputs(self, ids: Sequence[int]) -> dict[str, Any]:
            # With their places: transformers would count the entries, most of which are gone after the prompt.
            places = torch.arange(self.length, self.length + len(ids), device=self.model.device)
            self.length += len(ids)
            return super().inputs(ids) | {"position_ids": places[None]}

        def read(self, ids: Sequence[int]) -> int:
            self.length = 0
            share = max(0.0, 1 - setting.num_slots / len(ids))
            with getattr(kvpress, press)(compression_ratio=share)(self.model):
                return super().read(ids)

    with torch.no_grad():
        yield Pressed(model, lambda: DynamicCache(config=model.config))


class LlamaCpp:
    """llama.cpp with a GGUF file."""

    device_type = "cpu"
    taken_at_once = True

    def __init__(self, llama: Any, file: Path, entry_bytes: float) -> None:
        """Take a `llama_cpp.Llama`, its file, and the bytes that it keeps per token of its context."""
        self.llama = llama
        self.file = file
        self.entry_bytes = entry_bytes

    def read(self, ids: Sequence[int]) -> int:
        """See `Reader`."""
        self.llama.reset()
        return self._forward(ids)

    def step(self, token: int) -> int:
        """See `Reader`."""
        return self._forward([token])

    def score(self, ids: Sequence[int]) -> float | None:
        """See `Reader`; not told, since logits of all tokens would be kept of the prompt as well."""
        return None

    def forget(self) -> None:
        """See `Reader`; the memory stays taken."""
        self.llama.reset()

    def _forward(self, ids: Sequence[int]) -> int:
        self.llama.eval(list(ids))
        return int(self.llama.sample(temp=0.0))

    def kv_bytes(self) -> int:
        """See `Reader`; the memory of the whole context is taken at once."""
        return int(self.llama.n_ctx() * self.entry_bytes)

    def work(self, length: int) -> Work:
        """See `Reader`; its operations are of several kinds and not counted."""
        return Work(self.file.stat().st_size, None)


@contextmanager
def _llama_cpp(setting: Setting, *, requantised: bool = False, cache: str = "f16") -> Iterator[Reader]:
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]
    import torch

    from lococo.models import gguf_file, load_config

    file = gguf_file(setting.model)
    if requantised:
        file = _as_q4_0(file)
    config: Any = load_config(setting.model)[0]
    kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[cache]
    threads = torch.get_num_threads()
    llama = llama_cpp.Llama(
        str(file),
        n_ctx=setting.length + setting.most_decoded + 1,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=kind,
        type_v=kind,
        flash_attn=True,
        verbose=False,
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    try:
        yield LlamaCpp(llama, file, numbers * GGML_BYTES[cache])
    finally:
        llama.close()


def _as_q4_0(file: Path) -> Path:
    """Return a GGUF file with its weights in Q4_0, made once."""
    import llama_cpp

    from lococo.cached import cached_folder

    def fill(folder: Path, work: Path) -> None:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        options.allow_requantize = True
        target = str(folder / file.name).encode()
        if llama_cpp.llama_model_quantize(str(file).encode(), target, options):
            raise RuntimeError(f"llama.cpp cannot requantise {file.name}")

    return cached_folder(f"{file.stem}-q4_0", f"requantising {file.name}", fill) / file.name


PEERS: dict[str, Peer] = {
    "full": Peer(with_full_cache),
    "full-chunked": Peer(partial(with_full_cache, chunked=True)),
    "quantized-fp8": Peer(partial(with_quantized_cache, backend="fp8")),
    "kvpress-snapkv": Peer(partial(_kvpress, press="SnapKVPress"), "kvpress", apart=True, batches=False),
    "kvpress-expected-attention": Peer(
        partial(_kvpress, press="ExpectedAttentionPress"), "kvpress", apart=True, batches=False
    ),
    "llama.cpp": Peer(_llama_cpp, "llama_cpp", batches=False),
    "llama.cpp-q8": Peer(partial(_llama_cpp, cache="q8_0"), "llama_cpp", batches=False),
    "llama.cpp-q4_0": Peer(partial(_llama_cpp, requantised=True), "llama_cpp", batches=False),
    "llama.cpp-q4_0-q8": Peer(partial(_llama_cpp, requantised=True, cache="q8_0"), "llama_cpp", batches=False),
}


def install() -> int:
    """Install llama-cpp-python here and kvpress beside; needs a C++ compiler, CMake, and some minutes.

    Returns:
        0; another number if one could not be installed, which does not keep the other from it.
    """
    from importlib.metadata import version

    pip = ["-m", "pip", "install", "--quiet"]
    first = subprocess.run([sys.executable, *pip, "llama-cpp-python"], check=False)
    folder = environment("kvpress")
    venv.create(folder, with_pip=True, clear=True)
    python = str(python_of("kvpress"))
    torch = f"torch=={version('torch').partition('+')[0]}"
    second = subprocess.run([python, *pip, torch, "kvpress"], check=False)
    return first.returncode or second.returncode


if __name__ == "__main__":
    sys.exit(install())
