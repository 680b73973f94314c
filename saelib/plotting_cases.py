"""Figures of notebook 06. Same manner as `saelib.plotting`: data and axes in, axes out."""

import re
from collections.abc import Sequence

import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from saelib.plotting import COLOURS, plain_log

FIRST, OTHERS, REST = COLOURS["tied"], ("#e08a2e", "#00838f", "#b8336a", "#8a6d1f", "#8e44ad"), "#d4d4d4"


def readable(token: str) -> str:
    """A token on one line: ⏎ for a line feed, ⇥ for a tab, ␣ for a space at an end, runs of spaces counted, and the number of
    any character that the font lacks."""
    text = re.sub(" {2,}", lambda run: f"␣×{len(run[0])}", token.replace("\n", "⏎").replace("\t", "⇥"))
    text = re.sub("^ | $", "␣", text)
    return "".join(one if one.isprintable() and ord(one) < 0x2E80 else f"\\u{ord(one):04x}" for one in text)


def stacked(table: pd.DataFrame, first: str, axes: Axes, label: str = "activation") -> Axes:
    """Share of tokens in each bin, stacked, with the bin's count above it. Columns bin, low, high, token (decoded; "other"),
    count. The token `first` is lowest and blue, all others than those named are grey."""
    counts = table.pivot_table(index="bin", columns="token", values="count", aggfunc="sum", fill_value=0)
    edges = table.drop_duplicates("bin").set_index("bin").sort_index()
    total, counts = (
        counts.sum(axis=1),
        counts.reindex(sorted(counts, key=lambda token: (token == "other", token != first)), axis=1),
    )
    bottom, colours = np.zeros(len(counts)), iter(OTHERS)
    for token in counts:
        colour = FIRST if token == first else REST if token == "other" else next(colours)
        height = (counts[token] / total.clip(lower=1)).to_numpy()
        width, name = edges["high"] - edges["low"], token if token == "other" else re.sub("^_", " _", readable(token))
        axes.bar(edges["low"], height, 0.94 * width, bottom, align="edge", color=colour, label=name)
        bottom += height
    for middle, count in zip((edges["low"] + edges["high"]) / 2, total, strict=True):
        axes.text(middle, 1.02, f"{count:.0f}" if count < 1000 else f"{count / 1000:.1f}k", ha="center", fontsize=5.5)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel=label, ylim=(0, 1.09), yticks=[0, 0.5, 1])
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=6.5, handlelength=1, columnspacing=1)
    return axes


def fig4_feature(inputs: pd.DataFrame, effects: pd.DataFrame, first: tuple[str, str], axes: Sequence[Axes]) -> None:
    """Paper Figure 4. Left: on which tokens the feature is active. Right: by the true next token, how much its log-probability
    falls when the feature is ablated. Tables as for `stacked`; `first` are the blue tokens."""
    stacked(inputs, first[0], axes[0], "activation")
    stacked(effects, first[1], axes[1], "log p of the true next token,\noriginal minus ablated, nats")
    axes[0].set_ylabel("share of the bin")


def fig11_coordinate(table: pd.DataFrame, first: str, name: str, axes: Axes) -> None:
    """Paper Figure 11: tokens by the value of the residual coordinate that the feature reads most (`name`)."""
    stacked(table, first, axes, name).set_ylabel("share of the bin")


def fig12_features(tables: dict[str, pd.DataFrame], axes: Sequence[Axes]) -> None:
    """Paper Figures 12 to 15: on which tokens the features of other targets are active, a panel per target."""
    for axis, (target, table) in zip(axes, tables.items(), strict=False):
        stacked(table, target, axis, f"activation of the feature of {readable(target)}")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("share of the bin")
    for axis in axes[len(tables) :]:
        axis.set_axis_off()


