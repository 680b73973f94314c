"""Which features to patch: gradient attribution, the pruning of the paper's code (ACDC on a flat graph), and their curves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from saelib import files, metrics
from saelib.patching import Patch


def attribution(patch: Patch, points: Sequence[float] = (0.0,)) -> Tensor:
    """Fall of the KL that each feature promises to first order, [n, n_features] in nats, for each prompt.

        a_j = - sum over positions of (c_j(counterfactual) - c_j(base)) * <dKL/dx, f_j>

    The gradient is taken at the base (``points=(0,)``) or averaged over `points` of the way to all features patched
    (integrated gradients). One backward pass for each point, whatever the number of features.
    """
    tail, way = patch.tail, patch.apply(patch.candidates) - patch.tail.x
    fall = torch.zeros(patch.steps.shape[0], patch.steps.shape[2], device=patch.steps.device)
    for point in points:
        x = (tail.x + point * way).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(tail.kl(x[None]).sum(), x)
        fall -= (patch.steps * (gradient.float() @ patch.writes.T)).sum(1) / len(points)
    return fall


def ranked(fall: Tensor, patch: Patch) -> Tensor:
    """The candidates of `patch` by mean `fall` over prompts ([n, n_features], from `attribution`), largest first."""
    mean = fall.mean(0)[patch.candidates]
    return patch.candidates[mean.argsort(descending=True, stable=True)]


def prune_orders(
    evaluate: Callable[[list[list[int]]], list[float]],
    start: Sequence[int],
    thresholds: Sequence[float],
    orders: dict[int, Path | None],
    *,
    block: int = 1,
    patience: float = float("inf"),
    spec: dict | None = None,
) -> dict[int, list[dict]]:
    """Nested sets of features by threshold pruning; for the seed of each visit order ``{threshold, features, kl, rises,
    evaluations}`` for each threshold.

    Begin with all of `start` patched. For each threshold, smallest first, visit what is left in a new random order: a feature
    goes if the KL rises by less than the threshold over the running KL; it never comes back, and the running KL is updated
    at once (source: the paper's code, ioi_feature_ident.py; Conmy et al. 2023, Algorithm 1).

    Parameters
    ----------
    evaluate : KL of each of some sets of features (`Patch.mean_kls`): one set of every order at a time, which share a forward
        pass. An order that is finished keeps its place there, so that no other depends on how far it was when a run was killed.
    orders : seed of each visit order, and a .json that is written after each threshold, with `spec`, all that `evaluate`
        depends on (`Patch.spec`), or None. A killed run goes on with the next threshold and ends with the same bytes; a file
        made with anything else is not used.
    block : features that are tried together: they go at once if they raise the KL by less than the threshold all together;
        if not, each half is tried, down to single features. 1 is the code's rule, larger blocks are stricter and cheaper.
    patience : a feature that by itself raised the KL by more than `patience` times the threshold when it was last tried is
        not tried again at that threshold. Infinite is the code's rule; 2 saves most of the work of many thresholds.
    """
    if any(orders.values()) and not spec:
        raise ValueError("sets are only kept together with what they depend on: give `spec`, for example Patch.spec")
    start, thresholds, found = [int(one) for one in start], sorted(map(float, thresholds)), {}
    rule = {"start": start, "thresholds": thresholds, "block": block, "patience": str(patience), "orders": len(orders)}
    with tqdm(total=len(orders) * len(thresholds), desc="prune", unit="threshold", leave=False) as bar:
        visits = {seed: _visit((spec or {}) | rule | {"seed": seed}, path, bar) for seed, path in orders.items()}
        sets, kl = dict.fromkeys(visits, start), dict.fromkeys(visits)
        while True:
            for seed in visits.keys() - found.keys():
                try:
                    sets[seed] = visits[seed].send(kl[seed])
                except StopIteration as end:
                    found[seed] = end.value
            if len(found) == len(visits):
                return {seed: found[seed] for seed in orders}
            kl = dict(zip(sets, evaluate(list(sets.values())), strict=True))


def _visit(spec: dict, path: Path | None, bar: tqdm):
    """One visit order of `prune_orders`: yields the set whose KL it wants to be sent next, and returns what it found."""
    start, thresholds, block, seed = (spec[name] for name in ("start", "thresholds", "block", "seed"))
    stored = files.read_json(path) if path and path.exists() else {}
    found = stored["found"] if stored.get("spec") == spec else []
    kept, running = (found[-1]["features"], found[-1]["kl"]) if found else (start, None)
    rises = dict(zip(kept, found[-1]["rises"], strict=True)) if found else dict.fromkeys(start, 0.0)
    bar.update(len(found))
    for number in range(len(found), len(thresholds)):
        running, evaluations = ((yield kept), 1) if running is None else (running, 0)
        generator = torch.Generator().manual_seed(seed * len(thresholds) + number)
        order = torch.tensor(kept, dtype=torch.long)[torch.randperm(len(kept), generator=generator)].tolist()
        order = [one for one in order if rises[one] <= float(spec["patience"]) * thresholds[number]]
        waiting = [order[first : first + block] for first in range(0, len(order), block)][::-1]
        while waiting:
            bar.set_postfix_str(f"{len(kept)} left, KL {running:.3f}")
            trial = waiting.pop()
            without = [one for one in kept if one not in trial]
            kl, evaluations = (yield without), evaluations + 1
            if kl - running < thresholds[number]:
                kept, running = without, kl
            elif len(trial) > 1:
                middle = len(trial) // 2
                waiting += [trial[middle:], trial[:middle]]
            else:
                rises[trial[0]] = kl - running
        result = {"threshold": thresholds[number], "features": kept, "kl": running, "evaluations": evaluations}
        found.append(result | {"rises": [rises[one] for one in kept]})
        bar.update()
        if path:
            files.write_json(path, {"spec": spec, "found": found})
    return found


def curve(patch: Patch, sets: Sequence[Tensor | Sequence[int]], **about) -> pd.DataFrame:
    """A row per set: ``features``, mean ``kl`` (nats) and ``edit`` (model units), each with its ``low`` and ``high`` end of a
    95% bootstrap interval over prompts, the sets held fixed (``edit_low``, ``edit_high``); and the columns `about`."""
    rows, n = [], patch.tail.n_positions.cpu().numpy()
    for chosen, kl, edit in zip(sets, *(part.numpy() for part in patch.measure(sets)), strict=True):
        row = {"features": len(chosen), "kl": kl.mean(), "edit": edit.sum() / n.sum()}
        row |= zip(("low", "high"), metrics.bootstrap_ratio(kl, np.ones_like(kl)), strict=True)
        row |= zip(("edit_low", "edit_high"), metrics.bootstrap_ratio(edit, n), strict=True)
        rows.append(about | row)
    return pd.DataFrame(rows)


def needed(kl: Sequence[float], cost: Sequence[float], goal: float) -> float:
    """The cost (features, edit) at which a curve of `kl` first falls to `goal`, between points by straight line; inf if never.

    Points in the order in which features are patched, beginning with none.
    """
    for number, value in enumerate(kl):
        if value <= goal:
            if number == 0:
                return float(cost[0])
            share = (kl[number - 1] - goal) / (kl[number - 1] - value)
            return float(cost[number - 1] + share * (cost[number] - cost[number - 1]))
    return float("inf")


def needed_again(
    fall: Tensor,
    select: Patch,
    report: Patch,
    sizes: Sequence[int],
    *,
    reselect: int,
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Features and edit that remove half of the KL, [resamples, 2], when all prompts are drawn again: those that select and
    those that report. Equal seeds draw equal prompts, so that two dictionaries can be compared draw by draw.

    `reselect` times the prompts of `select` are drawn with replacement and the features ranked by `fall` on them; each
    order is measured on all of `report` at `sizes`, and so is the patch of all candidates. Every resample takes one of the
    orders and draws the prompts of `report`.
    """
    random = np.random.default_rng(seed)
    n, places = len(fall), report.tail.n_positions.cpu().numpy()
    sizes = [size for size in sizes if size < len(select.candidates)]
    found = [report.measure([[], report.candidates])]
    for _ in tqdm(range(reselect), desc="select again", leave=False):
        order = ranked(fall[torch.from_numpy(random.integers(n, size=n))], select)
        found.append(report.measure([order[:size] for size in sizes]))
    (ends_kl, ends_edit), *others = ([part.numpy() for part in pair] for pair in found)
    counts, result = [0, *sizes, len(report.candidates)], []
    for _ in range(resamples):
        kl, edit = others[random.integers(reselect)]
        draw = random.integers(len(places), size=len(places))
        line = np.concatenate([ends_kl[:1], kl, ends_kl[1:]])[:, draw].mean(1)
        length = np.concatenate([ends_edit[:1], edit, ends_edit[1:]])[:, draw].sum(1) / places[draw].sum()
        result.append([needed(line, cost, line[0] / 2) for cost in (counts, length)])
    return np.array(result)
