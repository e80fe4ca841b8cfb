"""Plots as inline SVG for the page: drawn from its own style sheet, so that light and dark, print and phone all work.

Sizes are in the units of the view box (W x H), which the page stretches to its column.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise

from pegbox.report.axes import Scale, scale
from pegbox.report.points import Line, Lines, Point, Points

__all__ = ["COLOURS", "bar_chart", "line_chart", "scatter_chart"]

COLOURS = 8  # in the style sheet
W, H = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 44


def scatter_chart(plot: Points) -> str:
    """Points with whiskers and names beside them."""
    xs = [v for p in plot.points for v in (p.x, *(p.x_range or ()))]
    ys = [v for p in plot.points for v in (p.y, *(p.y_range or ()))]
    x, y = scale(xs, zero=plot.zero_x, log=plot.log_x, pad=0.1), scale(ys, zero=plot.zero_y and _near_zero(ys))
    body = [_grid(x, y), _axis_labels(plot.x_label, plot.y_label)]
    if plot.zero_x:
        body.append(_rule(_px(x, 0), TOP, _px(x, 0), H - BOTTOM))
    if y.low <= 0 <= y.high and plot.zero_y:
        body.append(_rule(LEFT, _py(y, 0), W - RIGHT, _py(y, 0)))
    body += [_whiskers(p, x, y) for p in plot.points]
    body += [_dot(p, x, y) for p in plot.points]
    body += _names(plot.points, x, y)
    return _svg(plot.title, body)


def _near_zero(values: list[float]) -> bool:
    """Whether a range comes near zero, compared with its extent, so that showing zero costs little room."""
    low, high = min(values), max(values)
    return low <= 0 <= high or min(abs(low), abs(high)) <= 1.5 * (high - low)


def line_chart(plot: Lines, joined: bool = True) -> str:
    """Lines (or their points alone, where not `joined`); the legend is the page's."""
    xs, ys = [v for line in plot.lines for v in line.xs], [v for line in plot.lines for v in line.ys]
    x, y = scale(xs, log=plot.log_x, pad=0.0), scale(ys, log=plot.log_y)
    body = [_grid(x, y), _axis_labels(plot.x_label, plot.y_label)]
    draw = _path if joined else _dots
    body += [draw(line, x, y, marks=len(line.xs) <= 12) for line in plot.lines if line.xs]
    return _svg(plot.title, body)


def bar_chart(plot: Lines) -> str:
    """Bars from zero; several series stand beside one another at each x."""
    places = sorted({v for line in plot.lines for v in line.xs})
    gap = min((b - a for a, b in pairwise(places)), default=1.0)
    xs = [places[0] - gap / 2, places[-1] + gap / 2] if places else []
    x, y = scale(xs, pad=0.0), scale([v for line in plot.lines for v in line.ys], zero=True)
    body = [_grid(x, y), _axis_labels(plot.x_label, plot.y_label)]
    width = 0.86 * gap / max(len(plot.lines), 1)
    for place, line in enumerate(plot.lines):
        start = -0.43 * gap + place * width
        body += [_bar(line, a + start, a + start + width, b, x, y) for a, b in zip(line.xs, line.ys)]
    return _svg(plot.title, body)


def _bar(line: Line, left: float, right: float, value: float, x: Scale, y: Scale) -> str:
    low, high = sorted((_py(y, 0.0), _py(y, value)))
    tip = f"{line.name}: {value:.4g}" if line.name else f"{value:.4g}"
    size = f'width="{round(_px(x, right) - _px(x, left), 1)}" height="{round(high - low, 1)}"'
    corner = f'x="{_px(x, left)}" y="{low}"'
    return f'<rect class="f{line.index % COLOURS}" {corner} {size}><title>{escape(tip)}</title></rect>'


def _dots(line: Line, x: Scale, y: Scale, marks: bool = True) -> str:
    return "".join(
        f'<circle class="f{line.index % COLOURS}" cx="{_px(x, a)}" cy="{_py(y, b)}" r="3">'
        f"<title>{escape(line.name)}: {a:.4g}, {b:.4g}</title></circle>"
        for a, b in zip(line.xs, line.ys, strict=True)
    )


