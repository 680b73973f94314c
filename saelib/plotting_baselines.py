"""Figures of notebook 03. Same manner as `saelib.plotting`: data and axes in, axes out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from saelib.plotting import COLOURS, LABELS, MARKERS, hook_label, plain_log

EDGE = 1.16  # what has a higher FVU is drawn here


def x_baselines(table: pd.DataFrame, axes: np.ndarray) -> np.ndarray:
    """FVU against mean L0, a panel per hook, a line per method. `table` has hook, method, form, l0, fvu, fvu_interval;
    form is "line" (trained dictionaries, top-K) or "rectified" (hollow symbols, not joined). `axes` [rows, columns]."""
    handles = {}
    for axis in axes.flat[table["hook"].nunique() :]:
        axis.axis("off")
    for axis, (hook, rows) in zip(axes.flat, table.groupby("hook", sort=False), strict=False):
        for (method, form), part in rows.sort_values("l0").groupby(["method", "form"], sort=False):
            style = {"color": COLOURS[method], "marker": MARKERS[method], "lw": 1.2 * (form == "line")}
            style |= {"mfc": "white"} if form == "rectified" else {}
            error = np.abs(np.array(part["fvu_interval"].tolist()).T - part["fvu"].to_numpy())
            error[:, part["fvu"] >= EDGE] = 0
            drawn = axis.errorbar(part["l0"], part["fvu"].clip(upper=EDGE), yerr=error, **style)
            if form == "line":
                handles[LABELS[method]] = drawn
        axis.axhline(1, color="#444444", ls=":", lw=1)
        axis.set(xscale="log", ylim=(0, EDGE + 0.04))
        axis.set_title(hook_label(hook), fontsize=8)
        plain_log(axis.xaxis)
    for axis in axes[-1]:
        axis.set_xlabel("active features, L0 (log scale)")
    for axis in axes[:, 0]:
        axis.set_ylabel("unexplained variance, FVU")
    axes.flat[0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return axes


def x_shared_directions(tables: dict[str, pd.DataFrame], axes: list[Axes]) -> list[Axes]:
    """Heat maps, one for each square table: rows are the method whose directions look for a partner among the columns."""
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        values = table.to_numpy()
        axis.imshow(values, vmin=0, vmax=1, cmap="Blues")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > 0.6 else "#222222"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
        names = [LABELS.get(name, name) for name in table.columns]
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(title, fontsize=8)
        axis.grid(False)
    axes[0].set_ylabel("directions of")
    for axis in axes:
        axis.set_xlabel("look for a partner among those of")
    axes[1].tick_params(labelleft=False)
    return axes


def x_code_shape(table: pd.DataFrame, axes: tuple[Axes, Axes]) -> tuple[Axes, Axes]:
    """Distribution over features of the skew of signed codes (left) and the kurtosis of ReLU'd ones (right), as the share
    of features at or below. Columns method, measure ("skew", "kurtosis"), value."""
    for axis, measure in zip(axes, ("skew", "kurtosis"), strict=True):
        for method, part in table[table["measure"] == measure].groupby("method", sort=False):
            ordered = np.sort(part["value"].dropna())
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            axis.plot(ordered, share, color=COLOURS[method], ls="-" if method == "tied" else "--", label=LABELS[method])
        axis.set_ylim(0, 1.02)
    axes[0].set(
        xscale="symlog",
        xlabel="skew of the signed code (linear within ±2, then log)",
        ylabel="share of features at or below",
    )
    axes[0].set_xscale("symlog", linthresh=2)
    axes[0].set_xticks([-10, -2, -1, 0, 1, 2, 10], ["-10", "-2", "-1", "0", "1", "2", "10"])
    axes[0].axvline(0, color="#bbbbbb", lw=0.8)
    axes[1].set(xscale="log", xlabel="kurtosis of the rectified code (log scale)")
    axes[1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[1].legend(loc="lower right", fontsize=7)
    return axes
