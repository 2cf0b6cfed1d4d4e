"""What reading will need, from a model's config alone: memory of weights, caches and the work on one chunk."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from lococo.attachment import attach, window_of
from lococo.bench.known import KNOWN
from lococo.cache import SlotCache
from lococo.cache_name import cache_name
from lococo.entries import QUERY_ROWS
from lococo.errors import ArgumentError
from lococo.facts import ModelFacts
from lococo.slot_layer import SlotLayer
from lococo.state_layer import states_of

if TYPE_CHECKING:
    from rich.table import Table

# Memory of devices, in GiB.
DEVICES = {
    "T4": 16,
    "L4": 24,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "A100 40GB": 40,
    "L40S": 48,
    "A100 80GB": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}

# Share of a device's memory that is left to its driver, kernels and gaps between tensors.
SPARE = 0.1


@dataclass(frozen=True)
class Need:
    """Memory of one way of reading, in bytes, weights aside.

    Attributes:
        cache: Keys, values and what belongs to them.
        activations: Most that is held at once while one chunk is read and compressed.
    """

    cache: int
    activations: int

    @property
    def total(self) -> int:
        """Both."""
        return self.cache + self.activations


@dataclass(frozen=True)
class Plan:
    """What a model needs.

    Attributes:
        model: Its name.
        parameters: Numbers in its weights.
        weights: Their bytes.
        context: Tokens that are read per sequence.
        num_slots: Per layer and key/value head.
        chunk_size: Tokens per forward pass.
        batch: Sequences.
        dtype: Of weights and cache.
        full: With the full cache, read in chunks as well.
        slots: With slots.
        batches: By device, the largest batch with the full cache and with slots, 0 for none.
        window: Positions that the model was trained for, beyond which the full cache does not read; None: unknown.
    """

    model: str
    parameters: int
    weights: int
    context: int
    num_slots: int
    chunk_size: int
    batch: int
    dtype: str
    full: Need
    slots: Need
    batches: dict[str, tuple[int, int]]
    window: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self)


def plan(
    config: PreTrainedConfig,
    *,
    name: str,
    context: int,
    num_slots: int = 512,
    chunk_size: int = 256,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    compressor: str = "mass-merge",
    devices: Mapping[str, float] = DEVICES,
    trust_remote_code: bool = False,
) -> Plan:
    """Work out what a model needs, without its weights.

    Args:
        config: Of the model.
        name: What it is called.
        context: Tokens that are read per sequence.
        num_slots: Slots per layer.
        chunk_size: Tokens per forward pass.
        batch: Sequences.
        dtype: Of weights and cache.
        compressor: Decides what the cache takes down beside keys and values.
        devices: Memory by name, in GiB.
        trust_remote_code: Run Python code that the model brings along.

    Raises:
        UnsupportedModelError: If the model has no key/value cache that slots could replace.
    """
    with torch.device("meta"):
        # Of the ways to compute experts, the one whose shapes do not depend on numbers.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code, experts_implementation="batched_mm"
        )
    model.tie_weights()
    weights = {id(each): each for each in [*model.parameters(), *model.buffers()]}.values()
    parameters = sum(each.numel() for each in model.parameters())
    occupied = sum(each.numel() * each.element_size() for each in weights)

    token = _one_token(model)

    def needs(batch: int) -> tuple[Need, Need]:
        full = sum(_bytes_held(layer, context) for layer in token.layers) * batch
        slots, entries = _slot_cache(model, token, compressor, num_slots, chunk_size, batch, context)
        chunk = min(chunk_size, context)
        # Its layers are copied whole when a chunk is put behind them.
        copied = full // model.config.get_text_config(decoder=True).num_hidden_layers
        whole = _activations(model, batch, chunk, mask=batch * chunk * context) + copied
        heads = batch * _shape(model)[1]
        work = _activations(model, batch, chunk, mask=heads * chunk * entries) + _compressing(model, heads, entries)
        return Need(full, whole), Need(slots, work)

    full, slots = needs(batch)
    one_full, one_slots = needs(1)
    batches = {}
    for device, gib in devices.items():
        room = int(gib * 2**30 * (1 - SPARE)) - occupied
        batches[device] = max(0, room // one_full.total), max(0, room // one_slots.total)
    return Plan(
        name,
        parameters,
        occupied,
        context,
        num_slots,
        chunk_size,
        batch,
        str(dtype).removeprefix("torch."),
        full,
        slots,
        batches,
        window_of(model),
    )


def known_config(name: str) -> PreTrainedConfig | None:
    """Return the config of a published model that this project knows the shape of, by its hub id or the end of it."""
    name = name.replace("THUDM/", "zai-org/")  # which it was called before
    found = [each for each in KNOWN if name.lower() in (each.lower(), each.rpartition("/")[2].lower())]
    if not found:
        return None
    kind, shape = KNOWN[found[0]]
    config: PreTrainedConfig = AutoConfig.for_model(kind, **shape)
    return config


def tokens_of(said: str) -> int:
    """Read a number of tokens, such as 4096, 128k or 1m (of 1,024 and 1,048,576).

    Raises:
        ArgumentError: If it is none.
    """
    scale = {"k": 1024, "m": 1024**2}.get(said[-1:].lower(), 1)
    digits = said[:-1] if scale > 1 else said
    if not digits.isdecimal() or int(digits) < 1:
        raise ArgumentError(f"expected a number of tokens such as 4096, 128k or 1m, got {said!r}")
    return int(digits) * scale


def device_of(said: str) -> tuple[str, float]:
    """Read the name of a device, or its memory in GiB.

    Raises:
        ArgumentError: If it is neither.
    """
    for name, memory in DEVICES.items():
        if said.lower().replace(" ", "").replace("-", "") == name.lower().replace(" ", ""):
            return name, memory
    try:
        gib = float(said)
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise ArgumentError(f"expected a device ({', '.join(DEVICES)}) or its memory in GiB, got {said!r}")
    return f"{said} GiB", gib


def _shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Return query heads, key/value heads and head_dim."""
    facts = ModelFacts.of(model)
    return model.config.get_text_config(decoder=True).num_attention_heads, facts.num_key_value_heads, facts.head_dim


