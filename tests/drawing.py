"""The import graph as a picture: osp.py on top, the slices below it, then the kernel in rows.

A module of the kernel stands above all that it imports; an arrow is left out where others lead
there, too. Numbers are whole and sets are sorted, so that every Python draws the same bytes.
"""

from __future__ import annotations

from collections import defaultdict
from graphlib import TopologicalSorter
from itertools import pairwise

HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {}">
<style>
svg {{ color: #1f2328 }} @media (prefers-color-scheme: dark) {{ svg {{ color: #e6edf3 }} }}
text {{ font: 12px ui-monospace, Menlo, Consolas, monospace; text-anchor: middle }}
text, marker {{ fill: currentColor }}
rect, path {{ stroke: currentColor; stroke-opacity: .6; fill-opacity: .16 }}
</style>
<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"
 markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z" style="fill-opacity: 1"/></marker>
"""
ARROW = '<path d="{}" fill="none" marker-end="url(#tip)"/>\n'
MIDDLE, TOP, ROW = 598, 176, 56  # of the kernel; its first row of boxes; how high a row is


def draw(kernel: dict[str, set[str]], slices: list[str], agents: list[str]) -> str:
    """Return an SVG of who imports whom in the kernel, below the slices and beside the agents."""
    row, arrows = layers(kernel)
    x, high = arranged(row, arrows), max(row.values())
    y = {name: TOP + (high - at) * ROW for name, at in row.items()}
    shelf = spread(dict.fromkeys(slices, 480))
    parts = [
        box("osp.py knows everyone", 480, 4, 28, 952, "#d4a72c"),
        box("slices/ import kernel/, and no other slice", 480, 54, 62, 952, "#2da44e"),
        box("plugins/ import agent alone", 106, 140, high * ROW + 68, 204, "#bf3989"),
        box("kernel/ imports what stands below", MIDDLE, 140, high * ROW + 68, 716, "#0969da"),
        *(box(name, shelf[name], 84) for name in slices),
        *(box(name, x[name], y[name]) for name in kernel),
        *(box(name, 106, TOP + 28 * n) for n, name in enumerate(agents)),
        *(arrow([(x[name], y[name]) for name in names]) for names in arrows),
        *(ARROW.format(f"M{MIDDLE} {start}V{end}") for start, end in ((32, 54), (116, 140))),
        ARROW.format(f"M208 {y['agent'] + 12}H{x['agent'] - 24}"),
    ]
    return f"{HEAD.format(high * ROW + 212)}{''.join(parts)}</svg>\n"


def layers(kernel: dict[str, set[str]]) -> tuple[dict[str, int], list[list[str]]]:
    """Return in which row each module stands, from the bottom, and the arrows between them.

    Where an arrow passes a row it has a place of its own there, with a name.
    """
    below: dict[str, set[str]] = {}
    row: dict[str, int] = {}
    for name in TopologicalSorter(kernel).static_order():
        below[name] = kernel[name].union(*(below[other] for other in kernel[name]))
        row[name] = 1 + max((row[other] for other in kernel[name]), default=-1)
    thin = {m: kernel[m].difference(*(below[other] for other in kernel[m])) for m in sorted(kernel)}
    for name in [name for name in thin if not thin[name]]:  # as high as it can stand
        row[name] = min((row[m] - 1 for m in thin if name in thin[m]), default=max(row.values()))
    arrows = []
    for name, target in [(user, target) for user in thin for target in sorted(thin[user])]:
        passed = {f"{name}>{target}>{at}": at for at in range(row[name] - 1, row[target], -1)}
        row |= passed
        arrows.append([name, *passed, target])
    return row, arrows


def arranged(row: dict[str, int], arrows: list[list[str]]) -> dict[str, int]:
    """Return where the middle of each name is, near to those that it has an arrow with."""
    near: dict[str, list[str]] = defaultdict(list)
    for upper, lower in [pair for names in arrows for pair in pairwise(names)]:
        near[upper].append(lower)
        near[lower].append(upper)
    x = dict.fromkeys(row, MIDDLE)
    down = range(max(row.values()), -1, -1)
    for at in [*down, *down[::-1]] * 30:
        names = [name for name in row if row[name] == at]
        wish = {name: [x[other] for other in near[name] or [name]] for name in names}
        x |= spread({name: sum(wish[name]) // len(wish[name]) for name in names})
    left, wide = min(x.values()), max(x.values()) - min(x.values())
    return {name: 272 + (at - left) * 628 // wide for name, at in x.items()}


def spread(wish: dict[str, int]) -> dict[str, int]:
    """Return places in a row, so that nothing overlaps; the agents' contract is the first."""
    at, edge = {}, 0
    for name in sorted(wish, key=lambda name: (name != "agent", wish[name], name)):
        at[name] = max(wish[name], edge + width(name) // 2)
        edge = at[name] + width(name) // 2 + 10
    shift = sum(at[name] - wish[name] for name in at) // len(at)
    return {name: at[name] - shift for name in at}


def width(name: str) -> int:
    return 4 if ">" in name else 8 * len(name) + 8


def box(says: str, x: int, y: int, tall: int = 24, wide: int = 0, fill: str = "none") -> str:
    wide = wide or width(says)
    rect = (
        f'<rect x="{x - wide // 2}" y="{y}" width="{wide}" height="{tall}" rx="5" fill="{fill}"/>'
    )
    return f'{rect}<text x="{x}" y="{y + 16}">{says}</text>\n'


def arrow(points: list[tuple[int, int]]) -> str:
    """Return an arrow from a box to another; through the rows between it goes straight down."""
    path = f"M{points[0][0]} {points[0][1] + 24}"
    for (x, y), (to, down) in pairwise(points):
        path += f"V{y + 24}C{x} {y + 42} {to} {down - 18} {to} {down}"
    return ARROW.format(path)
