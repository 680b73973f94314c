"""One training step of the tied form against the limit set by its five matrix products in bfloat16."""

import torch

from saelib import dictionaries, losses, models
from tests.benchmarks.timing import interleaved, report

D, FEATURES, ALPHA = 576, 1152, 3e-3


def step_functions(batch: int, dtype: torch.dtype) -> dict:
    x = torch.randn(batch, D)
    ours, theirs = dictionaries.TiedSAE(FEATURES, D), dictionaries.TiedSAE(FEATURES, D)
    optimiser, plain = (torch.optim.Adam(one.parameters(), lr=1e-3, fused=True) for one in (ours, theirs))
    low, code, matrix = x.to(dtype), torch.rand(batch, FEATURES).to(dtype), ours.directions.detach().to(dtype)

    def limit():
        low @ matrix.T, code @ matrix, low @ matrix.T, code.T @ low, code.T @ low

    def by_hand():
        losses.hand_gradient(ours, x, ALPHA, dtype)
        optimiser.step()

    def autograd():
        plain.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            code = theirs.encode(x)
            x_hat = theirs.decode(code)
        losses.sae_loss(x, x_hat.float(), code.float(), ALPHA)[0].backward()
        plain.step()

    return {
        "five matrix products (the limit)": limit,
        "saelib, gradient by hand": by_hand,
        "autograd, autocast": autograd,
    }


def main():
    dtype = models.fast_dtype()
    for batch, rounds in ((2048, 40), (256, 150)):
        print(f"  d {D}, {FEATURES} features, batch {batch}, {dtype}")
        report(
            interleaved(step_functions(batch, dtype), rounds), "five matrix products (the limit)", batch, "activations"
        )


if __name__ == "__main__":
    main()
