"""The kernel of `lococo.kernels` beside plain torch, on a GPU: `python -m lococo.bench.kernel`.

One table of milliseconds, medians of rounds in which the ways take turns, the GPU's cache emptied before each call:

- torch: what a layer does without the kernel: the bias, torch's scaled dot product attention, and the mass from maps.
- sdpa: its attention alone, with bias and repeated heads at hand; no mass, so a floor and no peer.
- kernel: output and mass.
- mass: the mass alone, as look-ahead scores want it, of float32 keys: in torch, by the kernel, and by the kernel were
  keys rounded to bfloat16.
- bytes, ops: what reading everything once, and the products of both passes, would take at the rates measured here.
- error: of output and mass against double precision, relative to the largest number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lococo import kernels
from lococo.entries import mass_in_blocks

ROUNDS = 9

# Calls before those that count: the first compiles.
WARM_UP = 3

# Bytes that push everything else out of a GPU's cache, and keep it busy until the call to be timed is in its queue.
FLUSHED = 512 << 20

# Rows of the square matrices by which arithmetic is measured, and bytes of the block by which reading is.
ROWS = 8192
BLOCK = 2 << 30

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One chunk of queries in one layer.

    Attributes:
        batch: Rows.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Of keys and values.
        chunk: Queries, the last entries' own.
        entries: Entries, those of the chunk included.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk: int
    entries: int

    @property
    def nbytes(self) -> int:
        """Bytes that must be read or written: queries, output, keys and values, log-mass and mass."""
        vectors = 2 * self.heads * self.chunk + 2 * self.kv_heads * self.entries
        return self.batch * (vectors * self.head_dim * DTYPE.itemsize + 2 * 4 * self.kv_heads * self.entries)

    @property
    def operations(self) -> int:
        """Multiplications and additions of three products: logits in either pass, and the values mixed."""
        pairs = self.chunk * self.entries - self.chunk * (self.chunk - 1) // 2
        return 2 * 3 * self.batch * self.heads * pairs * self.head_dim


CASES = [
    Case(batch, heads, kv_heads, head_dim, 256, entries)
    for heads, kv_heads, head_dim in ((9, 3, 64), (32, 8, 128))
    for entries in (512 + 256, 8192)
    for batch in (1, 8)
]


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case on the GPU.

    Attributes:
        query: (b h*g q d).
        key: (b h s d).
        value: (b h s d).
        log_mass: (b h s), float32.
        visible: Entries that each query sees, (1 q).
        scaling: Factor of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_mass: Tensor
    visible: Tensor
    scaling: float

    @classmethod
    def of(cls, case: Case) -> "Inputs":
        """Draw them; entries stand for one token to some."""
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=generator)

        return cls(
            random(case.batch, case.heads, case.chunk, case.head_dim).to(DTYPE),
            random(case.batch, case.kv_heads, case.entries, case.head_dim).to(DTYPE),
            random(case.batch, case.kv_heads, case.entries, case.head_dim).to(DTYPE),
            random(case.batch, case.kv_heads, case.entries).abs(),
            torch.arange(case.entries - case.chunk, case.entries, device="cuda")[None] + 1,
            case.head_dim**-0.5,
        )

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    def bias(self) -> Tensor:
        """Return what `SlotLayer.attention_bias` does, (b h*g q s)."""
        hidden = torch.arange(self.key.shape[2], device="cuda") >= self.visible[..., None]
        causal = torch.zeros(hidden.shape, dtype=DTYPE, device="cuda").masked_fill_(hidden, torch.finfo(DTYPE).min)
        return (causal[:, None] + self.log_mass[:, :, None].to(DTYPE)).repeat_interleave(self.groups, 1)

    def mass(self, key: Tensor) -> Tensor:
        """Return the mass from maps, (b h s)."""
        nothing: dict[str, Any] = {"softcap": None, "sinks": None, "weight": None}
        queries = self.query.unflatten(1, (-1, self.groups))
        return mass_in_blocks(key, self.log_mass, queries, scaling=self.scaling, visible=self.visible, **nothing)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Return the kernel's output and mass."""
        return kernels.attention_with_mass(
            self.query, self.key, self.value, self.log_mass, self.visible, scaling=self.scaling
        )

    def kernel_mass(self, key: Tensor) -> Tensor:
        """Return the kernel's mass alone."""
        queries = self.query.unflatten(1, (-1, self.groups))
        return kernels.column_mass(key, self.log_mass, queries, scaling=self.scaling, visible=self.visible)

    def errors(self) -> tuple[float, float]:
        """Return the kernel's largest errors of output and mass in the first row, relative to the largest number."""
        query, key, value, log_mass = (each[:1].double() for each in (self.query, self.key, self.value, self.log_mass))
        exact = kernels.naive_attention_with_mass(query, key, value, log_mass, self.visible, scaling=self.scaling)
        one, other = (
            float((mine[:1].double() - right).abs().max() / right.abs().max())
            for mine, right in zip(self.kernel(), exact, strict=True)
        )
        return one, other


