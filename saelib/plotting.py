"""One look for all figures and one way to save; figures of notebooks 01 and 02. Functions take data and axes, return axes."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saelib import files
from saelib.paths import FIGURES

NARROW, WIDE = (3.3, 2.6), (6.8, 2.8)  # inches: one column, two columns

#: A method keeps its colour and marker in every figure. Learned dictionaries are blue and violet, baselines grey to orange.
COLOURS = {"tied": "#1f5fa8", "untied": "#8e44ad", "standard": "#00838f", "topk": "#b8336a"}
COLOURS |= {"pca": "#e08a2e", "random": "#7f7f7f", "ica": "#8a6d1f", "default": "#333333"}
MARKERS = {"tied": "o", "untied": "s", "standard": "D", "topk": "v", "pca": "^", "random": "x"}
MARKERS |= {"ica": "P", "default": "<"}
LABELS = {"tied": "tied (the paper's)", "untied": "untied", "standard": "standard", "topk": "TopK"}
LABELS |= {"pca": "PCA", "random": "random directions", "ica": "ICA", "default": "default basis"}


def use_style() -> None:
    """Set matplotlib's defaults; call once per notebook."""
    mpl.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "font.size": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "legend.frameon": False,
            "lines.markersize": 4,
            "svg.hashsalt": "saelib",  # the same figure gives the same file
            "svg.fonttype": "none",
        }
    )


def save(figure: Figure, stem: str, table: pd.DataFrame, *, profile: str, **about) -> None:
    """Write ``figures/<profile>/<stem>`` as .png, .svg and .csv (the plotted numbers, `about` in its head)."""
    folder = FIGURES / profile
    for ending, options in ((".png", {}), (".svg", {"metadata": {"Date": None}})):
        with files.atomic(folder / f"{stem}{ending}") as temporary:
            figure.savefig(temporary, format=ending[1:], **options)
    head = "".join(f"# {name}: {value}\n" for name, value in ({"profile": profile} | about).items())
    with files.atomic(folder / f"{stem}.csv") as temporary:
        Path(temporary).write_text(head + table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def shades(values, name: str = "Blues", first: float = 0.4, last: float = 1.0) -> dict[float, tuple]:
    """A colour for each of the sorted `values`, from `first` to `last` of a colour map."""
    ordered = sorted(set(values))
    return dict(zip(ordered, mpl.colormaps[name](np.linspace(first, last, len(ordered))), strict=True))


def plain_log(axis) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written as plain numbers, on a logarithmic axis."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def hook_label(hook: str) -> str:
    """``layer 10, hook_resid_post`` for ``blocks.10.hook_resid_post``."""
    return "layer {1}, {2}".format(*hook.split(".", 2))


def fig6_tradeoff(table: pd.DataFrame, axes: tuple[Axes, Axes]) -> tuple[Axes, Axes]:
    """Paper Figure 6: FVU against mean L0, a point per dictionary. Left: tied, a line per hook; right: the hook that has
    several kinds, a line per kind. `table` has hook, kind, alpha, l0, fvu and fvu_interval.
    """
    main = table.loc[table["kind"] != "tied", "hook"].iloc[0]
    hooks = sorted(table["hook"].unique(), key=lambda hook: int(hook.split(".")[1]))
    colours = shades(range(len(hooks)))
    lines = [
        (axes[0], table[(table["hook"] == hook) & (table["kind"] == "tied")], colours[n], "o", hook_label(hook))
        for n, hook in enumerate(hooks)
    ]
    lines += [
        (axes[1], part, COLOURS[kind], MARKERS[kind], LABELS[kind])
        for kind, part in table[table["hook"] == main].groupby("kind", sort=False)
    ]
    for axis, part, colour, marker, label in lines:
        part = part.sort_values("l0")
        error = np.abs(np.array(part["fvu_interval"].tolist()).T - part["fvu"].to_numpy())
        axis.errorbar(part["l0"], part["fvu"], yerr=error, color=colour, marker=marker, lw=1.2, label=label)
    for row in table[(table["hook"] == main) & (table["kind"] == "tied")].itertuples():
        offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 6.5, "color": "#444444"}
        axes[0].annotate(f"α = {row.alpha:g}", (row.l0, row.fvu), **offset)
    for axis in axes:
        axis.set(xscale="log", xlabel="active features, L0 (log scale)", ylim=(0, None))
        plain_log(axis.xaxis)
        axis.margins(x=0.15)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("unexplained variance, FVU")
    return axes


