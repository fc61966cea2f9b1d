"""Plots as SVG, of bars and of lines. Pure: numbers to text."""
from __future__ import annotations

from typing import Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 70, 20, 40, 50
COLOURS = ("#8a8f98", "#1f77b4", "#2ca02c", "#d62728")
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "#ccc", dashes: str = "") -> str:
    more = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'


def _frame(title: str, names: Sequence[str], parts: list[str]) -> str:
    legend = []
    for n, name in enumerate(names):
        x = LEFT + n * 150
        legend += [f'<rect x="{x}" y="24" width="10" height="10" fill="{COLOURS[n % len(COLOURS)]}"/>',
                   _text(x + 15, 33, name, "start", 11)]
    body = "\n".join([f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', _text(LEFT, 15, title, "start", 13), *legend, *parts])
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">\n'
            f"{body}\n</svg>\n")


def _axis(top: float, unit: str) -> list[str]:
    parts = []
    for n in range(5):
        y = TOP + INNER_HEIGHT * (1 - n / 4)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y), _text(LEFT - 6, y + 4, f"{top * n / 4:.3g}{unit}", "end", 11)]
    return parts


def bars(title: str, unit: str, names: Sequence[str], groups: dict[str, Sequence[float]], mark: float | None = None) -> str:
    """A group of bars for each key, one for each name. mark: a dashed line at this height."""
    top = max([value for values in groups.values() for value in values] + [mark or 0.0, 1e-9]) * 1.1
    parts, step = _axis(top, unit), INNER_WIDTH / max(1, len(groups))
    width = step * 0.7 / max(1, len(names))
    for n, (group, values) in enumerate(groups.items()):
        for m, value in enumerate(values):
            height, x = INNER_HEIGHT * value / top, LEFT + step * (n + 0.15) + m * width
            parts += [f'<rect x="{x:.1f}" y="{TOP + INNER_HEIGHT - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
                      f'fill="{COLOURS[m % len(COLOURS)]}"/>',
                      _text(x + width / 2, TOP + INNER_HEIGHT - height - 3, f"{value:.3g}", size=10)]
        parts.append(_text(LEFT + step * (n + 0.5), HEIGHT - BOTTOM + 18, group, size=11))
    if mark is not None:
        y = TOP + INNER_HEIGHT * (1 - mark / top)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "#444", "5 4"))
    return _frame(title, names, parts)


def distribution(title: str, unit: str, series: dict[str, Sequence[float]]) -> str:
    """Cumulative shares of each series."""
    top = max([value for values in series.values() for value in values] + [1e-9])
    parts = []
    for n in range(5):
        share, x = n / 4, LEFT + INNER_WIDTH * n / 4
        y = TOP + INNER_HEIGHT * (1 - share)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y), _text(LEFT - 6, y + 4, f"{share:.0%}", "end", 11),
                  _text(x, HEIGHT - BOTTOM + 18, f"{top * share:.3g} {unit}", size=11)]
    for n, values in enumerate(series.values()):
        points, last = [f"{LEFT},{TOP + INNER_HEIGHT:.1f}"], TOP + float(INNER_HEIGHT)
        for m, value in enumerate(sorted(values)):
            x, y = LEFT + INNER_WIDTH * value / top, TOP + INNER_HEIGHT * (1 - (m + 1) / len(values))
            points += [f"{x:.1f},{last:.1f}", f"{x:.1f},{y:.1f}"]
            last = y
        points.append(f"{WIDTH - RIGHT},{last:.1f}")
        parts.append(f'<polyline fill="none" stroke-width="2" stroke="{COLOURS[n % len(COLOURS)]}" points="{" ".join(points)}"/>')
    return _frame(title, list(series), parts)
