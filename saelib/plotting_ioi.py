"""Figures of notebook 05. Same manner as `saelib.plotting`: data and axes in, axes out."""

import pandas as pd
from matplotlib.axes import Axes

from saelib.plotting import COLOURS, MARKERS, shades


def styles(methods: pd.DataFrame) -> dict[str, dict]:
    """Colour, marker and line of each row of `methods` (columns name, kind, alpha): tied in blues by alpha, PCA in orange."""
    tied = methods[methods["kind"] == "tied"]
    blues = shades(tied["alpha"]) if len(tied) else {}
    return {
        row["name"]: {
            "color": blues[row["alpha"]] if row["kind"] == "tied" else COLOURS[row["kind"]],
            "marker": MARKERS[row["kind"]],
            "ls": "--" if "signs" in row["name"] else "-",
        }
        for _, row in methods.iterrows()
    }


def fig3_ioi(table: pd.DataFrame, look: dict[str, dict], axes: tuple[Axes, Axes]) -> tuple[Axes, Axes]:
    """Paper Figure 3: mean KL against the number of patched features (left) and the size of the edit (right), a line per
    name. `table` has name, features, edit, kl, low and high (95% bootstrap over prompts)."""
    for axis, column in zip(axes, ("features", "edit"), strict=True):
        for name, part in table.groupby("name", sort=False):
            axis.plot(part[column], part["kl"], label=name, lw=1.2, ms=3, **look[name])
            axis.fill_between(part[column], part["low"], part["high"], color=look[name]["color"], alpha=0.12, lw=0)
        axis.set_ylim(bottom=0)
    axes[0].set_xscale("symlog", linthresh=1)
    axes[0].set(
        xlabel="patched features (log scale from 1)", ylabel="KL(patched || counterfactual), nats", xlim=(0, None)
    )
    axes[1].set(xlabel="mean edit length, model units", xlim=(0, None))
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return axes


def fig17_layers(table: pd.DataFrame, look: dict[str, dict], axes: list[Axes]) -> list[Axes]:
    """Paper Figure 17: KL against the size of the edit, a panel per hook. `table` as for `fig3_ioi`, with hook."""
    for axis, (hook, rows) in zip(axes, table.groupby("hook", sort=False), strict=True):
        for name, part in rows.groupby("name", sort=False):
            axis.plot(part["edit"], part["kl"], label=name, lw=1.2, ms=3, **look[name])
        axis.set_title(f"layer {hook.split('.')[1]}", fontsize=8)
        axis.set(xlabel="mean edit length", xlim=(0, None), ylim=(0, None))
    axes[0].set_ylabel("KL, nats")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return axes


def x_one_prompt(table: pd.DataFrame, names: tuple[str, str], axes: Axes) -> Axes:
    """Logits of the base's and the counterfactual's name for one prompt as features are patched in order. `table` has
    features, base and counterfactual; `names` label the two."""
    axes.plot(table["features"], table["base"], color="#555555", marker="o", label=f"{names[0]} (base)")
    axes.plot(
        table["features"],
        table["counterfactual"],
        color=COLOURS["tied"],
        marker="s",
        label=f"{names[1]} (counterfactual)",
    )
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="patched features (log scale from 1)", ylabel="logit", xlim=(0, None))
    axes.legend()
    return axes