def fig7_convergence(table: pd.DataFrame, axes: tuple[Axes, Axes]) -> tuple[Axes, Axes]:
    """Paper Figure 7: held-out FVU (left) and L0 (right) against activations seen, one line per alpha.

    `table` has alpha, activations, fvu, l0.
    """
    colours = shades(table["alpha"], "plasma", 0.0, 0.85)
    for alpha, part in table.groupby("alpha"):
        for axis, column in zip(axes, ("fvu", "l0"), strict=True):
            axis.plot(
                part["activations"] / 1e3, part[column], color=colours[alpha], marker="o", ms=2.5, label=f"{alpha:g}"
            )
    axes[0].set(ylabel="unexplained variance, FVU")
    axes[1].set(ylabel="active features, L0 (log scale)", yscale="log")
    for axis in axes:
        axis.set_xlabel("activations seen (thousands)")
    plain_log(axes[1].yaxis)
    axes[1].legend(title="α", loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def fig16_alive(table: pd.DataFrame, axes: Iterable[Axes]) -> None:
    """Paper Figure 16: share of features alive against alpha, a line per ratio, a panel per hook and kind, the rest empty.

    `table` has hook, kind, ratio, alpha, alive.
    """
    axes, panels = list(axes), table.groupby(["hook", "kind"], sort=False)
    for axis in axes[panels.ngroups :]:
        axis.set_axis_off()
    colours, markers = shades(table["ratio"]), dict(zip(sorted(table["ratio"].unique()), "vosD^<>P", strict=False))
    for axis, ((hook, kind), part) in zip(axes, panels, strict=False):
        for ratio, line in part.sort_values("alpha").groupby("ratio"):
            axis.plot(line["alpha"], line["alive"], color=colours[ratio], marker=markers[ratio], label=f"R = {ratio:g}")
        axis.set_xscale("symlog", linthresh=1e-4)
        axis.set_xticks([0, 1e-4, 1e-3, 1e-2], ["0", "1e-4", "1e-3", "1e-2"])
        axis.set(xlim=(-3e-5, 1.2e-2), ylim=(0, 1.05), xlabel=f"α (log scale from 1e-4)\n{hook_label(hook)}, {kind}")
        axis.legend(loc="lower left", fontsize=7)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("share of features alive")


def x_reconstruction(table: pd.DataFrame, clean: float, axes: Axes) -> Axes:
    """Perplexity under reconstruction against L0, a line per kind (columns kind, l0, perplexity); dashed: unchanged."""
    for kind, part in table.sort_values("l0").groupby("kind", sort=False):
        axes.plot(part["l0"], part["perplexity"], color=COLOURS[kind], marker=MARKERS[kind], label=LABELS[kind])
    axes.axhline(clean, color="#444444", ls="--", lw=1, label="unchanged model")
    axes.set(xscale="log", yscale="log", xlabel="active features, L0 (log scale)", ylabel="perplexity (log scale)")
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    axes.legend()
    return axes


def x_same_features(table: pd.DataFrame, axes: Axes) -> Axes:
    """Share of features whose largest cosine with a feature of another dictionary is at least x (columns other, cosine)."""
    seeds = [name for name in table["other"].unique() if name.startswith("seed")]
    sizes = [name for name in table["other"].unique() if name.startswith("R =")]
    colours = dict(zip(seeds, shades(range(len(seeds)), "Blues", 0.7).values(), strict=True))
    colours |= dict(zip(sizes, shades(range(len(sizes)), "Purples", 0.4, 0.8).values(), strict=True))
    colours |= {"TopK": COLOURS["topk"], "PCA": COLOURS["pca"], "random": COLOURS["random"]}
    for other, part in table.groupby("other", sort=False):
        ordered = np.sort(part["cosine"])[::-1]
        style = "-" if other in seeds else ":" if other in ("PCA", "random") else "--"
        axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), style, color=colours[other], label=other)
    axes.axvline(0.9, color="#bbbbbb", lw=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="largest cosine", ylabel="share of features at or above it")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def x_settings(table: pd.DataFrame, axes: Axes) -> Axes:
    """Search over training settings: mean FVU after one change over that without (columns kind, change, relative)."""
    changes = table["change"].drop_duplicates().tolist()
    for kind, part in table.groupby("kind", sort=False):
        places = [changes.index(change) for change in part["change"]]
        axes.plot(part["relative"], places, MARKERS[kind], color=COLOURS[kind], label=LABELS[kind])
    axes.axvspan(0.98, 1.02, color="#eeeeee", zorder=0)
    axes.axvline(1, color="#444444", ls=":", lw=1)
    axes.set_yticks(range(len(changes)), [change.replace("_", " ") for change in changes])
    axes.set(xscale="log", xlabel="mean FVU relative to no change (log scale; left is better)")
    plain_log(axes.xaxis)
    axes.xaxis.set_major_locator(mpl.ticker.FixedLocator([0.9, 1, 1.2, 1.5, 1.8]))
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    return axes


