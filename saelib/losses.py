"""The paper's loss, and its gradient by hand: five matrix products and nothing else of that size."""

import torch
from torch import Tensor

from saelib.dictionaries import Dictionary, keep_largest


def sae_loss(x: Tensor, x_hat: Tensor, code: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the paper's code for standardised activations `x` and their reconstruction, both [batch, d].

        total = error + alpha * sparsity
        error = mean over batch AND coordinates of (x_hat - x)^2
        sparsity = mean over batch of sum_j |c_j|

    Returns (total, error, sparsity). The paper prints a sum instead of the mean over coordinates (Eq. 4): its alpha is d
    times ours for the same optimum. All alphas of this project are on this, the code's, scale (source:
    autoencoders/sae_ensemble.py of the paper's code).
    """
    error = (x_hat - x).square().mean()
    sparsity = code.abs().sum(-1).mean()
    return error + alpha * sparsity, error, sparsity


def hand_gradient(
    dictionary: Dictionary, x: Tensor, alpha: float, dtype: torch.dtype, pre_activation: Tensor | None = None
) -> dict[str, Tensor]:
    """Set ``.grad`` of the parameters of any of our autoencoders to the gradient of `sae_loss`.

    With y = x - decoder bias (where there is one), residual r = 2 (x_hat - x) / (batch * d) = 2 (D^T c - y) / (batch * d)
    and g = (r D^T + alpha / batch) where c > 0:

        grad D = c^T r,   grad E = g^T y,   grad b = sum of g over the batch,   grad decoder bias = sum of (r - g E)

    and for a matrix of unit rows M = W / ||W|| the chain rule gives (grad M - (grad M . M) M) / ||W||. Tied: D = E = M.
    Products run in `dtype`, sums over the weights in the weights' own. `x` [batch, d] is standardised. `pre_activation`
    [batch, n_features], where it is known already, is E y + b; it is overwritten. Returns ``error`` (0-d) and ``code``
    [batch, n_features]. Equal to autograd (tests/test_losses.py); timed by tests/benchmarks/bench_step.py.
    """
    tied, offset = dictionary.kind == "tied", getattr(dictionary, "decoder_bias", None)
    batch, d = x.shape
    free = dictionary.weight if tied else dictionary.decoder
    norm = free.detach().norm(dim=1, keepdim=True).clamp(min=1e-8)
    rows = free.detach() / norm
    decoder = rows.to(dtype)
    x = (x if offset is None else x - offset.detach()).to(dtype)
    if pre_activation is None:
        encoder = decoder if tied else dictionary.weight.detach().to(dtype)
        pre_activation = torch.addmm(dictionary.bias.detach().to(dtype), x, encoder.T)
    code = pre_activation.relu_()
    if dictionary.kind == "topk":
        code = keep_largest(code, int(dictionary.k))
    residual = torch.addmm(x, code, decoder, beta=-1)
    error = torch.linalg.vector_norm(residual, dtype=free.dtype).square() / (batch * d)
    residual *= 2 / (batch * d)
    gradient = residual @ decoder.T
    gradient = torch.ops.aten.threshold_backward(gradient.add_(alpha / batch), code, 0)
    # the two products of the weights' gradients share one call when tied: their sum is what is needed
    to_decoder = code.T @ residual
    if tied:
        to_rows = torch.addmm(to_decoder, gradient.T, x).to(free.dtype)
    else:
        to_rows = to_decoder.to(free.dtype)
        dictionary.weight.grad = (gradient.T @ x).to(free.dtype)
    free.grad = (to_rows - (to_rows * rows).sum(1, keepdim=True) * rows).div_(norm)
    dictionary.bias.grad = gradient.sum(0, dtype=free.dtype)
    if offset is not None:
        offset.grad = residual.sum(0, dtype=free.dtype) - dictionary.bias.grad @ dictionary.weight.detach()
    return {"error": error, "code": code}
