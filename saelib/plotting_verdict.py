"""The figure of notebook 07: all verdicts at one look. Data and axes in, axes out."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from saelib.verdict import VERDICTS

COLOURS = dict(zip(VERDICTS, ("#1f5fa8", "#e08a2e", "#8c2d04", "#9a9a9a"), strict=True))
SQUARES = dict(zip(VERDICTS, ("s", "D", "X", "P"), strict=True))  # the shape says the same as the colour
DOTS = {"yes": ("o", "full"), "undecided": ("o", "left"), "no": ("o", "none"), "absent": ("x", "full")}


def x_verdict(table: pd.DataFrame, axes: Axes) -> Axes:
    """A line per statement, in the order of `table` (columns place, statement, verdict, parts): the verdict as a coloured
    symbol, place and statement as text, a dot per part (full: holds; half: undecided; hollow: fails; cross: not measured).
    """
    for height, row in enumerate(table.itertuples()):
        colour, line = COLOURS[row.verdict], {"y": height, "va": "center", "fontsize": 6.5}
        axes.plot(0, height, SQUARES[row.verdict], color=colour, ms=6)
        axes.text(0.25, s=row.place, color="#222222", **line)
        axes.text(1.75, s=row.statement, color="#222222", **line)
        for place, outcome in enumerate(row.parts.split()):
            marker, fill = DOTS[outcome]
            style = {"ms": 4.5, "fillstyle": fill, "mew": 0.9, "color": colour, "markerfacecoloralt": "white"}
            axes.plot(7.3 + 0.22 * place, height, marker, **style)
    verdicts = [Line2D([], [], ls="", marker=SQUARES[name], color=COLOURS[name], ms=6, label=name) for name in VERDICTS]
    for name, (marker, fill) in DOTS.items():
        style = {"marker": marker, "fillstyle": fill, "color": "#444444", "markerfacecoloralt": "white", "ls": ""}
        label = {"yes": "part holds", "no": "fails", "absent": "not measured"}.get(name, name)
        verdicts.append(Line2D([], [], ms=4.5, label=label, **style))
    axes.figure.legend(handles=verdicts, loc="outside lower center", ncols=4, fontsize=7)
    axes.set(xlim=(-0.15, 9.2), ylim=(len(table) - 0.4, -0.6))
    axes.axis("off")
    return axes
