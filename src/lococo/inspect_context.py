"""Which tokens the slots of a context keep: a table, a heat map for the terminal, and the same as an SVG file."""

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lococo.atomic import write_atomically
from lococo.cache import SlotCache
from lococo.errors import ArgumentError
from lococo.files import check_output
from lococo.storage import ContextInfo

BINS = 100
TERMINAL_BINS = 60
SHADES = " ░▒▓█"
SNIPPET_TOKENS = 4  # shown on either side of a kept token
SVG_MARK = "<!-- lococo inspect -->"


@dataclass(frozen=True)
class Kept:
    """What one layer keeps.

    Attributes:
        layer: Its index in the model.
        token_index: Which token of the text each slot is, per head, in order.
        log_mass: What each slot adds to its attention logit, per head.
        waiting: Latest tokens that are held, but not compressed yet.
    """

    layer: int
    token_index: list[list[int]]
    log_mass: list[list[float]]
    waiting: int

    @property
    def mean_log_mass(self) -> float:
        """Mean over slots and heads."""
        values = [value for head in self.log_mass for value in head]
        return sum(values) / len(values)

    def shares(self, tokens: int, parts: int) -> list[float]:
        """Return which share of the tokens in each of `parts` equal parts of the text is kept, mean over heads."""
        kept = Counter(min(index * parts // tokens, parts - 1) for head in self.token_index for index in head)
        sizes = Counter(min(index * parts // tokens, parts - 1) for index in range(tokens))
        heads = len(self.token_index)
        return [kept[part] / (heads * sizes[part]) if sizes[part] else 0.0 for part in range(parts)]

    def favourites(self) -> list[int]:
        """Return the tokens it keeps, those of most heads and of the greatest mass first."""
        heads: Counter[int] = Counter()
        mass: Counter[int] = Counter()
        for indices, masses in zip(self.token_index, self.log_mass, strict=True):
            for index, value in zip(indices, masses, strict=True):
                heads[index] += 1
                mass[index] += value  # type: ignore[assignment]  # a Counter of floats is one, too
        return sorted(heads, key=lambda index: (-heads[index], -mass[index], index))


def kept_of(cache: SlotCache) -> list[Kept]:
    """Take down what the slots of a cache's first row keep.

    Where nothing was compressed yet, all tokens are kept and count as slots.
    """
    kept = []
    for layer in cache.slot_layers:
        filled = layer.filled[0]
        count = layer.held[0] or filled
        kept.append(
            Kept(
                layer.layer_idx,
                layer.token_index[0, :, :count].tolist(),
                layer.log_mass[0, :, :count].tolist(),
                filled - count,
            )
        )
    return kept


def head_of(kept: Sequence[Kept], layer: int, head: int) -> Kept:
    """Return one head of one layer.

    Raises:
        ArgumentError: If there is no such layer or head.
    """
    layers = {one.layer: one for one in kept}
    if layer not in layers:
        raise ArgumentError(f"no layer {layer} with slots; there are layers {min(layers)} to {max(layers)}")
    one = layers[layer]
    if not 0 <= head < len(one.token_index):
        raise ArgumentError(
            f"no key/value head {head} in layer {layer}; there are heads 0 to {len(one.token_index) - 1}"
        )
    return Kept(layer, [one.token_index[head]], [one.log_mass[head]], one.waiting)


def show_head(one: Kept, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, file: TextIO) -> dict[str, Any]:
    """Print the tokens that a single head keeps, in order, and return them for JSON."""
    table = Table("token", "log_mass", "text")
    for index, value in zip(one.token_index[0], one.log_mass[0], strict=True):
        table.add_row(f"{index:,}", f"{value:.2f}", snippet(ids, index, tokenizer))
    Console(file=file).print(table)
    texts = [decode(tokenizer, [ids[index]]) for index in one.token_index[0]]
    return {"layer": one.layer, "token_index": one.token_index[0], "log_mass": one.log_mass[0], "text": texts}


def show(
    kept: Sequence[Kept],
    info: ContextInfo,
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    picture: Path,
    file: TextIO,
) -> dict[str, Any]:
    """Print the table and the coarse picture, write the fine one, and return everything for JSON."""
    console = Console(file=file)
    tokens = len(ids)
    console.print(_table(kept, info, ids, tokenizer))
    waiting = f"; the last {kept[0].waiting} tokens are held beside them" if kept[0].waiting else ""
    console.print(f"\nWhere in the text the slots of each layer come from{waiting}:", highlight=False)
    for one, line in zip(kept, blocks([one.shares(tokens, TERMINAL_BINS) for one in kept]), strict=True):
        console.print(f"{one.layer:>4} |{line}|", highlight=False, markup=False)
    check_picture(picture)
    write_atomically(picture, svg(kept, info, tokens).encode())
    console.print(f"picture: {picture}", highlight=False, markup=False, soft_wrap=True)
    return {
        "model": info.model,
        "compressor": info.compressor,
        "tokens": tokens,
        "chunk_size": info.chunk_size,
        "positions": info.positions,
        "picture": str(picture),
        "layers": [
            {
                "layer": one.layer,
                "slots": len(one.token_index[0]),
                "waiting": one.waiting,
                "kept_of_thirds": one.shares(tokens, 3),
                "mean_log_mass": one.mean_log_mass,
                "heads": [
                    {"token_index": indices, "log_mass": masses}
                    for indices, masses in zip(one.token_index, one.log_mass, strict=True)
                ],
            }
            for one in kept
        ],
    }


def _table(kept: Sequence[Kept], info: ContextInfo, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Table:
    title = f"{info.path.name}: {len(ids):,} tokens read by {info.model} into slots ({info.compressor})"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "slots", "first\nthird", "middle\nthird", "last\nthird", "log_\nmass"):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split("\n"))))
    table.add_column("kept by most heads, with most mass", no_wrap=True, overflow="ellipsis")
    for one in kept:
        # The share of the slots, not of the tokens: rows add up to 100 %.
        shares = one.shares(len(ids), 3)
        thirds = [f"{share / (sum(shares) or 1):.0%}" for share in shares]
        example = snippet(ids, one.favourites()[0], tokenizer)
        table.add_row(str(one.layer), str(len(one.token_index[0])), *thirds, f"{one.mean_log_mass:.2f}", example)
    return table


def snippet(ids: Sequence[int], index: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return a token with a little of the text around it; the token itself in brackets and bold."""
    before = decode(tokenizer, ids[max(0, index - SNIPPET_TOKENS) : index])
    after = decode(tokenizer, ids[index + 1 : index + 1 + SNIPPET_TOKENS])
    token = decode(tokenizer, [ids[index]])
    return Text.assemble(before, (f"[{token}]", "bold"), after)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return tokens as a piece of one line."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in text)


def blocks(rows: Sequence[Sequence[float]]) -> list[str]:
    """Draw shares between 0 and 1 as characters, the greatest of all as a full block."""
    most = max((share for row in rows for share in row), default=0.0) or 1.0
    return ["".join(SHADES[_shade(share / most)] for share in row) for row in rows]


def _shade(share: float) -> int:
    # Anything at all is visible.
    return 0 if share == 0 else max(1, round(share * (len(SHADES) - 1)))


def check_picture(path: Path) -> None:
    """Refuse a place for the picture that cannot be written, or holds something else than an older picture of ours.

    Raises:
        ArgumentError: If another file is there.
        OSError: If the folder is missing or cannot be written.
    """
    ours = path.is_file() and SVG_MARK in path.read_bytes()[:200].decode("utf-8", "replace")
    check_output(path, force=ours)


CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 8, 12, 64, 58


def svg(kept: Sequence[Kept], info: ContextInfo, tokens: int) -> str:
    """Draw which share of each part of the text every layer keeps: layers down, positions to the right."""
    bins = min(BINS, tokens)
    rows = [one.shares(tokens, bins) for one in kept]
    most = max(max(row) for row in rows) or 1.0
    width, height = LEFT + bins * CELL_WIDTH + 24, TOP + len(rows) * CELL_HEIGHT + 44
    title = f"{info.path.name}: what {info.compressor} keeps of {tokens:,} tokens ({info.model})"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
        SVG_MARK,
        f"<title>{html.escape(title)}</title>",
        "<style>text{font:12px system-ui,sans-serif;fill:#222}rect{fill:#1f5fbf}.page{fill:#fff}.frame{fill:none;"
        "stroke:#888}@media(prefers-color-scheme:dark){text{fill:#ddd}rect{fill:#ffb454}.page{fill:#16181d}}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="{LEFT}" y="42">darker (on a dark page: brighter) = more of these tokens kept, mean over heads; '
        f"strongest cell: {most:.0%}</text>",
    ]
    for y, (one, row) in enumerate(zip(kept, rows, strict=True)):
        top = TOP + y * CELL_HEIGHT
        parts.append(f'<text x="{LEFT - 8}" y="{top + 10}" text-anchor="end">{one.layer}</text>')
        parts += [
            f'<rect x="{LEFT + x * CELL_WIDTH}" y="{top}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" '
            f'fill-opacity="{share / most:.2f}"/>'
            for x, share in enumerate(row)
            if share
        ]
    bottom = TOP + len(rows) * CELL_HEIGHT
    frame = f'width="{bins * CELL_WIDTH}" height="{len(rows) * CELL_HEIGHT}"'
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" {frame}/>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = LEFT + share * bins * CELL_WIDTH
        parts.append(f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="{anchor}">{round(share * tokens):,}</text>')
    middle = LEFT + bins * CELL_WIDTH // 2
    parts.append(f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">token of the text</text>')
    parts.append(f'<text x="8" y="{TOP + 10}">layer</text>')
    parts.append("</svg>\n")
    return "\n".join(parts)
