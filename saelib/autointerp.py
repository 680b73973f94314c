"""Automated interpretability: explain a feature from a few fragments, predict it on others, correlate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saelib.fragments import N_RANDOM, Record, as_integers
from saelib.metrics import bootstrap_ratio

ANY = -2  # in a pattern under construction: whatever stands there
PARTS = ("both", "top", "random")  # the ten scored fragments together, the five of the top twenty, the five random ones


class Malformed(ValueError):
    """A reply is not in the form that was asked for. The feature is counted and skipped; nothing is guessed."""


class Explainer(Protocol):
    """Reads ``record.explain`` and ``record.explain_activations`` and nothing else of a record."""

    def explain(self, record: Record) -> object:
        """An explanation; ``str(explanation)`` is for people. Raises `Malformed`."""


class Simulator(Protocol):
    """Predicts activations from an explanation and tokens alone."""

    def simulate(self, explanation: object, tokens: Tensor) -> Tensor:
        """Expected activation of each of `tokens` [n, length], float32, on any scale. Raises `Malformed`."""


@dataclass(frozen=True)
class Rule:
    """A list of patterns (token before or None for any, token or None for any) with the strength expected where one is the
    first that fits; `otherwise` where none does. Strengths are on the scale 0 to 10."""

    patterns: tuple[tuple[int | None, int | None], ...]
    strengths: tuple[float, ...]
    otherwise: float
    show: Callable[[int], str] = repr

    def __str__(self) -> str:
        lines = []
        for (before, token), strength in zip(self.patterns, self.strengths, strict=True):
            what = "any token" if token is None else self.show(token)
            lines.append(f"{what}{'' if before is None else f' after {self.show(before)}'}: {strength:.1f}")
        return "; ".join([*lines, f"otherwise {self.otherwise:.1f}"])


class TokenRules:
    """The `tokens` explainer and simulator: a short rule of tokens and the token before, found by least squares. No
    language model: deterministic, offline, and blind to everything but which tokens stand where.

    Patterns are "this token", "this token after that one" and "any token after that one". Starting from the mean m of the
    integers shown, the pattern with the largest s^2 / (n + shrink) is taken next, where n counts the positions that it
    fits and no earlier pattern did, and s sums their a - m. Its strength is m + s / (n + shrink). This is a greedy decision
    list under a ridge penalty. It ends after `length` patterns or when the gain is below `least_gain` of the sum of squares.

    Parameters
    ----------
    length : most patterns in a rule.
    shrink : how many positions of strength m each pattern is mixed with; large values distrust what was seen once.
    least_gain : share of the sum of squares around m.
    show : from a token id to its text.
    """

    def __init__(self, *, length: int = 16, shrink: float = 0.5, least_gain: float = 1e-3, show=repr):
        self.length, self.shrink, self.least_gain, self.show = length, shrink, least_gain, show

    def explain(self, record: Record) -> Rule:
        tokens = record.explain.numpy()
        before = np.concatenate([np.full((len(tokens), 1), -1), tokens[:, :-1]], axis=1)
        known = ~record.explain_activations.isnan().numpy().ravel()
        a = as_integers(record.explain_activations).numpy().ravel()[known].astype(float)
        b, t = before.ravel()[known], tokens.ravel()[known]
        # every position is in three groups: its token, its pair, what stands before it; a name holds two ids in 64 bits
        names, groups, end = [], [], 0
        for left, right in ((ANY, t), (b, t), (b, ANY)):
            name, group = np.unique(((left - ANY) << 32) + (right - ANY), return_inverse=True)
            names, groups, end = [*names, name], [*groups, group + end], end + len(name)
        names, groups = np.concatenate(names), np.stack(groups)
        usable = names >> 32 != -1 - ANY  # what stands before a fragment is not known
        mean, free = a.mean(), np.ones(len(a), dtype=bool)
        n, sums = (np.bincount(groups.ravel(), np.tile(each, 3)) for each in (free, a))  # of the positions still free
        total, patterns, strengths = ((a - mean) ** 2).sum(), [], []
        while len(patterns) < self.length and free.any():
            s = np.where(usable, sums - mean * n, 0.0)
            gain = s**2 / (n + self.shrink)
            best = int(gain.argmax())
            if gain[best] < self.least_gain * total or total == 0:
                break
            parts = (int(part) + ANY for part in (names[best] >> 32, names[best] & 0xFFFFFFFF))
            patterns.append(tuple(None if part == ANY else part for part in parts))
            strengths.append(float(mean + s[best] / (n[best] + self.shrink)))
            fits = free & (groups == best).any(0)
            taken, free = groups[:, fits].ravel(), free & ~fits
            n -= np.bincount(taken, minlength=end)
            sums -= np.bincount(taken, np.tile(a[fits], 3), minlength=end)
        return Rule(tuple(patterns), tuple(strengths), float(a[free].mean() if free.any() else mean), self.show)

    def simulate(self, explanation: Rule, tokens: Tensor) -> Tensor:
        tokens = tokens.numpy()
        before = np.concatenate([np.full((len(tokens), 1), -1), tokens[:, :-1]], axis=1)
        result = np.full(tokens.shape, explanation.otherwise, dtype=np.float32)
        for (left, token), strength in reversed(list(zip(explanation.patterns, explanation.strengths, strict=True))):
            fits = True if token is None else tokens == token
            result[fits if left is None else fits & (before == left)] = strength
        return torch.from_numpy(result)


def correlation(predicted: Tensor, actual: Tensor) -> float:
    """Pearson correlation over all tokens whose `actual` activation is known; NaN if that never varies.

    A prediction that never varies says nothing about the feature: 0.
    """
    actual = actual.numpy()
    known = ~np.isnan(actual)
    x, y = (side[known].astype(float) for side in (predicted.numpy(), actual))
    x, y = x - x.mean(), y - y.mean()
    x_norm, y_norm = np.linalg.norm(x), np.linalg.norm(y)
    if not y_norm > 0:
        return float("nan")
    return float(x @ y / (x_norm * y_norm)) if x_norm > 1e-9 else 0.0


def score(record: Record, explainer: Explainer, simulator: Simulator) -> dict:
    """One row: feature, explanation, and the correlation over the ten scored fragments together (``both``, 640 tokens), the
    five of the top (``top``) and the five random ones (``random``). Raises `Malformed`."""
    explanation = explainer.explain(record)
    predicted, actual = simulator.simulate(explanation, record.scored), record.scored_activations
    parts = {"both": slice(None), "top": slice(N_RANDOM), "random": slice(N_RANDOM, None)}
    row = {name: correlation(predicted[part], actual[part]) for name, part in parts.items()}
    return {"feature": record.feature, "explanation": str(explanation)} | row


def score_all(records: list[Record], explainer: Explainer, simulator: Simulator) -> tuple[list[dict], int]:
    """`score` of every record, and how many were skipped because a reply was malformed."""
    rows, malformed = [], 0
    for record in records:
        try:
            rows.append(score(record, explainer, simulator))
        except Malformed:
            malformed += 1
    return rows, malformed


def shuffled(record: Record, generator: torch.Generator) -> Record:
    """The negative control: the same tokens with the activations of each set of fragments in random order."""

    def mix(activations: Tensor) -> Tensor:
        flat = activations.flatten()
        return flat[torch.randperm(len(flat), generator=generator)].view_as(activations)

    changed = {
        "explain_activations": mix(record.explain_activations),
        "scored_activations": mix(record.scored_activations),
    }
    return Record(**(vars(record) | changed))


def mean_interval(values, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` (NaN left out) and its 95% percentile bootstrap interval over features."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return (float("nan"),) * 3
    return float(values.mean()), *bootstrap_ratio(values, np.ones_like(values), resamples=resamples, seed=seed)


def difference_interval(a, b, *, paired: bool = False, resamples: int = 2000, seed: int = 0):
    """Mean of `a` minus mean of `b` and its 95% bootstrap interval.

    Features of two dictionaries have no partner: each side is resampled by itself. With ``paired=True`` (two forms of the
    same direction) the differences are.
    """
    a, b = (np.asarray(side, dtype=float) for side in (a, b))
    if paired:
        return mean_interval(a - b, resamples=resamples, seed=seed)
    a, b, draw = a[~np.isnan(a)], b[~np.isnan(b)], np.random.default_rng(seed)
    if not len(a) or not len(b):
        return (float("nan"),) * 3
    left, right = (side[draw.integers(len(side), size=(resamples, len(side)))].mean(1) for side in (a, b))
    return float(a.mean() - b.mean()), *map(float, np.quantile(left - right, [0.025, 0.975]))


def correlation_interval(x, y, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Pearson correlation of `x` and `y` over features, and its 95% bootstrap interval (Table 2)."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    values = [np.corrcoef(x[draw], y[draw])[0, 1] for draw in draws]
    return float(np.corrcoef(x, y)[0, 1]), *map(float, np.nanquantile(values, [0.025, 0.975]))


def summary(scores: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """A row per group of `scores` (a row per feature): how many features, and for each of PARTS mean and interval in the
    columns ``both``, ``both_low``, ``both_high`` and so on."""
    lines = []
    for group, rows in scores.groupby(keys, sort=False):
        line = dict(zip(keys, group, strict=True)) | {"features": len(rows)}
        for part in PARTS:
            line |= zip([part, f"{part}_low", f"{part}_high"], mean_interval(rows[part]), strict=True)
        lines.append(line)
    return pd.DataFrame(lines)


def by_part(scores: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """`summary` with a row per group and part: columns `keys`, features, mean, low, high, part."""
    wide, tables = summary(scores, keys), []
    for part in PARTS:
        names = {part: "mean", f"{part}_low": "low", f"{part}_high": "high"}
        tables.append(wide[[*keys, "features", *names]].rename(columns=names).assign(part=part))
    return pd.concat(tables)
