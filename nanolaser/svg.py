"""
Pictures written by hand: an SVG is text that every browser draws, so a run's curves need nothing
installed, look alike in a page and in a file, and the same numbers give the same bytes.

    mark, dots, error_bars    what is to be seen      panel    marks in a frame with its axes
    picture                   panels side by side, as the text of one .svg file
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Pixels of a panel, and its margins: two side by side are as wide as a README's column.
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 400, 240, 50, 32, 44
GREY, DASH = "#5f6670", "5 3"


def mark(lines: Iterable[Sequence], colour: str, name: str = "", **style: Any) -> dict:
    """What a panel draws: polylines of (x, y), a single point being a dot; `name` stands at their
    right end, `style` are SVG's attributes, with _ for -."""
    # An infinite coordinate lies at the edge of the frame: (3, -inf), (3, inf) is a border.
    return {"lines": [np.asarray(x, dtype=float).reshape(-1, 2) for x in lines if len(x)],
            "colour": colour, "name": name, "style": style}


def dots(points: Iterable[Sequence[float]], colour: str, size: float = 6, **style: Any) -> dict:
    """A mark of points alone."""
    return mark([[point] for point in points], colour, stroke_width=size, **style)


def error_bars(x: Sequence, y: Sequence, error: Sequence, colour: str) -> dict:
    """A mark of vertical lines from y - error to y + error."""
    return mark([[(a, b - e), (a, b + e)] for a, b, e in zip(x, y, error)], colour, stroke_width=1)


def panel(
    title: str, x_name: str, y_name: str, marks: Sequence[dict],
    x_range: Any = None, y_range: Any = None, x_ticks: Any = None, notes: Iterable = (),
    y_ticks: Any = None,
) -> str:
    """One diagram as SVG elements, its corner at (0, 0).  `x_ticks`, `y_ticks`: value -> label;
    `notes`: (x, y, text)."""
    # In pixels, y from the top: `low` is the lower edge of the frame, and the larger number.
    # Names stand at the ends of their lines: no legend to match with colours, least of all in grey.
    # So the frame ends where the longest of them begins, letters being 6.6 pixels wide.
    named = [m for m in marks if m["name"] and m["lines"]]
    right = WIDTH - 12 - 6.6 * max((len(m["name"]) for m in named), default=0)
    low, high = HEIGHT - BOTTOM, TOP
    parts = [_text(LEFT, 18, title, size=14)]
    every = np.concatenate([np.zeros((0, 2)), *(line for m in marks for line in m["lines"])])
    if not len(every):  # say so: an empty frame is a riddle
        return parts[0] + _text((LEFT + right) / 2, (low + high) / 2, "no data", "middle", GREY)
    (x0, x1), (y0, y1) = x_range or _span(every[:, 0]), y_range or _span(every[:, 1])

    def place(x: float, y: float) -> tuple[float, float]:
        """Pixels of a point, or of the nearest one inside the frame."""
        return (round(LEFT + (min(max(x, x0), x1) - x0) / (x1 - x0) * (right - LEFT), 1),
                round(low + (min(max(y, y0), y1) - y0) / (y1 - y0) * (high - low), 1))

    # 1. The frame: ticks, a quiet grid, what the axes are.
    for value, label in (x_ticks or _ticks(x0, x1)).items():
        parts.append(_text(place(value, y0)[0], low + 16, label, "middle"))
    for value, label in (y_ticks or _ticks(y0, y1)).items():
        y = place(x0, value)[1]
        parts.append(f'<path d="M{LEFT} {y}H{right}" stroke="#d5d8dd"/>')
        parts.append(_text(LEFT - 6, y + 4, label, "end"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 10, x_name, "middle"))
    parts.append(_text(-(low + high) / 2, 12, y_name, "middle", turn=-90))
    # 2. The marks, each one path: "M50 196L388 32" goes from corner to corner.  "h0" draws a line
    #    of no length, with round ends: a dot.
    for m in marks:
        d = "".join("M" + "L".join("{} {}".format(*place(*p)) for p in line)
                    + ("h0" if len(line) == 1 else "") for line in m["lines"])  # fmt: skip
        style = {"fill": "none", "stroke_width": 1.8, "stroke_linecap": "round"} | m["style"]
        style = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in style.items())
        parts.append(f'<path d="{d}" stroke="{m["colour"]}" {style}/>')
    # 3. The names, from the highest down, each 13 pixels below the one before at least, and with
    #    room for those that are still to come above the lower edge.
    ends, least = [(place(*m["lines"][-1][-1])[1], m) for m in named], high
    for i, (y, m) in enumerate(sorted(ends, key=lambda end: end[0]), 1):
        y = min(max(y, least), low - 13 * (len(ends) - i))
        parts.append(_text(right + 5, y + 4, m["name"], colour=m["colour"]))
        least = y + 13
    for x, y, text in notes:
        x, y = place(x, y)
        parts.append(_text(x + 4, max(y, high + 10), text, colour=GREY))
    return "\n".join(parts)


def picture(panels: Sequence[str], columns: int = 2) -> str:
    """Panels in rows of so many columns, as one SVG text."""
    # Panel 5 of 3 columns: column 2 of row 1, moved by 800 and 240 pixels.
    columns = min(columns, len(panels)) or 1
    width, height = WIDTH * columns, HEIGHT * math.ceil(len(panels) / columns)
    placed = [f'<g transform="translate({i % columns * WIDTH} {i // columns * HEIGHT})">{p}</g>'
              for i, p in enumerate(panels)]  # fmt: skip
    # The white ground is drawn: on a dark page dark letters would stand on nothing.
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" role="img">'
            '<rect width="100%" height="100%" fill="#fff"/>' + "\n".join(placed) + "</svg>\n")


def _text(x, y, text, anchor="start", colour="#222", size=12, turn=0) -> str:
    turned = f' transform="rotate({turn})"' if turn else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
            f'font-size="{size}"{turned}>{html.escape(str(text))}</text>')  # fmt: skip


def _span(values: np.ndarray) -> tuple[float, float]:
    """A range that holds all finite values, with some air; never empty."""
    values = values[np.isfinite(values)]  # a border's infinite ends stretch no axis
    low, high = values.min(), values.max()
    air = 0.04 * (high - low) or abs(low) / 10 or 0.5  # all alike: no range to take a part of
    return low - air, high + air


def _ticks(low: float, high: float) -> dict[float, str]:
    """Round numbers within a range, three to six of them, with their labels."""
    # 0 .. 0.9: a fifth is 0.18, its unit 0.1; steps of 0.1 would be nine, of 0.2 they are 4.5.
    unit = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(unit * m for m in (1, 2, 5, 10) if (high - low) / (unit * m) <= 5)
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return {x: f"{round(x, 10):g}" for x in values}
