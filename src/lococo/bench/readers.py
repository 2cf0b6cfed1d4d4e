"""Ways of reading a text that are measured against each other: slots, and what one would use in their place.

Each is opened in a process of its own (`measure.py`). kvpress lives in an environment of its own too, where of lococo
only this file, those that call it and what they import are: none of them may import torch or transformers at its top.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from lococo.cache_name import cache_name


@dataclass(frozen=True)
class Setting:
    """What one process measures.

    Attributes:
        compressor: Name of a compressor, or of a peer (`PEERS`).
        length: Tokens of the prompt.
        num_slots: Slots per layer; for kvpress, entries that stay.
        chunk_size: Tokens per forward pass.
        dtype: Of the model; llama.cpp has its file's own.
        device: Of the model; None: where it loads.
        model: See `load_model`.
        decode_tokens: Tokens decoded after the prompt; up to `most_decoded` where that takes less than two seconds.
        exact_memory: Take and give back memory in the pieces that tensors ask for. The allocator otherwise keeps what
            was freed, between 15 and 45 MiB of it from run to run, and is faster for it.
        compiled: Compile the decoding of those that read with slots.
        batch: Rows that are read side by side, all of the same prompt.
        scored_tokens: Tokens behind the prompt whose likelihood is measured.
        trust_remote_code: Run Python code that the model brings along.
    """

    compressor: str
    length: int
    num_slots: int = 512
    chunk_size: int = 256
    dtype: str = "float32"
    device: str | None = None
    model: str | None = None
    decode_tokens: int = 32
    exact_memory: bool = False
    compiled: bool = False
    batch: int = 1
    scored_tokens: int = 0
    trust_remote_code: bool = False

    @property
    def most_decoded(self) -> int:
        """How many tokens are decoded at most."""
        return 4 * self.decode_tokens


@dataclass(frozen=True)
class Work:
    """What a reader cannot do without, however fast it is.

    Attributes:
        weight_bytes: Read for every token that is decoded, beside what is kept of the text; None: unknown.
        operations: Multiplications and additions for reading the prompt, those of attention included; None: unknown.
    """

    weight_bytes: int | None
    operations: float | None


class Reader(Protocol):
    """Something that reads a prompt and goes on from it."""

    device_type: str
    # Whether the memory of what will be kept is taken when the reader is opened, so that no peak shows it.
    taken_at_once: bool

    def read(self, ids: Sequence[int]) -> int:
        """Read a prompt from nothing, and return the token that is most likely to follow."""
        ...

    def step(self, token: int) -> int:
        """Read one more token, and return the next."""
        ...

    def score(self, ids: Sequence[int]) -> float | None:
        """Read how the text goes on; return the mean nats per token, None where that is not told."""
        ...

    def forget(self) -> None:
        """Give back the memory of what was read."""
        ...

    def kv_bytes(self) -> int:
        """Return the memory of what is kept of the text."""
        ...

    def work(self, length: int) -> Work:
        """Return what a prompt of so many tokens and the tokens after it ask for at least."""
        ...


class Transformers:
    """A model of transformers and one of its caches."""

    taken_at_once = False

    def __init__(
        self, model: Any, new_cache: Callable[[], Any], *, chunk_size: int | None = None, batch: int = 1
    ) -> None:
        """Take a model and what makes an empty cache; `chunk_size` None reads a prompt in one forward pass."""
        self.model = model
        self.batch = batch
        self.device_type: str = model.device.type
        self.new_cache = new_cache
        self.chunk_size = chunk_size
        self.cache: Any = None
        self.latest: Any = None  # logits after what was read, (1 v)

    def read(self, ids: Sequence[int]) -> int:
        """See `Reader`."""
        self.cache = self.new_cache()
        size = self.chunk_size or len(ids)
        token = 0
        for start in range(0, len(ids), size):
            token = self._forward(ids[start : start + size])
        return token

    def step(self, token: int) -> int:
        """See `Reader`."""
        return self._forward([token])

    def score(self, ids: Sequence[int]) -> float | None:
        """See `Reader`."""
        import torch

        logits = torch.cat([self.latest, self._logits(ids, keep=0)])[:-1].float()
        return float(torch.nn.functional.cross_entropy(logits, self.rows(ids)[0]))

    def forget(self) -> None:
        """See `Reader`."""
        self.cache = self.latest = None

    def _forward(self, ids: Sequence[int]) -> int:
        self.latest = self._logits(ids, keep=1)
        return int(self.latest[0].argmax())

    def _logits(self, ids: Sequence[int], *, keep: int) -> Any:
        """Read tokens; return the first row's logits of so many of the last, 0: of all, (n v)."""
        inputs = self.inputs(ids) | {cache_name(self.model): self.cache}
        return self.model(**inputs, use_cache=True, logits_to_keep=keep).logits[0]

    def inputs(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return what the model is told of the tokens that follow in every row."""
        return {"input_ids": self.rows(ids)}

    def rows(self, ids: Sequence[int]) -> Any:
        """Return the same tokens for every row, (b n)."""
        import torch

        return torch.tensor([list(ids)], device=self.model.device).repeat(self.batch, 1)

    def attended(self, length: int) -> float:
        """Return how many entries a prompt's tokens attend to, on average."""
        return (length + 1) / 2

    def work(self, length: int) -> Work:
        """See `Reader`; unknown where experts take turns, and operations where layers see a part of the text."""
        config = self.model.config.get_text_config(decoder=True)
        if getattr(config, "num_experts_per_tok", None):
            return Work(None, None)
        head = self.model.get_output_embeddings().weight
        tables = {id(self.model.get_input_embeddings().weight), id(head)}
        inner = [weight for weight in self.model.parameters() if id(weight) not in tables]
        size = sum(weight.nbytes for weight in inner) + head.nbytes
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * self.attended(length)
        multiplied = sum(weight.numel() for weight in inner if weight.dim() > 1)
        if getattr(config, "sliding_window", None):
            return Work(size, None)
        return Work(size, self.batch * (length * (2 * multiplied + attention) + 2 * head.numel()))

    def kv_bytes(self) -> int:
        """See `Reader`."""
        return sum(_bytes_in(vars(layer)) for layer in self.cache.layers)


# Tokens that are handed over at a time to what reads any number of them: those of a million fill 8 MiB.
PIECE = 8192


class Slots(Transformers):
    """A model that reads with slots."""

    def attended(self, length: int) -> float:
        """Return how many entries a prompt's tokens attend to, on average: at most the slots and half a chunk."""
        if not hasattr(self.cache, "num_slots"):  # "auto", of a model that was tuned with the full cache
            return super().attended(length)
        return min(super().attended(length), float(self.cache.num_slots + self.cache.chunk_size / 2))

    def read(self, ids: Sequence[int]) -> int:
        """See `Reader`."""
        self.cache = self.new_cache()
        token = 0
        for start in range(0, len(ids), PIECE):
            token = self._forward(ids[start : start + PIECE])
        return token

    def _logits(self, ids: Sequence[int], *, keep: int) -> Any:
        """Read tokens in chunks; return the first row's logits, see `Transformers`."""
        import torch

        from lococo.reader import prefill, read

        if keep:
            return prefill(self.model, self.rows(ids), self.cache)[:1]
        return torch.cat([piece.logits[0] for piece in read(self.model, self.rows(ids), self.cache, all_logits=True)])

    def kv_bytes(self) -> int:
        """See `Reader`."""
        from lococo.cache import kv_nbytes

        return kv_nbytes(self.cache)


def _bytes_in(held: object) -> int:
    """Return the bytes of all tensors in nested containers."""
    if isinstance(held, dict):
        return sum(map(_bytes_in, held.values()))
    if isinstance(held, (list, tuple)):
        return sum(map(_bytes_in, held))
    # Tensors, those of quantised kinds included, whose parts count for themselves.
    parts = [getattr(held, name) for name in ("_data", "_scale", "_shift") if hasattr(held, name)]
    return _bytes_in(parts) if parts else int(getattr(held, "nbytes", 0))


@contextmanager
def with_slots(setting: Setting) -> Iterator[Reader]:
    """Open a reader with slots."""
    import torch

    from lococo.attachment import attach

    model = _loaded(setting)
    options: dict[str, Any] = {name: getattr(setting, name) for name in ("num_slots", "chunk_size", "compiled")}
    with attach(model, setting.compressor, **options) as slots, torch.no_grad():
        yield Slots(model, slots.new_cache, batch=setting.batch)


@contextmanager
def with_full_cache(setting: Setting, *, chunked: bool = False) -> Iterator[Reader]:
    """Open a reader with transformers' own cache."""
    import torch
    from transformers import DynamicCache

    model = _loaded(setting)
    with torch.no_grad():
        size = setting.chunk_size if chunked else None
        yield Transformers(model, lambda: DynamicCache(config=model.config), chunk_size=size, batch=setting.batch)


@contextmanager
def with_quantized_cache(setting: Setting, **options: Any) -> Iterator[Reader]:
    """Open a reader with transformers' quantised cache; options as that takes them."""
    import torch
    from transformers import QuantizedCache

    model = _loaded(setting)
    with torch.no_grad():
        yield Transformers(model, lambda: QuantizedCache(config=model.config, **options), batch=setting.batch)


def _loaded(setting: Setting) -> Any:
    from lococo.models import load_model

    trusted = {"trust_remote_code": setting.trust_remote_code}
    return load_model(setting.model, dtype=setting.dtype, device=setting.device, **trusted)[0]