def fig5_tree(graph: nx.DiGraph, labels: dict, axes: Axes) -> None:
    """Paper Figure 5: the causal tree. A row per layer, the target above; `labels` {node: text}; the width of an edge is its
    weight, which stands beside it."""
    place = nx.multipartite_layout(graph, subset_key="level", align="horizontal")
    levels = nx.get_node_attributes(graph, "level")
    top = max(levels.values())
    for level in range(top - 1, -1, -1):  # children stand below the middle of their parents, so that few edges cross
        row = [node for node in graph if levels[node] == level]
        row.sort(key=lambda node: np.mean([place[parent][0] for parent in graph.successors(node)]))
        place |= {node: (x, place[node][1]) for node, x in zip(row, _spread(len(row)), strict=True)}
    widths = [0.4 + 4 * graph.edges[edge]["weight"] for edge in graph.edges]
    look = {"ax": axes, "arrows": True, "arrowstyle": "-", "edge_color": "#9db8d9"}
    nx.draw_networkx_edges(graph, place, width=widths, node_size=1, **look)
    middle = {"fontsize": 6.5, "ha": "center", "va": "center"}
    for (child, parent), edge in graph.edges.items():
        x, y = 0.36 * np.array(place[child]) + 0.64 * np.array(place[parent])  # near the parent the edges lie apart
        axes.text(x, y, f"{edge['weight']:.2f}", bbox={"fc": "white", "ec": "none", "pad": 0.6}, **middle)
    for node, data in graph.nodes(data=True):
        box = {"boxstyle": "round", "fc": "#e8f0fa" if data["level"] < top else "#fdebd3", "ec": "#7f7f7f", "lw": 0.6}
        axes.text(*place[node], labels[node], bbox=box, parse_math=False, **middle)
    axes.margins(0.12, 0.16)
    axes.set_axis_off()


def _spread(n: int) -> np.ndarray:
    """`n` places between -1 and 1, the same distance from each other and half of it from the ends."""
    return (2 * np.arange(n) + 1) / n - 1


def x_contexts(groups: dict[str, pd.DataFrame], axes: Sequence[Axes], characters: int = 112) -> None:
    """Strongest contexts of features, a panel per entry of `groups` (title: columns context, offset, text, activation), a line
    per context, the activation as a shade of blue relative to the largest of the panel."""
    for axis, (title, table) in zip(axes, groups.items(), strict=True):
        largest = table["activation"].max()
        for line, (_, part) in enumerate(table.groupby("context")):
            texts = [text.replace("\n", "⏎").replace("\t", "⇥") for text in part["text"]]
            ends = np.cumsum([len(text) for text in texts])
            shift = characters // 2 - ends[int((part["offset"] == 0).to_numpy().argmax())]
            for text, end, strength in zip(texts, ends + shift, part["activation"].fillna(0), strict=True):
                start = end - len(text)
                if start < 0 or end > characters:
                    continue
                axis.add_patch(
                    Rectangle((start, -line - 0.5), len(text), 0.96, color=FIRST, alpha=0.75 * strength / largest, lw=0)
                )
                axis.text(start, -line, text, family="monospace", fontsize=7, va="center", parse_math=False)
        axis.set_xlim(0, characters)
        axis.set_ylim(-table["context"].nunique() + 0.4, 0.6)
        axis.set_title(title, fontsize=7.5, loc="left", parse_math=False)
        axis.set_axis_off()


def x_effects(table: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Most raised and most lowered tokens by a feature and by random ones of equal mass, a panel per value of `ablated`.
    Columns ablated, token, change (log p original minus ablated, mean over positions above half of its maximum)."""
    for axis, (name, part) in zip(axes, table.groupby("ablated", sort=False), strict=True):
        part = part.sort_values("change")
        colours = np.where(part["change"] > 0, FIRST, COLOURS["pca"])
        axis.barh(range(len(part)), part["change"], color=colours, height=0.75)
        axis.set_yticks(range(len(part)), map(readable, part["token"]), fontsize=6, parse_math=False)
        axis.axvline(0, color="#444444", lw=0.6)
        axis.grid(axis="y", visible=False)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("mean change of log p, nats")


def x_failure(frequent: pd.DataFrame, table: pd.DataFrame, target: str, bound: float, axes: Sequence[Axes]) -> None:
    """Left: purity above half (select half) of the best feature of each frequent token against its occurrences (columns
    target, occurrences, purity_above; the failing one named). Right: `stacked` of the feature of the failing `target`."""
    axes[0].plot(frequent["occurrences"], frequent["purity_above"], "o", ms=3, color=FIRST)
    failing = frequent[frequent["target"] == target].iloc[0]
    axes[0].plot(failing["occurrences"], failing["purity_above"], "o", ms=6, color=COLOURS["pca"])
    axes[0].axhline(bound, color="#444444", ls=":", lw=1)
    where = {"xytext": (0, -5), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 6.5}
    spot = failing["occurrences"], failing["purity_above"]
    axes[0].annotate(readable(target), spot, parse_math=False, **where)
    axes[0].set(
        xscale="log",
        ylim=(0, 1.05),
        xlabel="occurrences, select half (log scale)",
        ylabel="purity above half, select half",
    )
    plain_log(axes[0].xaxis)
    stacked(table, target, axes[1]).set_ylabel("share of the bin")
