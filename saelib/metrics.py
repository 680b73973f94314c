"""What a dictionary does on held-out activations: FVU, L0, alive features, MMCS; with bootstrap intervals."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saelib.dictionaries import Dictionary

GROUP = (
    255  # held-out activations that share a context: the unit of the bootstrap, since neighbours are not independent
)


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one dictionary. Every interval is a 95% bootstrap interval over groups of activations.

    ``fvu`` = sum |x - x_hat|^2 / sum |x - mean|^2, a ratio of sums; ``l0`` = mean number of non-zero codes per activation;
    ``alive`` = share of features with more than `alive_above` non-zero codes within ``window`` activations (the paper's
    code asks for more than 10 within one chunk of 2.1 million: a shorter window undercounts).
    """

    fvu: float
    fvu_interval: tuple[float, float]
    l0: float
    l0_interval: tuple[float, float]
    alive: float
    window: int


@torch.inference_mode()
def evaluate(
    dictionary: Dictionary, chunks: Iterable[Tensor], mean: Tensor, *, alive_above: int = 10, resamples: int = 1000
) -> Evaluation:
    """`Evaluation` of `dictionary` on `chunks` of activations [n, d] in the model's units.

    `mean` [d] is the one that FVU is taken around: that of the evaluated activations (`ActivationStore.mean`).
    """
    errors, totals, counts, fired, window = [], [], [], 0, 0
    for x in chunks:
        x = x.to(mean.device, torch.float32)
        code = dictionary.encode(x)
        errors.append((x - dictionary.decode(code)).square().sum(1))
        totals.append((x - mean).square().sum(1))
        active = (code != 0).float()  # sums of booleans are five times slower
        counts.append(active.sum(1))
        fired = fired + active.sum(0).double()
        window += len(x)
    error, total, count = (_by_group(torch.cat(parts).double()) for parts in (errors, totals, counts))
    size = _by_group(torch.ones(window, dtype=torch.float64))
    return Evaluation(
        fvu=float(error.sum() / total.sum()),
        fvu_interval=bootstrap_ratio(error, total, resamples=resamples),
        l0=float(count.sum() / size.sum()),
        l0_interval=bootstrap_ratio(count, size, resamples=resamples),
        alive=float((fired > alive_above).double().mean()),
        window=window,
    )


def _by_group(values: Tensor) -> np.ndarray:
    """Sums of `values` over consecutive groups of `GROUP`; the last group may be shorter."""
    return np.array([part.sum().item() for part in values.cpu().split(GROUP)])


def bootstrap_ratio(
    numerator: np.ndarray, denominator: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap interval of sum(numerator) / sum(denominator) over paired entries."""
    draw = np.random.default_rng(seed).integers(len(numerator), size=(resamples, len(numerator)))
    ratios = numerator[draw].sum(1) / denominator[draw].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of `a` [n, d] with each row of `b` [m, d]; returns [n, m]."""
    unit = torch.nn.functional.normalize
    return unit(a, dim=1) @ unit(b, dim=1).T


def max_cosine(a: Tensor, b: Tensor) -> Tensor:
    """For each row of `a` [n, d] the largest cosine with a row of `b` [m, d]; returns [n]."""
    return cosines(a, b).max(dim=1).values


def one_to_one(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the matching of rows of `a` [n, d] with rows of `b` [m, d], none used twice, whose sum is largest.

    Returns [min(n, m)], in the order of the matched rows of `a`. The share above 0.9 is what the paper's code counts as
    features that two dictionaries share (run_mmcs_with_larger in standard_metrics.py; `a` is the smaller one).
    """
    from scipy.optimize import linear_sum_assignment  # half a second to import

    table = cosines(a, b)
    row, column = linear_sum_assignment(table.detach().cpu().numpy(), maximize=True)
    return table[torch.as_tensor(row), torch.as_tensor(column)]


def mmcs(a: Tensor, b: Tensor) -> float:
    """Mean max cosine similarity: the mean over the rows of `a` of the largest cosine with a row of `b`.

    Not symmetric. (Source: standard_metrics.py of the paper's code.)
    """
    return max_cosine(a, b).mean().item()
