"""Draws the attention masks of docs/how.md from the mask builder itself.

    python docs/site/pictures.py        # writes docs/images/*.svg

The files are the same bytes on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ar2diff.core.attention import Slots, allowed_edges, dense_mask, lay_out, reveal_edges

IMAGES = Path(__file__).resolve().parents[1] / "images"
LENGTH, BLOCK = 8, 4  # tokens of the row, and of its blocks
CELL, MARGIN, LABEL = 22, 6, 28  # pixels
KINDS = (  # by (the reader is noisy, what is read is noisy)
    ((True, True), "noisy", "a noisy slot reads its block"),
    ((True, False), "context", "a noisy slot reads clean text"),
    ((False, False), "clean", "a clean slot reads clean text"),
)
STYLE = """
text { font: 10px ui-monospace, monospace; fill: #444; text-anchor: middle }
.legend, .axis { font: 11px system-ui, sans-serif } .legend { text-anchor: start }
.none { fill: none; stroke: #ccc } .border { stroke: #555; stroke-width: 1.5; fill: none }
.noisy { fill: #e07b39; stroke: #a8541d } .context { fill: #5c6bc0; stroke: #3a4796 }
.clean { fill: #43a07a; stroke: #2a6f53 }
@media (prefers-color-scheme: dark) {
text { fill: #ccc } .none { stroke: #4a4d57 } .border { stroke: #aaa } }
"""


@dataclass(frozen=True)
class Picture:
    """A mask to draw.

    Attributes:
        allowed: [S, S] bool, whether the row's slot reads the column's.
        noisy: [S] bool. labels: [S], what stands in a slot.
        edges: slots before which a line is drawn, between blocks or documents.
    """

    allowed: Tensor
    noisy: Tensor
    labels: Sequence[str]
    edges: Sequence[int]


def drawn(
    slots: Slots, attention: str, labels: Sequence[str], edges: Sequence[int], **way: Tensor
) -> Picture:
    """The picture of one row of slots."""
    block = None if attention == "full" else BLOCK
    mask = dense_mask(allowed_edges(slots, attention, block, **way), slots)[0, 0]
    return Picture(mask, slots.noisy[0], labels, edges)


def training(attention: str, lengths: Sequence[int] = (LENGTH,), **way: Tensor) -> Picture:
    """A training row that holds documents of these lengths."""
    pos = torch.cat([torch.arange(n) for n in lengths])[None]
    doc = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)])[None]
    _, slots = lay_out(pos, pos, doc, pos, attention)
    starts = [n for n, p in enumerate(pos[0].tolist()) if p % BLOCK == 0]
    clean = [f"{'xyz'[d]}{p}" for d, p in zip(doc[0].tolist(), pos[0].tolist(), strict=True)]
    noisy, size = [f"~{label}" for label in clean], len(clean)
    if attention == "full":
        return drawn(slots, attention, noisy, [], **way)
    edges = [*starts[1:], size, *(size + n for n in starts[1:])]
    return drawn(slots, attention, noisy + clean, edges, **way)


def decoding() -> Picture:
    """The second block, behind the clean first one."""
    pos = torch.arange(2 * BLOCK)[None]
    slots = Slots(torch.zeros_like(pos), pos, pos >= BLOCK)
    labels = [f"~x{n}" if n >= BLOCK else f"x{n}" for n in range(2 * BLOCK)]
    return drawn(slots, "causal_context", labels, [BLOCK])


def speculation() -> Picture:
    """Four tokens, two candidates, and three masks behind the newest token and each candidate."""
    text, drafts, masks = 4, 2, 3
    clean = torch.arange(text + drafts)
    starts = [torch.full((masks,), text + n) for n in range(drafts + 1)]
    pos = torch.cat([clean, *(start + torch.arange(masks) for start in starts)])[None]
    start = torch.cat([clean, *starts])[None]
    block = torch.cat([clean, *(s + len(clean) for s in starts)])[None]
    noisy = torch.arange(pos.shape[1])[None] >= len(clean)
    slots = Slots(torch.zeros_like(pos), pos, noisy, start, block)
    labels = [f"x{n}" for n in range(text)] + [f"d{n + 1}" for n in range(drafts)]
    edges = [text, *range(len(clean), pos.shape[1], masks)]
    return drawn(slots, "causal_context", [*labels, *["m"] * (masks * (drafts + 1))], edges)


def pictures() -> dict[str, Picture]:
    """Every picture by the name of its file."""
    return {
        "causal_context-training": training("causal_context"),
        "block_causal-training": training("block_causal"),
        "full-training": training("full"),
        "packed-training": training("causal_context", (5, 3)),
        "causal_context-decoding": decoding(),
        "causal_context-speculation": speculation(),
        "full-reveal": training("full", reveal=reveal_edges(0.25, LENGTH, LENGTH, seed=0, step=1)),
    }


def svg(picture: Picture) -> str:
    """A picture as SVG, for a light and for a dark page."""
    size = len(picture.labels)
    legend = [kind for kind in KINDS if any(kind[1] == css for *_, css in _cells(picture))]
    first = 2 * LABEL
    width = first + size * CELL + MARGIN
    height = first + size * CELL + MARGIN + CELL * len(legend) + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 260)} {height}" '
        f'width="{max(width, 260)}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<text class="axis" x="{first + size * CELL / 2}" y="14">the slot that is read</text>',
        f'<text class="axis" transform="translate(14 {first + size * CELL / 2}) rotate(-90)">'
        "the slot that reads</text>",
    ]
    for n, label in enumerate(picture.labels):
        middle = first + n * CELL + CELL / 2
        lines.append(f'<text x="{middle}" y="{first - 8}">{label}</text>')
        lines.append(f'<text x="{first - 16}" y="{middle + 4}">{label}</text>')
    for q, k, css in _cells(picture):
        corner = f'x="{first + k * CELL + 1}" y="{first + q * CELL + 1}"'
        lines.append(
            f'<rect {corner} width="{CELL - 2}" height="{CELL - 2}" rx="2" class="{css}"/>'
        )
    last = first + size * CELL
    for edge in [0, *picture.edges, size]:
        at = first + edge * CELL
        lines.append(f'<path d="M{at} {first}V{last}M{first} {at}H{last}" class="border"/>')
    for n, (_, css, said) in enumerate(legend):
        y = last + MARGIN + n * CELL
        lines.append(f'<rect x="{first}" y="{y + 4}" width="11" height="11" rx="2" class="{css}"/>')
        lines.append(f'<text class="legend" x="{first + 18}" y="{y + 14}">{said}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _cells(picture: Picture) -> Iterator[tuple[int, int, str]]:
    """(reading slot, slot that is read, CSS class) of every cell."""
    classes = {of: css for of, css, _ in KINDS}
    noisy = picture.noisy.tolist()
    for q, row in enumerate(picture.allowed.tolist()):
        for k, allowed in enumerate(row):
            yield q, k, classes[noisy[q], noisy[k]] if allowed else "none"


def write(folder: Path = IMAGES) -> None:
    """Write every picture."""
    folder.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        (folder / f"{name}.svg").write_text(svg(picture), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
