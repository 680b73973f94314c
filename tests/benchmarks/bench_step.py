"""One training step of the tied form against the limit set by its five dense matrix products in the fast dtype.

The share of active entries is set by the bias and printed as it was at the end; a trained dictionary of ratio 2 has 2 to 10%.
"""

import statistics

import torch

from saelib import dictionaries, losses, models, steps
from tests.benchmarks.timing import interleaved, report

D, ALPHA, LR = 576, 1e-3, 1e-4
LIMIT = "five dense matrix products (the limit)"


def start(n_features: int, x: torch.Tensor, share: float) -> tuple[dictionaries.TiedSAE, torch.optim.Adam]:
    """A tied dictionary of which about `share` of the codes of `x` is active, and its optimiser."""
    made = dictionaries.TiedSAE(n_features, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.bias.fill_(-(x[:64] @ made.directions.T).flatten().sort().values[-int(64 * n_features * share)])
    return made, steps.adam(made, LR)


def step_functions(batch: int, n_features: int, share: float, dtype: torch.dtype) -> tuple[dict, dict]:
    x = torch.randn(batch, D)
    (ours, optimiser), (dense, dense_adam), (plain, plain_adam) = (start(n_features, x, share) for _ in range(3))
    low, code, matrix = x.to(dtype), torch.rand(batch, n_features).to(dtype), ours.directions.detach().to(dtype)
    found = {}

    def limit():
        low @ matrix.T, code @ matrix, low @ matrix.T, code.T @ low, code.T @ low

    def sparse():
        found.update(steps.step(ours, optimiser, x, ALPHA, dtype, LR))

    def by_hand():
        losses.hand_gradient(dense, x, ALPHA, dtype)
        dense_adam.step()

    def autograd():
        plain_adam.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            code = plain.encode(x)
            x_hat = plain.decode(code)
        losses.sae_loss(x, x_hat.float(), code.float(), ALPHA)[0].backward()
        plain_adam.step()

    functions = {LIMIT: limit, "saelib, active entries": sparse, "saelib, dense by hand": by_hand}
    return functions | {"autograd, autocast": autograd}, found


def main():
    dtype = models.fast_dtype()
    cases = ((256, 1152, 0.065, 100), (2048, 1152, 0.065, 25), (256, 1152, 0.2, 60), (2048, 9216, 0.02, 5))
    for batch, n_features, share, rounds in cases:
        functions, found = step_functions(batch, n_features, share, dtype)
        seconds = interleaved(functions, rounds)
        print(f"  d {D}, {n_features} features, batch {batch}, {dtype}, {float(found['l0']) / n_features:.1%} active")
        report(seconds, LIMIT, batch, "activations")
    growth(dtype)


def growth(dtype: torch.dtype, batch: int = 2048):
    """Cost of R = 16 over R = 2 at the L0 that one alpha gives (1e-3 at layer 10: 93 at R = 2, 113 at R = 8)."""
    functions = {}
    for ratio, l0 in ((2, 93), (16, 125)):
        made, _ = step_functions(batch, ratio * D, l0 / (ratio * D), dtype)
        functions |= {(ratio, name): made[name] for name in (LIMIT, "saelib, active entries")}
    seconds = interleaved(functions, rounds=8)
    for name in (LIMIT, "saelib, active entries"):
        ratios = [large / small for large, small in zip(seconds[16, name], seconds[2, name], strict=True)]
        print(f"  {name:42} R = 16 costs {statistics.median(ratios):.1f} times R = 2 per activation, batch {batch}")


if __name__ == "__main__":
    main()