def x_one_dictionary(history: pd.DataFrame, axes: tuple[Axes, Axes]) -> tuple[Axes, Axes]:
    """One dictionary while it trains: reconstruction error (left) and L0 (right) of the batches, against steps."""
    for axis, column in zip(axes, ("error", "l0"), strict=True):
        axis.plot(history["step"], history[column], color=COLOURS["tied"], lw=1)
        axis.set(xlabel="training step", yscale="log")
        plain_log(axis.yaxis)
    axes[0].set_ylabel("reconstruction error (log scale)")
    axes[1].set_ylabel("active features, L0 (log scale)")
    return axes


def x_norms(table: pd.DataFrame, axes: Axes) -> Axes:
    """Norms of the activations of each hook: median, 1st and 99th percentile, and the largest. Columns as named."""
    places = np.arange(len(table))
    spread = np.abs(table[["p1", "p99"]].to_numpy().T - table["median"].to_numpy())
    axes.errorbar(
        places, table["median"], yerr=spread, fmt="o", color=COLOURS["tied"], label="median, 1% to 99%", capsize=2
    )
    axes.plot(places, table["largest"], "x", color=COLOURS["pca"], label="largest")
    axes.set_xticks(places, ["layer {1}\n{2}".format(*hook.split(".", 2)) for hook in table["hook"]], fontsize=6.5)
    axes.margins(x=0.15)
    axes.set(yscale="log", ylabel="norm of an activation (log scale)")
    plain_log(axes.yaxis)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return axes


def x_spectrum(table: pd.DataFrame, axes: Axes) -> Axes:
    """Share of variance held by the k largest coordinates of the default basis, per hook. Columns hook, k, share."""
    hooks = table["hook"].drop_duplicates()
    for hook, colour in zip(hooks, shades(range(len(hooks))).values(), strict=True):
        part, label = table[table["hook"] == hook], hook_label(hook)
        axes.plot(part["k"], part["share"], color=colour, label=label)
    axes.set(xscale="log", xlabel="number of coordinates, largest first (log scale)", ylabel="share of the variance")
    axes.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=6.5, ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1))
    return axes


def show(figure: Figure) -> None:
    """Show a figure in the notebook and close it."""
    plt.show()
    plt.close(figure)
