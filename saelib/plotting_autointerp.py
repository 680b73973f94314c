"""Figures of notebook 04. Same manner as `plotting`: data and axes in, axes out; columns are named in each docstring."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from saelib.plotting import COLOURS, LABELS, MARKERS, shades

STYLE = {
    "tied": (LABELS["tied"], COLOURS["tied"], MARKERS["tied"]),
    "untied": (LABELS["untied"], COLOURS["untied"], MARKERS["untied"]),
    "topk": (LABELS["topk"], COLOURS["topk"], MARKERS["topk"]),
    "ica_code": ("ICA, signs as they came", "#c9b36b", "<"),
    "ica": ("ICA, signs fixed", COLOURS["ica"], MARKERS["ica"]),
    "pca_code": ("PCA, signed", COLOURS["pca"], MARKERS["pca"]),
    "random": ("random directions, ReLU", COLOURS["random"], MARKERS["random"]),
    "default": ("default basis, ReLU", COLOURS["default"], "d"),
    "ica_topk": ("ICA, top K", "#5c4712", "h"),
    "ica_topk_code": ("ICA, top K, the paper's code", "#b39b52", "8"),
    "pca_topk": ("PCA, top K", "#a85a10", ">"),
    "pca_topk_code": ("PCA, top K, the paper's code", "#eeb06f", "<"),
}


def _scores(table: pd.DataFrame, axes: Axes, part: str = "both") -> Axes:
    """Points with 95% intervals, methods side by side in each layer. Columns layer, method, `part`, `part`_low, `part`_high."""
    layers = sorted(table["layer"].unique())
    names = [name for name in STYLE if name in set(table["method"])]
    for place, name in enumerate(names):
        label, colour, marker = STYLE[name]
        rows = table[table["method"] == name].set_index("layer")
        x = np.array([layers.index(layer) for layer in rows.index]) + 0.7 * (place + 0.5 - len(names) / 2) / len(names)
        error = [rows[part] - rows[f"{part}_low"], rows[f"{part}_high"] - rows[part]]
        axes.errorbar(x, rows[part], yerr=error, fmt=marker, color=colour, label=label, capsize=2, lw=1)
    axes.axhline(0, color="#444444", lw=0.6)
    axes.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("mean correlation, " + {"both": "top and random", "random": "random only", "top": "top only"}[part])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def fig2_scores(table: pd.DataFrame, axes: Axes) -> Axes:
    """Paper Figure 2: top-and-random score by layer and method (columns of `_scores`)."""
    return _scores(table, axes)


def fig9_random_only(table: pd.DataFrame, axes: Axes) -> Axes:
    """Paper Figure 9: the same features scored on the random fragments alone."""
    return _scores(table, axes, "random")


def fig18_top_k(table: pd.DataFrame, axes: Axes) -> Axes:
    """Paper Figure 18: PCA and ICA that keep as many codes as the dictionary, beside those that keep all."""
    return _scores(table, axes)


def fig10_mlp(table: pd.DataFrame, axes: Axes) -> Axes:
    """Paper Figure 10: methods on the hidden layer of an MLP, a tick per test. Columns method, ratio, part, mean, low, high."""
    parts = ["both", "top", "random"]
    rows = list(table.drop_duplicates(["method", "ratio"]).itertuples())
    for place, row in enumerate(rows):
        label, colour, marker = STYLE[row.method]
        label = f"{label}, R = {row.ratio:g}" if row.method in ("tied", "untied") else label
        group = table[(table["method"] == row.method) & (table["ratio"] == row.ratio)].set_index("part").loc[parts]
        x = np.arange(3) + 0.7 * (place + 0.5 - len(rows) / 2) / len(rows)
        error = [group["mean"] - group["low"], group["high"] - group["mean"]]
        face = "white" if row.method in ("tied", "untied") and row.ratio == table["ratio"].min() else colour
        axes.errorbar(x, group["mean"], yerr=error, fmt=marker, color=colour, mfc=face, label=label, capsize=2, lw=1)
    axes.axhline(0, color="#444444", lw=0.6)
    axes.set_xticks(range(3), ["top and random", "top only", "random only"])
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("mean correlation")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def fig8_sizes(table: pd.DataFrame, axes: Axes) -> Axes:
    """Paper Figure 8: score against dictionary size. Columns ratio, part ("both", "top", "random"), mean, low, high."""
    names = {"top": "top only", "both": "top and random", "random": "random only"}
    for (part, label), colour in zip(names.items(), shades(range(3)).values(), strict=True):
        rows = table[table["part"] == part].sort_values("ratio")
        error = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
        axes.errorbar(rows["ratio"], rows["mean"], yerr=error, marker="o", color=colour, label=label, capsize=2)
    ratios = sorted(table["ratio"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set(xlabel="features per dimension, R (log scale)", ylabel="mean correlation", ylim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def x_one_feature(table: pd.DataFrame, axes: Axes) -> Axes:
    """What the rule predicts and what the feature does, over the 640 tokens. Columns token, actual, predicted (0 to 10)."""
    axes.bar(table["token"], table["actual"], width=1.6, color=COLOURS["tied"], label="activation")
    axes.bar(table["token"], -table["predicted"], width=1.6, color=COLOURS["pca"], label="prediction (downward)")
    for edge in range(64, len(table), 64):
        axes.axvline(edge - 0.5, color="#bbbbbb", lw=0.6)
    axes.set_xticks([160, 480], ["five of the top twenty", "five random ones"])
    axes.set_yticks([-10, -5, 0, 5, 10], ["10", "5", "0", "5", "10"])
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="strength, 0 to 10", xlim=(-1, len(table)))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def x_random_weights(table: pd.DataFrame, axes: Axes) -> Axes:
    """The test on trained and on shuffled weights. Columns weights, method, both, both_low, both_high."""
    looks = {"trained": (COLOURS["tied"], "o"), "blocks shuffled": ("#777777", "s"), "all shuffled": ("#bbbbbb", "D")}
    tested = [weights for weights in looks if weights in set(table["weights"])]
    for place, weights in enumerate(tested):
        (colour, marker), rows = looks[weights], table[table["weights"] == weights]
        x = np.arange(len(rows)) + 0.2 * (place - (len(tested) - 1) / 2)
        error = [rows["both"] - rows["both_low"], rows["both_high"] - rows["both"]]
        axes.errorbar(x, rows["both"], yerr=error, fmt=marker, color=colour, label=weights, capsize=2)
    names = table["method"].drop_duplicates()
    axes.set_xticks(range(len(names)), [STYLE[name][0].replace(", ", "\n").replace(" (", "\n(") for name in names])
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, None)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel("mean correlation, top and random")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return axes