def _svg(title: str, body: list[str]) -> str:
    return f'<svg class="chart" viewBox="0 0 {W} {H}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'


def _px(x: Scale, value: float) -> float:
    return round(LEFT + x(value) * (W - LEFT - RIGHT), 1)


def _py(y: Scale, value: float) -> float:
    return round(H - BOTTOM - y(value) * (H - TOP - BOTTOM), 1)


def _grid(x: Scale, y: Scale) -> str:
    out = []
    for tick in y.ticks:
        at = _py(y, tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{W - RIGHT}" y1="{at}" y2="{at}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{y.label(tick)}</text>')
    for tick in x.ticks:
        at = _px(x, tick)
        out.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{H - BOTTOM}"/>')
        out.append(f'<text class="tick" x="{at}" y="{H - BOTTOM + 17}" text-anchor="middle">{x.label(tick)}</text>')
    return "".join(out)


def _axis_labels(x_label: str, y_label: str) -> str:
    across, down = LEFT + (W - LEFT - RIGHT) / 2, TOP + (H - TOP - BOTTOM) / 2
    centred = 'class="label" text-anchor="middle"'
    return (
        f'<text {centred} x="{across}" y="{H - 6}">{escape(x_label)}</text>'
        f'<text {centred} transform="translate(13 {down}) rotate(-90)">{escape(y_label)}</text>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _whiskers(p: Point, x: Scale, y: Scale) -> str:
    at_x, at_y, out = _px(x, p.x), _py(y, p.y), []
    if p.y_range:
        out.append(f'<line x1="{at_x}" x2="{at_x}" y1="{_py(y, p.y_range[0])}" y2="{_py(y, p.y_range[1])}"/>')
    if p.x_range:
        out.append(f'<line y1="{at_y}" y2="{at_y}" x1="{_px(x, p.x_range[0])}" x2="{_px(x, p.x_range[1])}"/>')
    return f'<g class="whisker s{p.index % COLOURS}">{"".join(out)}</g>'


def _dot(p: Point, x: Scale, y: Scale) -> str:
    tip = f"{p.name}: {p.x:.4g}, {p.y:.4g}"
    return (
        f'<circle class="dot f{p.index % COLOURS}" cx="{_px(x, p.x)}" cy="{_py(y, p.y)}" r="5.5">'
        f"<title>{escape(tip)}</title></circle>"
    )


def _names(points: list[Point], x: Scale, y: Scale) -> list[str]:
    """Names beside the dots, moved up where they would run into one another."""
    out: list[str] = []
    taken: list[tuple[float, float, float]] = []  # (start, end, y) of the names so far
    for p in sorted(points, key=lambda p: -_py(y, p.y)):
        left = _px(x, p.x) > W - RIGHT - 12 - 7 * len(p.name)
        at_x, at_y = _px(x, p.x) + (-9 if left else 9), _py(y, p.y) - 8
        width = 7 * len(p.name)
        start = at_x - width if left else at_x
        while any(abs(at_y - b) < 14 and start < e and s < start + width for s, e, b in taken) and at_y > TOP + 14:
            at_y -= 7
        taken.append((start, start + width, at_y))
        anchor = "end" if left else "start"
        out.append(f'<text class="name" x="{at_x}" y="{round(at_y, 1)}" text-anchor="{anchor}">{escape(p.name)}</text>')
    return out


def _path(line: Line, x: Scale, y: Scale, marks: bool) -> str:
    spots = [(_px(x, a), _py(y, b)) for a, b in zip(line.xs, line.ys, strict=True)]
    d = "M" + "L".join(f"{a} {b}" for a, b in spots)
    dashed = " dashed" if line.dashed else ""
    colour = line.index % COLOURS
    dots = "".join(f'<circle class="f{colour}" cx="{a}" cy="{b}" r="3"/>' for a, b in spots) if marks else ""
    return f'<path class="line s{colour}{dashed}" d="{d}"><title>{escape(line.name)}</title></path>{dots}'
