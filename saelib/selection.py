"""Which features to patch: gradient attribution, and the pruning of the paper's code (ACDC on a flat graph)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from saelib import files
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


def prune(
    evaluate: Callable[[list[int]], float],
    start: Sequence[int],
    thresholds: Sequence[float],
    *,
    seed: int = 0,
    block: int = 1,
    path: Path | None = None,
    **spec,
) -> list[dict]:
    """Nested sets of features by threshold pruning; returns ``{threshold, features, kl, evaluations}`` for each threshold.

    Begin with all of `start` patched. For each threshold, smallest first, visit what is left in a new random order: a feature
    goes if the KL rises by less than the threshold over the running KL; it never comes back, and the running KL is updated
    at once (source: the paper's code, ioi_feature_ident.py; Conmy et al. 2023, Algorithm 1).

    Parameters
    ----------
    evaluate : KL of a set of features (`Patch.mean_kl`).
    block : features that are tried together: they go at once if they raise the KL by less than the threshold all together;
        if not, each half is tried, down to single features. 1 is the code's rule, larger blocks are stricter and cheaper.
    path : a .json that is written after each threshold. A killed run goes on with the next one and ends with the same sets;
        a file of another `spec` (give all that `evaluate` depends on), start, thresholds, seed or block is not used.
    """
    start, thresholds = [int(one) for one in start], sorted(map(float, thresholds))
    spec = spec | {"start": start, "thresholds": thresholds, "seed": seed, "block": block}
    stored = files.read_json(path) if path and path.exists() else {}
    found = stored["found"] if stored.get("spec") == spec else []
    kept, running = (found[-1]["features"], found[-1]["kl"]) if found else (start, None)
    for number in range(len(found), len(thresholds)):
        running, evaluations = (evaluate(kept), 1) if running is None else (running, 0)
        generator = torch.Generator().manual_seed(seed * len(thresholds) + number)
        order = torch.tensor(kept, dtype=torch.long)[torch.randperm(len(kept), generator=generator)].tolist()
        waiting = [order[first : first + block] for first in range(0, len(order), block)][::-1]
        while waiting:
            trial = waiting.pop()
            without = [one for one in kept if one not in trial]
            kl, evaluations = evaluate(without), evaluations + 1
            if kl - running < thresholds[number]:
                kept, running = without, kl
            elif len(trial) > 1:
                middle = len(trial) // 2
                waiting += [trial[middle:], trial[:middle]]
        found.append({"threshold": thresholds[number], "features": kept, "kl": running, "evaluations": evaluations})
        if path:
            files.write_json(path, {"spec": spec, "found": found})
    return found


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
