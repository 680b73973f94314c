"""Toy worlds whose true features are known, and many small dictionaries trained in one batched program."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from saelib.dictionaries import KINDS, Dictionary, unit_rows
from saelib.losses import sae_loss


def decaying_frequencies(n: int, mean_active: float, decay: float) -> Tensor:
    """Frequencies [n] proportional to decay^j that sum to `mean_active`; a `decay` of 1 makes them equal.

    The authors' script does not scale after the decay: with its numbers 0.97 features of the independent world are
    active on average and not the 5 that it names.
    """
    frequencies = decay ** torch.arange(n)
    frequencies *= mean_active / frequencies.sum()
    if frequencies.max() > 1:
        raise ValueError(f"mean_active {mean_active} needs a frequency above 1: take more features, or decay nearer 1")
    return frequencies


def random_correlation(n: int, generator: torch.Generator) -> Tensor:
    """The authors' correlation matrix [n, n] (uniform, symmetric, its eigenvalues lifted above 0), with a diagonal of 1."""
    matrix = torch.rand(n, n, generator=generator)
    matrix = (matrix + matrix.T) / 2
    matrix -= 1.001 * torch.linalg.eigvalsh(matrix).min().clamp(max=0) * torch.eye(n)
    length = matrix.diagonal().sqrt()
    return matrix / length / length[:, None]


class ToyWorld:
    """Observations x = sum_j s_j g_j of n true features g_j: random unit vectors in `d` dimensions.

    Feature j is active with probability ``frequencies[j]``; its strength s_j is then uniform on [0, 1), else 0. In a
    `correlated` world the features share a gaussian copula: normals of `random_correlation` go through the gaussian
    distribution function, and feature j is active where its value lies below ``frequencies[j]``. That leaves the frequencies
    as they are. (The authors draw these normals once per batch, so that theirs correlate between batches, not within one.)
    """

    def __init__(self, frequencies: Tensor, d: int, *, generator: torch.Generator, correlated: bool = False):
        n = len(frequencies)
        self.frequencies, self.generator = frequencies, generator
        self.features = unit_rows(torch.randn(n, d, generator=generator))
        self.correlation = random_correlation(n, generator) if correlated else torch.eye(n)
        self.root = torch.linalg.cholesky(self.correlation) if correlated else None

    def strengths(self, n_samples: int) -> Tensor:
        """True strengths [n_samples, n] of new observations, most of them 0."""
        size = (n_samples, len(self.frequencies))
        if self.root is None:
            level = torch.rand(size, generator=self.generator)
        else:
            level = torch.special.ndtr(torch.randn(size, generator=self.generator) @ self.root.T)
        return (level < self.frequencies) * torch.rand(size, generator=self.generator)

    def sample(self, n_samples: int) -> Tensor:
        """New observations [n_samples, d]."""
        return self.strengths(n_samples) @ self.features


def train_stack(
    world: ToyWorld, kind: str, n_features: int, alphas: Sequence[float], *, steps: int, lr: float, batch_size: int,
    generator: torch.Generator,
) -> list[Dictionary]:  # fmt: skip
    """Dictionaries of one `kind` (tied or untied) and size, one per alpha, trained side by side on the same batches.

    Their weights lie in one tensor [alphas, n_features, d], so that a step is a few batched products and not many small
    ones. Each learns what it would learn alone (tests/test_toy.py): the loss is the sum of theirs, and Adam works by element.
    """
    if kind not in ("tied", "untied"):
        raise ValueError(f"stacks are of kind tied or untied, not {kind}")
    stack = [KINDS[kind](n_features, world.features.shape[1], generator=generator) for _ in alphas]
    free = {name: torch.stack([getattr(one, name).detach() for one in stack]).requires_grad_()
            for name, _ in stack[0].named_parameters()}  # fmt: skip
    optimiser = torch.optim.Adam(free.values(), lr=lr, fused=True)
    weights = torch.tensor(alphas)[:, None, None]
    for _ in range(steps):
        x = world.sample(batch_size).expand(len(stack), -1, -1)
        decoder = unit_rows(free["weight" if kind == "tied" else "decoder"])
        encoder = decoder if kind == "tied" else free["weight"]
        code = torch.relu(torch.baddbmm(free["bias"][:, None], x, encoder.mT))
        # `sae_loss` takes the mean over the whole stack: times their number it is the sum; each alpha rides on its code
        loss, _, _ = sae_loss(x, code @ decoder, weights * code, alpha=1.0)
        optimiser.zero_grad()
        (len(stack) * loss).backward()
        optimiser.step()
    for place, one in enumerate(stack):
        one.load_state_dict({name: value[place].detach() for name, value in free.items()}, strict=False)
    return stack


def side_by_side(function: Callable, jobs: Iterable[tuple]) -> list:
    """``[function(*job) for job in jobs]`` with as many jobs at a time as torch has threads, each on one thread.

    Small products gain nothing from two threads, and lose tenfold on a busy machine, where the threads wait for each other.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda job: function(*job), jobs))
    finally:
        torch.set_num_threads(threads)
