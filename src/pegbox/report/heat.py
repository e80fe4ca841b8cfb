"""Heat maps as inline SVG: a cell at whole numbers x and y, one colour below zero and one above, faint near zero."""

from __future__ import annotations

import math
from html import escape

from pegbox.parts.findings import Picture

__all__ = ["heat_chart"]

W, H = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 22, 44
BELOW, ABOVE = "f0", "f1"  # colour classes of the style sheet


def heat_chart(picture: Picture) -> str:
    """Cells coloured by `values`; each says its own on hovering, and the strongest stands above the map."""
    cells = [
        (int(x), int(y), value)
        for series in picture.series
        for x, y, value in zip(series.xs, series.ys, series.values)
        if math.isfinite(x) and math.isfinite(y)
    ]
    known = [abs(v) for _, _, v in cells if math.isfinite(v)]
    top = max(known, default=0.0)
    columns = range(max((x for x, _, _ in cells), default=0) + 1)
    rows = range(max((y for _, y, _ in cells), default=0) + 1)
    width, height = (W - LEFT - RIGHT) / len(columns), (H - TOP - BOTTOM) / len(rows)
    body = [_cell(x, y, value, top, width, height, picture) for x, y, value in cells]
    body += [_tick(LEFT + (x + 0.5) * width, H - BOTTOM + 15, str(x), "middle") for x in _some(columns)]
    body += [_tick(LEFT - 6, H - BOTTOM - (y + 0.5) * height + 4, str(y), "end") for y in _some(rows)]
    body.append(_tick(W - RIGHT, TOP - 8, f"strongest {top:.3g}".replace("-", "−"), "end"))
    across, down = LEFT + (W - LEFT - RIGHT) / 2, TOP + (H - TOP - BOTTOM) / 2
    centred = 'class="label" text-anchor="middle"'
    body.append(f'<text {centred} x="{across}" y="{H - 6}">{escape(picture.x_label)}</text>')
    body.append(f'<text {centred} transform="translate(13 {down}) rotate(-90)">{escape(picture.y_label)}</text>')
    shape = f'viewBox="0 0 {W} {H}" role="img" aria-label="{escape(picture.title)}"'
    return f'<svg class="chart" {shape}>{"".join(body)}</svg>'


def _cell(x: int, y: int, value: float, top: float, width: float, height: float, picture: Picture) -> str:
    place = f'x="{round(LEFT + x * width, 1)}" y="{round(H - BOTTOM - (y + 1) * height, 1)}"'
    size = f'width="{round(0.94 * width, 1)}" height="{round(0.94 * height, 1)}"'
    known = math.isfinite(value)
    strength = round(0.06 + 0.94 * abs(value) / top, 3) if known and top else 0.06
    shown = f"{value:.4g}" if known else "not known"
    tip = escape(f"{picture.x_label} {x}, {picture.y_label} {y}: {shown}")
    colour = BELOW if known and value < 0 else ABOVE
    return f'<rect class="{colour}" fill-opacity="{strength}" {place} {size}><title>{tip}</title></rect>'


def _some(numbers: range) -> range:
    """At most a dozen of them."""
    return numbers[:: max(1, -(-len(numbers) // 12))]


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}">{escape(text)}</text>'
