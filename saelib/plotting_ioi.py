"""Figures of notebook 05. Same manner as `saelib.plotting`: data and axes in, axes out."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from saelib.plotting import COLOURS, MARKERS, shades

#: Tied dictionaries in blues by alpha, every other name with the colour of its kind.
KINDS = {"standard": "standard", "TopK": "topk", "PCA": "pca", "random": "random", "default": "default", "tied": "tied"}
PATCHED = "patched features (log scale from 1)"


def styles(names: Sequence[str]) -> dict[str, dict]:
    """Colour, marker and line of each of `names`, whose first word says the kind: "tied α 0.001", "PCA signed"."""
    blues = shades(names, "Blues", 0.35) | shades([name for name in names if name.startswith("tied α")], "Blues", 0.4)
    kinds = {name: KINDS[name.split()[0]] for name in names}
    look = {
        name: {"color": blues[name] if kind == "tied" else COLOURS[kind], "marker": MARKERS[kind], "ls": "-"}
        for name, kind in kinds.items()
    }
    for name in names:
        look[name] |= {"ls": "--"} if "negative" in name or " R " in name or name.endswith("α 0") else {}
    return look


def lines(table: pd.DataFrame, look: dict[str, dict], column: str, axes: Axes, banded=None) -> Axes:
    """Mean KL against `column` ("features" or "edit"), a line per name, with its band (columns low, high) if in `banded`."""
    for name, part in table.groupby("name", sort=False):
        axes.plot(part[column], part["kl"], label=name, lw=1.2, ms=3, **look[name])
        if banded is None or name in banded:
            axes.fill_between(part[column], part["low"], part["high"], color=look[name]["color"], alpha=0.12, lw=0)
    if column == "features":
        log_from_one(axes)
    axes.set(
        xlim=(0, None), ylim=(0, None), xlabel=PATCHED if column == "features" else "mean edit length, model units"
    )
    return axes


def log_from_one(axes: Axes) -> None:
    """Horizontal axis of counts: logarithmic from 1, with 0 beside it."""
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])


def legend(axes: Axes, columns: int = 4) -> None:
    """One legend below all panels."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=7)


def fig3_ioi(table: pd.DataFrame, look: dict[str, dict], axes, banded: Sequence[str]) -> None:
    """Paper Figure 3: mean KL against the number of patched features (left) and the size of the edit (right); above on the
    held-out prompts, below on those that selected the features. `table` has name, side, features, edit, kl, low, high."""
    for row, (side, said) in zip(axes, {"report": "held-out", "select": "selection"}.items(), strict=True):
        for axis, column in zip(row, ("features", "edit"), strict=True):
            lines(table[table["side"] == side], look, column, axis, banded)
        row[0].set_ylabel(f"KL on {said} prompts, nats")
    legend(axes[0][0])


def fig17_layers(table: pd.DataFrame, look: dict[str, dict], axes, banded: Sequence[str]) -> None:
    """Paper Figure 17: KL against the number of features (above) and the size of the edit (below), a panel per hook.
    `table` as for `fig3_ioi`, with hook, held-out prompts only."""
    for column, (hook, part) in enumerate(table.groupby("hook", sort=False)):
        for row, what in enumerate(("features", "edit")):
            lines(part, look, what, axes[row][column], banded)
        axes[0][column].set_title(f"layer {hook.split('.')[1]}", fontsize=8)
    for axis in axes.flat:
        axis.set_xlabel("patched features" if axis in axes[0] else "mean edit length")
    for axis in axes[0]:
        axis.set_xticks([0, 10, 1000], ["0", "10", "1000"])
    for axis in axes[:, 0]:
        axis.set_ylabel("KL, nats")
    legend(axes[0][0])


def x_quality(tables: dict[str, pd.DataFrame], axes: Sequence[Axes]) -> None:
    """KL against the number of features for dictionaries of growing quality, a panel per entry of `tables` (title: curves
    with name, features, kl, low, high), in shades from the smallest to the largest; "PCA signed" for comparison."""
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        names = list(dict.fromkeys(table["name"]))
        graded = dict(zip(names, shades(range(len(names)), "Purples", 0.35).values(), strict=True))
        look = {name: {"color": colour, "marker": "o"} for name, colour in graded.items()} | styles(["PCA signed"])
        lines(table, look, "features", axis).set_title(title, fontsize=8)
        axis.legend(fontsize=7, loc="lower left")
    axes[0].set_ylabel("KL on held-out prompts, nats")


def x_pruning(pruned: pd.DataFrame, curves: pd.DataFrame, look: dict[str, dict], axes) -> None:
    """Pruning against attribution. KL on the selecting (above) and held-out (below) prompts against features and edit: lines
    by attribution (`curves`), open symbols the sets of pruning (`pruned`: name, side, features, edit, kl). Right: share of
    each set that attribution would take too (column shared; dotted: chance) and KL over attribution's (column gain)."""

    def dots(axis, part, x, y):
        for name, own in part.groupby("name", sort=False):
            axis.plot(own[x], own[y], look[name]["marker"], color=look[name]["color"], mfc="none", ms=6)

    for row, side in zip(axes, ("select", "report"), strict=True):
        part = pruned[pruned["side"] == side]
        for axis, column in zip(row, ("features", "edit"), strict=False):
            lines(curves[curves["side"] == side], look, column, axis, banded=[]).set_xscale("linear")
            dots(axis, part, column, "kl")
            axis.set(xlim=(0, 2.5 * part[column].max()), ylim=(0.85 * part["kl"].min(), None))
            axis.set_xlabel("patched features" if column == "features" else "mean edit length")
        row[0].set_ylabel(f"KL on {'held-out' if side == 'report' else 'selection'} prompts, nats")
        dots(row[2], part, "features", "shared" if side == "select" else "gain")
        row[2].set(xlabel="features that pruning keeps", xlim=(0, None))
    for name, own in pruned.sort_values("features").groupby("name"):
        axes[0][2].plot(own["features"], own["chance"], ":", color=look[name]["color"])
    axes[0][2].set(ylabel="share in attribution's set", ylim=(0, 1.05))
    axes[1][2].set(ylabel="KL over attribution's")
    legend(axes[0][0])


def x_one_prompt(table: pd.DataFrame, names: tuple[str, str], axes: Axes) -> None:
    """Logits of the base's and the counterfactual's name for one prompt as features are patched in order. `table` has
    features, base and counterfactual; `names` label the two."""
    looks = {"base": {"color": "#555555", "marker": "o"}, "counterfactual": {"color": COLOURS["tied"], "marker": "s"}}
    for (side, look), name in zip(looks.items(), names, strict=True):
        axes.plot(table["features"], table[side], label=f"{name} ({side})", **look)
    log_from_one(axes)
    axes.set(xlabel=PATCHED, ylabel="logit", xlim=(0, None))
    axes.legend()
