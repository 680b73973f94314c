"""Figures of notebook 00: the pipeline and the toy world."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from saelib.plotting import COLOURS, LABELS, MARKERS, shades


def x_toy_recovery(table: pd.DataFrame, axes: Axes) -> Axes:
    """Toy data: histogram over true features of the largest cosine with a direction of each method (method, cosine)."""
    bins = np.linspace(0, 1, 41)
    for method, part in table.groupby("method", sort=False):
        label = f"{LABELS[method]}, mean {part['cosine'].mean():.2f}"
        axes.hist(part["cosine"], bins=bins, color=COLOURS[method], alpha=0.6, label=label)
    axes.set(xlabel="largest cosine of a true feature with a learned direction", ylabel="number of true features")
    axes.legend()
    return axes


def x_toy_training(table: pd.DataFrame, axes: Axes) -> Axes:
    """Toy data: MMCS of the true features while the autoencoder trains. Columns step, mmcs, and the level of PCA."""
    axes.plot(table["step"], table["mmcs"], color=COLOURS["tied"], label=LABELS["tied"])
    axes.axhline(table["pca"].iloc[0], color=COLOURS["pca"], ls="--", label=LABELS["pca"])
    axes.set(xlabel="training step", ylabel="MMCS with the true features")
    axes.set_ylim(0, 1.02)
    axes.legend()
    return axes


def x_pipeline(steps: pd.DataFrame, axes: Axes) -> Axes:
    """The pipeline as boxes from left to right. Columns: title, text, notebook."""
    for place, row in enumerate(steps.itertuples()):
        learned = row.title == "dictionary"
        face = "#dbe8f6" if learned else "#f4f4f4"
        axes.add_patch(
            FancyBboxPatch((place * 1.25, 0), 1, 1, boxstyle="round,pad=0.02", fc=face, ec="#555555", lw=0.8)
        )
        axes.text(place * 1.25 + 0.5, 0.8, row.title, ha="center", va="center", weight="bold")
        axes.text(place * 1.25 + 0.5, 0.45, row.text, ha="center", va="center", fontsize=7)
        axes.text(place * 1.25 + 0.5, -0.15, row.notebook, ha="center", va="center", fontsize=7, color="#555555")
        if place:
            axes.annotate("", (place * 1.25 - 0.04, 0.5), (place * 1.25 - 0.21, 0.5), arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(-0.1, len(steps) * 1.25 - 0.15), ylim=(-0.3, 1.1))
    axes.axis("off")
    return axes


def x_toy_map(table: pd.DataFrame, axes: np.ndarray) -> np.ndarray:
    """Toy data: MMCS (upper row) and share of dead features (lower) over alpha and size, a column per kind and world.

    `axes` is 2 x (kinds x worlds). `table` has kind, correlated, ratio, alpha, mmcs, dead.
    """
    rows = (("mmcs", "Blues", "MMCS with the truth"), ("dead", "Oranges", "share of dead features"))
    panels = list(table.groupby(["kind", "correlated"]))
    for place, (measure, colours, label) in enumerate(rows):
        for axis, ((kind, correlated), part) in zip(axes[place], panels, strict=True):
            part = part.assign(alpha=1000 * part["alpha"])
            grid = part.pivot(index="ratio", columns="alpha", values=measure)
            grid.index, grid.columns = ([f"{value:g}" for value in names] for names in (grid.index, grid.columns))
            numbers = grid.map(lambda value: f"{value:.2f}".removeprefix("0"))
            style = {"vmin": 0, "vmax": 1, "cmap": colours, "fmt": "", "annot_kws": {"fontsize": 6}}
            sns.heatmap(grid, annot=numbers, ax=axis, cbar=axis is axes[place, -1], cbar_kws={"label": label}, **style)
            axis.invert_yaxis()
            axis.grid(visible=False)
            axis.tick_params(length=0, labelsize=7, rotation=0)
            axis.set(xlabel="", ylabel="")
            if place == 0:
                axis.set_title(f"{kind},\n{'correlated' if correlated else 'independent'}", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("α (thousandths)")
    for axis in axes[:, 0]:
        axis.set_ylabel("size, learned / true")
    return axes


def x_toy_shrinkage(table: pd.DataFrame, axes: tuple[Axes, Axes]) -> tuple[Axes, Axes]:
    """Toy data: recovered against true strength of the tied form (left); slope of the two against alpha (right).

    `table` has a row per seed, kind, alpha and bin of the true strength: strength (its middle), recovered, alone (what one
    feature by itself would keep), slope and theory (that of ``alone``). Bars: range over the seeds.
    """
    tied = table[table["kind"] == "tied"].dropna(subset=["slope"])
    for alpha, shade in shades(tied["alpha"], "plasma", 0.0, 0.85).items():
        means = tied[tied["alpha"] == alpha].groupby("strength")[["recovered", "alone"]].mean()
        axes[0].plot(means.index, means["recovered"], color=shade, marker="o", ms=2.5, label=f"{1000 * alpha:g}")
        axes[0].plot(means.index, means["alone"], color=shade, ls="--", lw=0.8)
    axes[0].set(xlabel="true strength", ylabel="recovered strength", xlim=(0, 1), ylim=(0, 1))
    if axes[0].lines:  # a short run finds no feature
        axes[0].legend(title="tied, α (thousandths)")
    slopes = table.drop_duplicates(["seed", "kind", "alpha"])
    for kind, part in slopes.groupby("kind"):
        spread = part.groupby("alpha")["slope"].agg(["mean", "min", "max"])
        bars = [spread["mean"] - spread["min"], spread["max"] - spread["mean"]]
        style = {"color": COLOURS[kind], "marker": MARKERS[kind], "capsize": 2}
        axes[1].errorbar(1000 * spread.index, spread["mean"], yerr=bars, label=LABELS[kind], **style)
    theory = slopes.groupby("alpha")["theory"].first()
    axes[1].plot(1000 * theory.index, theory, color="#444444", ls="--", label="one feature alone")
    axes[1].set(xscale="log", ylim=(0, 1.02), xlabel="α (thousandths, log scale)", ylabel="slope of recovered on true")
    axes[1].set_xticks(1000 * theory.index, [f"{1000 * alpha:g}" for alpha in theory.index], minor=False)
    axes[1].minorticks_off()
    axes[1].legend()
    return axes
