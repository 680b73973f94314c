"""One training step: over the active entries alone where a code is sparse and a CPU does it, else with dense products."""

import numpy as np
import torch
from torch import Tensor

from saelib.dictionaries import Dictionary
from saelib.losses import hand_gradient

DENSE_ABOVE = 0.18  # share of active entries from which five dense products are the faster way
# of each dtype of the products: the integers that hold its bits, the bits of -infinity, their distance from a float32's
LAYOUT = {torch.bfloat16: (torch.int16, -0x80, 16), torch.float32: (torch.int32, -0x800000, 0)}


def adam(dictionary: Dictionary, lr: float, beta2: float = 0.999) -> torch.optim.Adam:
    """Adam (betas 0.9 and `beta2`, eps 1e-8) whose moments exist from the start."""
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=lr, betas=(0.9, beta2), fused=True)
    for parameter in dictionary.parameters():
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimiser.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | zeros
    return optimiser


def step(
    dictionary: Dictionary,
    optimiser: torch.optim.Adam,
    x: Tensor,
    alpha: float,
    dtype: torch.dtype,
    lr: float,
    frozen_step: bool = False,
) -> dict[str, Tensor | float]:
    """One step of Adam on `losses.sae_loss` for standardised `x` [batch, d], products in `dtype`.

    Returns ``error`` (0-d) and, of the batch before the step, ``l0`` and ``sparsity`` (mean L1 norm of the code), as
    tensors or numbers. Both ways give the same step up to rounding (tests/test_steps.py); which one is taken depends on
    the share of active entries alone, so a resumed run takes the same.

    ``frozen_step`` does as the paper's code (autoencoders/ensemble.py): it writes the updated state into copies that are
    thrown away, so the step counter never moves while the moments do. The bias correction is that of the first step for ever
    (moments divided by 0.1 and 0.001): under a constant gradient a step is 2.1 times the rate near step 10 and
    sqrt(0.001) / 0.1 = 0.32 of it in the end.
    """
    optimiser.param_groups[0]["lr"] = lr
    if frozen_step:
        for state in optimiser.state.values():
            state["step"].zero_()
    pre_activation = None
    if x.device.type == "cpu" and x.dtype == torch.float32 and dtype in LAYOUT:
        found, pre_activation = _sparse_step(dictionary, optimiser, x, alpha, dtype)
        if found is not None:
            return found
    found = hand_gradient(dictionary, x, alpha, dtype, pre_activation)
    optimiser.step()
    code = found["code"]
    return {
        "error": found["error"],
        "l0": (code != 0).sum() / len(x),
        "sparsity": code.sum(dtype=torch.float32) / len(x),
    }


def _sparse_step(dictionary, optimiser, x: Tensor, alpha: float, dtype: torch.dtype) -> tuple[dict | None, Tensor]:
    """The step by `kernels`, and the pre-activations; None, with nothing changed, where more than `DENSE_ABOVE` are active."""
    from saelib import kernels  # numba takes a second to import, and a GPU does without

    threads = torch.get_num_threads()
    kernels.numba.set_num_threads(min(threads, kernels.numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # the first call starts numba's threads and gives torch all cores
        torch.set_num_threads(threads)
    tied, offset = dictionary.kind == "tied", getattr(dictionary, "decoder_bias", None)
    (batch, d), n_features = x.shape, len(dictionary.bias)
    x = (x if offset is None else x - offset.detach()).contiguous()
    encoder = _row(dictionary.weight, optimiser)
    decoder = encoder if tied else _row(dictionary.decoder, optimiser)
    inverse, low = np.empty(n_features, np.float32), torch.empty(n_features, d, dtype=dtype)
    half = dtype == torch.bfloat16
    kernels.prepare(decoder[0], encoder[0], tied, inverse, (low.view(torch.int16) if half else low).numpy())
    pre_activation = torch.addmm(dictionary.bias.detach().to(dtype), x.to(dtype), low.T)

    offsets, (bits, lowest, shift) = np.zeros(batch + 1, np.int64), LAYOUT[dtype]
    bits = pre_activation.view(bits).numpy()
    if dictionary.kind == "topk":
        smallest = np.empty(batch, bits.dtype)
        kernels.count_largest(bits, int(dictionary.k), offsets, smallest)
    else:
        kernels.count_active(bits, lowest, offsets)
        if offsets[-1] > DENSE_ABOVE * bits.size:
            return None, pre_activation
    columns, code = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    if dictionary.kind == "topk":
        kernels.gather_largest(bits, smallest, shift, offsets, columns, code.view(np.int32))
    else:
        kernels.gather_active(bits, lowest, shift, offsets, columns, code.view(np.int32))

    x, residual, gradient, errors = (
        x.numpy(),
        np.empty((batch, d), np.float32),
        np.empty_like(code),
        np.empty(batch, np.float32),
    )
    factor, penalty = np.float32(2 / (batch * d)), np.float32(alpha / batch)
    kernels.residuals(x, offsets, columns, code, decoder[0], inverse, factor, penalty, residual, gradient, errors)
    starts, rows, entries = np.empty(n_features + 1, np.int64), np.empty_like(columns), np.empty_like(columns)
    kernels.by_feature(offsets, columns, starts, rows, entries)
    if offset is not None:  # before the encoder changes
        sums = np.bincount(columns, gradient, n_features).astype(np.float32)
        to_offset = residual.sum(0) - (torch.from_numpy(sums) @ dictionary.weight.detach()).numpy()

    for state in optimiser.state.values():
        state["step"] += 1
    count, (beta1, beta2), lr = int(state["step"]), optimiser.defaults["betas"], optimiser.param_groups[0]["lr"]
    settings = (lr / (1 - beta1**count), (1 - beta2**count) ** 0.5, beta1, beta2, optimiser.defaults["eps"])
    with np.errstate(over="ignore"):  # a rate beyond float32 shows as a loss that is not finite
        settings = tuple(map(np.float32, settings))
    bias = _row(dictionary.bias, optimiser)
    kernels.update(tied, starts, rows, entries, code, gradient, residual, x, encoder, decoder, bias, inverse, settings)
    if offset is not None:
        weights, *moments = _row(offset, optimiser)
        kernels.adam(weights, to_offset, *moments, *settings)
    found = {"error": torch.tensor(errors.sum() / (batch * d)), "l0": len(code) / batch, "sparsity": code.sum() / batch}
    return found, pre_activation


def _row(parameter: Tensor, optimiser) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, first and second moment of a parameter, as arrays on the same memory."""
    state = optimiser.state[parameter]
    return tuple(value.detach().numpy() for value in (parameter, state["exp_avg"], state["exp_avg_sq"]))
