"""MkDocs hook: images/pipeline.svg, the graph of dvc.yaml, drawn from top to bottom when the site is built."""

from __future__ import annotations

import sys
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.append(str(Path(__file__).parents[2]))  # mkdocs does not put the project's folder there

from components.common import pipeline

BOX, GAP, ROW = (170, 40), 30, 72  # width and height of a box, pixels between boxes, and from row to row


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "images/pipeline.svg", content=draw(pipeline.read().before())))
    return files


def draw(edges: dict[str, set[str]]) -> str:
    """The SVG of a graph: stage -> the stages right before it. A stage stands as low as its readers allow."""
    order = list(TopologicalSorter(edges).static_order())
    row: dict[str, int] = {}
    for name in reversed(order):
        row[name] = min((row[reader] for reader, makers in edges.items() if name in makers), default=0) - 1
    top = min(row.values())
    rows = [[name for name in order if row[name] == at] for at in range(top, 0)]
    width = max(map(len, rows)) * (BOX[0] + GAP) + GAP
    left: dict[str, tuple[float, int]] = {}
    for at, stages_of_row in enumerate(rows):
        start = (width - len(stages_of_row) * (BOX[0] + GAP) + GAP) / 2
        left |= {name: (start + i * (BOX[0] + GAP), at * ROW + 10) for i, name in enumerate(stages_of_row)}
    lines = [
        f'<line x1="{left[maker][0] + BOX[0] / 2}" y1="{left[maker][1] + BOX[1]}" '
        f'x2="{left[name][0] + BOX[0] / 2}" y2="{left[name][1] - 3}" marker-end="url(#arrow)"/>'
        for name, makers in edges.items()
        for maker in sorted(makers)
    ]
    boxes = [f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/>' for x, y in left.values()]
    names = [f'<text x="{x + BOX[0] / 2}" y="{y + 25}">{escape(name)}</text>' for name, (x, y) in left.items()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {len(rows) * ROW}" '
        'font-family="sans-serif" font-size="15" text-anchor="middle">'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#7986cb"/></marker></defs>'
        f'<g stroke="#7986cb" stroke-width="1.5">{"".join(lines)}</g>'
        f'<g fill="#e8eaf6" stroke="#3f51b5">{"".join(boxes)}</g><g fill="#1a237e">{"".join(names)}</g></svg>'
    )