def ways(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = inputs.query, inputs.key, inputs.value
    module: Any = SimpleNamespace(num_key_value_groups=inputs.groups, is_causal=True)
    keys, values = (each.repeat_interleave(inputs.groups, 1) for each in (key, value))
    bias, exact_key = inputs.bias(), key.float()

    def torch_alone() -> object:
        output = sdpa_attention_forward(module, query, key, value, inputs.bias(), scaling=inputs.scaling)
        return output, inputs.mass(key)

    return {
        "torch": torch_alone,
        "sdpa": lambda: scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=inputs.scaling),
        "kernel": inputs.kernel,
        "mass torch": lambda: inputs.mass(exact_key),
        "mass kernel": lambda: inputs.kernel_mass(exact_key),
        "mass rounded": lambda: inputs.kernel_mass(key),
    }


def medians(calls: dict[str, Callable[[], object]], flush: Tensor) -> dict[str, float]:
    """Time calls in turns; return milliseconds on the GPU by name."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                times[name].append(start.elapsed_time(end))
    return {name: median(each) for name, each in times.items()}


def rates(flush: Tensor) -> tuple[float, float]:
    """Measure the GPU: bytes read per second, and operations of bfloat16 products per second."""
    block, left, right = (
        torch.randn(*shape, device="cuda", dtype=dtype)
        for shape, dtype in (((BLOCK // 4,), torch.float32), ((ROWS, ROWS), DTYPE), ((ROWS, ROWS), DTYPE))
    )
    took = medians({"read": block.sum, "multiplied": lambda: left @ right}, flush)
    return BLOCK / took["read"] * 1e3, 2 * ROWS**3 / took["multiplied"] * 1e3


COLUMNS = (
    *("heads", "d", "batch", "entries", "torch", "sdpa", "kernel", "torch/kernel", "sdpa/kernel"),
    *("mass torch", "mass kernel", "ratio", "mass rounded", "bytes", "ops", "kernel/floor", "error"),
)


def row(case: Case, flush: Tensor, bytes_per_s: float, operations_per_s: float) -> list[str]:
    """Measure a case; return its row of the table."""
    inputs = Inputs.of(case)
    error = inputs.errors()
    ms = medians(ways(inputs), flush)
    floors = case.nbytes / bytes_per_s * 1e3, case.operations / operations_per_s * 1e3
    return [
        f"{case.heads}/{case.kv_heads}",
        str(case.head_dim),
        str(case.batch),
        str(case.entries),
        *(f"{ms[name]:.3f}" for name in ("torch", "sdpa", "kernel")),
        *(f"{ms[name] / ms['kernel']:.2f}" for name in ("torch", "sdpa")),
        *(f"{ms[name]:.3f}" for name in ("mass torch", "mass kernel")),
        f"{ms['mass torch'] / ms['mass kernel']:.2f}",
        f"{ms['mass rounded']:.3f}",
        *(f"{each:.3f}" for each in floors),
        f"{ms['kernel'] / max(floors):.1f}",
        "{:.0e} {:.0e}".format(*error),
    ]


@torch.no_grad()
def main() -> None:
    """Print the table, or in one line why there is none."""
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing was measured.")
        return
    if not kernels.usable(torch.zeros(1, 1, device="cuda")):
        print("The kernel needs Triton and an NVIDIA GPU from Ampere on: nothing was measured.")
        return
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    bytes_per_s, operations_per_s = rates(flush)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: reads {bytes_per_s / 1e9:.0f} GB/s, multiplies "
        f"bfloat16 at {operations_per_s / 1e12:.0f} TFLOP/s. Milliseconds, medians of {ROUNDS}, chunks of 256."
    )
    print(" | ".join(COLUMNS))
    for case in CASES:
        try:
            cells = row(case, flush, bytes_per_s, operations_per_s)
        except torch.OutOfMemoryError:
            cells = [f"{case}: out of memory"]
        print(" | ".join(f"{cell:>{len(name)}}" for cell, name in zip(cells, COLUMNS, strict=False)), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