def _one_token(model: PreTrainedModel) -> DynamicCache:
    """Return transformers' own cache after one token, read without weights, which tells what each layer keeps of it.

    Where a forward pass needs numbers, as a model's own code may, all layers keep what the config says.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    cache = DynamicCache(config=model.config)
    try:
        with torch.no_grad():
            model(ids, use_cache=True, **{cache_name(model): cache})
    except Exception:  # whatever such code raises
        _, h, d = _shape(model)
        cache = DynamicCache(config=model.config)
        states = torch.empty(1, h, 1, d, dtype=model.dtype, device="meta")
        for layer in cache.layers:
            if isinstance(layer, CacheLayerMixin):
                layer.update(states, states)
    return cache


def _slot_cache(
    model: PreTrainedModel,
    token: DynamicCache,
    compressor: str,
    num_slots: int,
    chunk_size: int,
    batch: int,
    context: int,
) -> tuple[int, int]:
    """Return the bytes of a SlotCache, layers without slots included, and the entries of its widest layer."""
    heads, latent = _shape(model)[0], getattr(model.config, "kv_lora_rank", None)
    attachment = attach(model, compressor, num_slots=num_slots, chunk_size=chunk_size)
    cache = attachment.new_cache()
    assert isinstance(cache, SlotCache)
    others = 0
    for layer, seen in zip(cache.layers, token.layers, strict=True):
        others += (_state_bytes(seen) if isinstance(layer, SlotLayer) else _bytes_held(seen, context)) * batch
        if isinstance(layer, SlotLayer) and (of_token := _of_token(seen)):
            keys, values = (states.expand(batch, -1, -1, -1) for states in of_token)
            layer.lazy_initialization(keys, values)
            if "queries" in layer.compressor.observes:
                h, d = keys.shape[1], keys.shape[-1]
                # Without weights no probe tells latents, whose queries look at the rotated part of a key as well.
                d += values.shape[-1] if d == latent else 0
                layer.queries = keys.new_empty(batch, h, heads // h, chunk_size, d)
    entries = max(cache.slots_per_layer) + chunk_size
    return cache.nbytes + others, entries


def _bytes_held(layer: Any, context: int) -> int:
    """Return what a layer of transformers holds of a text, of which it has read one token.

    Keys and values of every token, a sliding layer's of those that the next one sees, and a state of its own.
    """
    window = getattr(layer, "sliding_window", None)
    tokens = context if window is None else min(context, window - 1)
    return tokens * sum(each.nbytes for each in _of_token(layer)) + _state_bytes(layer)


def _state_bytes(layer: object) -> int:
    return sum(state.nbytes for _, _, state in states_of(layer))


def _of_token(layer: Any) -> list[torch.Tensor]:
    """Return keys and values of a layer, if it has any."""
    return [each for name in ("keys", "values") if (each := getattr(layer, name, None)) is not None]


def _activations(model: PreTrainedModel, batch: int, chunk: int, *, mask: int) -> int:
    """Return the most bytes that one layer's forward pass of a chunk holds beside weights and cache.

    Either the feed-forward part (gate, up and their product) or attention (queries, keys, values, what they are rotated
    to, the output and a mask of so many numbers), with the residual stream and a norm's float32 copies beside them; and
    the logits of the chunk's last token.
    """
    config = model.config.get_text_config(decoder=True)
    heads, h, d = _shape(model)
    size, rows = model.dtype.itemsize, batch * chunk
    stream = rows * config.hidden_size * (2 * size + 8)
    sizes = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    intermediate = max(sizes) if isinstance(sizes, list | tuple) else sizes  # of each layer, or of all
    forward = 3 * rows * intermediate * size
    attention = rows * (3 * heads + 4 * h) * d * size + mask * size
    return int(stream + max(forward, attention) + batch * config.vocab_size * (size + 4))


def _compressing(model: PreTrainedModel, heads: int, entries: int) -> int:
    """Return the bytes that compressing a layer holds: six float32 copies of its keys, and part of a map."""
    return heads * entries * (6 * _shape(model)[2] + QUERY_ROWS) * 4


def tables(made: Plan) -> "list[Table | str]":
    """Lay a plan out for people: tables and the lines between them, which are wider than such narrow tables."""
    from rich.table import Table

    what = f"{made.model}, {made.parameters / 1e9:.2f} billion parameters in {made.dtype}"
    title = f"{what}; {made.batch} x {made.context:,} tokens, {made.num_slots} slots, chunks of {made.chunk_size}"
    beyond = made.window is not None and made.context > made.window
    remark = [f"beyond the window of {made.window:,} tokens the full cache makes no sense of a text"] if beyond else []
    memory = Table("GiB")
    for heading in ("full cache", "slots"):
        memory.add_column(heading, justify="right")
    memory.add_row("weights", *[f"{made.weights / 2**30:,.2f}"] * 2)
    memory.add_row("cache", *(f"{need.cache / 2**30:,.3f}" for need in (made.full, made.slots)))
    memory.add_row("activations", *(f"{need.activations / 2**30:,.3f}" for need in (made.full, made.slots)))
    memory.add_row("all", *(f"{(made.weights + need.total) / 2**30:,.2f}" for need in (made.full, made.slots)))
    batches = Table("device")
    for heading in ("full cache", "slots"):
        batches.add_column(heading, justify="right")
    for device, both in made.batches.items():
        batches.add_row(device, *(f"{batch:,}" if batch else "none" for batch in both))
    free = f"largest batch of {made.context:,} tokens, a tenth of the memory left free"
    return [title, memory, *remark, free, batches]
