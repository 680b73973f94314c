"""Compiled kernels over the active entries of a code: all of a training step but the encoder's product, on a CPU.

Where 5% of a code is active, four of the five matrix products of a step are 95% multiplications by zero. These kernels
visit active entries only, in float32, and end with Adam's update while a feature's row is still in the cache. Every
output is written by one thread, so the result does not depend on the number of threads. Equal to `losses.hand_gradient`
followed by ``torch.optim.Adam`` (tests/test_steps.py); timed by tests/benchmarks/bench_step.py.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

# first torch's own threads (OpenMP), so that two pools do not fight for the cores
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
FLAGS = {"reassoc", "contract", "arcp", "nsz"}  # sums in any order; a value that is not finite still shows
OPTIONS = {"fastmath": FLAGS, "cache": True, "error_model": "numpy"}


@intrinsic
def bits_of(typing_context, value):
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda c, builder, s, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@njit(parallel=True, **OPTIONS)
def count_active(pre, lowest, offsets):
    """``offsets`` [batch + 1] becomes the running count of active entries of ``pre`` [batch, F], the bits of floats.

    Active is what is not <= 0, and so NaN too: the bits of a negative NaN lie above `lowest`, those of -infinity.
    """
    for b in prange(pre.shape[0]):
        count = 0
        for j in range(pre.shape[1]):
            count += (pre[b, j] > lowest) & (pre[b, j] != 0)
        offsets[b + 1] = count
    for b in range(pre.shape[0]):
        offsets[b + 1] += offsets[b]


@njit(parallel=True, **OPTIONS)
def gather_active(pre, lowest, shift, offsets, columns, code_bits):
    """Feature number and value (as float32 bits) of each active entry, row by row."""
    for b in prange(pre.shape[0]):
        n = offsets[b]
        for j in range(pre.shape[1]):
            if pre[b, j] > lowest and pre[b, j] != 0:
                columns[n] = j
                code_bits[n] = np.int32(pre[b, j]) << shift
                n += 1


@njit(parallel=True, **OPTIONS)
def count_largest(pre, k, offsets, smallest):
    """As `count_active` for the k largest entries of each row, as far as they are positive; ``smallest`` [batch] gets the
    bits of the least of them, found by bisection: the bits of positive floats are ordered as the floats are.
    """
    for b in prange(pre.shape[0]):
        row, low, high = pre[b], np.int64(1), np.int64(1) << (8 * pre.itemsize - 1)
        while high - low > 1:  # at least k entries from low on, or low is 1; fewer than k from high on
            middle = (low + high) // 2
            bound, count = pre.dtype.type(middle), 0
            for j in range(len(row)):
                count += row[j] >= bound
            if count >= k:
                low = middle
            else:
                high = middle
        bound, count = pre.dtype.type(low), 0
        for j in range(len(row)):
            count += row[j] >= bound
        smallest[b], offsets[b + 1] = bound, min(count, k)
    for b in range(pre.shape[0]):
        offsets[b + 1] += offsets[b]


@njit(parallel=True, **OPTIONS)
def gather_largest(pre, smallest, shift, offsets, columns, code_bits):
    """As `gather_active` for the entries counted by `count_largest`; of equal ones at the end the first are taken."""
    for b in prange(pre.shape[0]):
        n, ties = offsets[b], offsets[b + 1] - offsets[b]
        for j in range(pre.shape[1]):
            ties -= pre[b, j] > smallest[b]
        for j in range(pre.shape[1]):
            if pre[b, j] > smallest[b] or (pre[b, j] == smallest[b] and ties > 0):
                ties -= pre[b, j] == smallest[b]
                columns[n], code_bits[n] = j, np.int32(pre[b, j]) << shift
                n += 1


@njit(parallel=True, **OPTIONS)
def residuals(x, offsets, columns, code, decoder, inverse, factor, penalty, residual, gradient, errors):
    """Per row b: error |x_hat - x|^2, residual r = factor (x_hat - x), and per active entry g = r . D_j + penalty.

    D_j = decoder[j] * inverse[j] are unit rows.
    """
    d = x.shape[1]
    for b in prange(x.shape[0]):
        r = residual[b]
        for i in range(d):
            r[i] = -x[b, i]
        begin, end = offsets[b], offsets[b + 1]
        paired = begin + (end - begin) // 2 * 2
        for e in range(begin, paired, 2):
            j, k = columns[e], columns[e + 1]
            c, f, v, w = code[e] * inverse[j], code[e + 1] * inverse[k], decoder[j], decoder[k]
            for i in range(d):
                r[i] += c * v[i] + f * w[i]
        for e in range(paired, end):
            c, w = code[e] * inverse[columns[e]], decoder[columns[e]]
            for i in range(d):
                r[i] += c * w[i]
        total = np.float32(0)
        for i in range(d):
            total += r[i] * r[i]
            r[i] *= factor
        errors[b] = total
        for e in range(begin, end):
            w, dot = decoder[columns[e]], np.float32(0)
            for i in range(d):
                dot += r[i] * w[i]
            gradient[e] = dot * inverse[columns[e]] + penalty


@njit(**OPTIONS)
def by_feature(offsets, columns, starts, rows, entries):
    """Sort the entries by feature: those of feature j stand at starts[j] .. starts[j + 1], by row."""
    starts[:] = 0
    for e in range(len(columns)):
        starts[columns[e] + 1] += 1
    for j in range(len(starts) - 1):
        starts[j + 1] += starts[j]
    place = starts[:-1].copy()
    for b in range(len(offsets) - 1):
        for e in range(offsets[b], offsets[b + 1]):
            n = place[columns[e]]
            place[columns[e]] += 1
            rows[n], entries[n] = b, e


@njit(**OPTIONS)
def adam(w, g, m, v, rate, root, momentum, decay, eps):
    """Adam's update of one row: rate = lr / (1 - momentum^t), root = sqrt(1 - decay^t)."""
    for i in range(len(w)):
        m[i] = momentum * m[i] + (np.float32(1) - momentum) * g[i]
        v[i] = decay * v[i] + (np.float32(1) - decay) * g[i] * g[i]
        w[i] -= rate * m[i] / (np.sqrt(v[i]) / root + eps)


@njit(parallel=True, **OPTIONS)
def prepare(decoder, encoder, tied, inverse, low):
    """``inverse`` [F] = 1 / |decoder row| and ``low`` [F, d]: the encoder's rows (unit ones when `tied`) for the product.

    ``low`` is float32, or int16 for the bits of bfloat16, rounded to nearest even.
    """
    for j in prange(len(decoder)):
        square = np.float32(0)
        for i in range(decoder.shape[1]):
            square += decoder[j, i] * decoder[j, i]
        inverse[j] = np.float32(1) / max(np.sqrt(square), np.float32(1e-8))
        factor = inverse[j] if tied else np.float32(1)
        if low.itemsize == 2:
            for i in range(decoder.shape[1]):
                bits = bits_of(encoder[j, i] * factor)
                low[j, i] = np.int16((bits + np.int32(0x7FFF) + ((bits >> 16) & 1)) >> 16)
        else:
            for i in range(decoder.shape[1]):
                low[j, i] = encoder[j, i] * factor


@njit(**OPTIONS)
def unit(g, w, inverse):
    """Chain rule through w * inverse, a unit row: g becomes (g - (g . m) m) inverse."""
    dot = np.float32(0)
    for i in range(len(w)):
        dot += g[i] * w[i]
    dot *= inverse * inverse
    for i in range(len(w)):
        g[i] = (g[i] - dot * w[i]) * inverse


@njit(parallel=True, **OPTIONS)
def update(tied, starts, rows, entries, code, gradient, residual, x, encoder, decoder, bias, inverse, settings):
    """Per feature j: the gradients of its rows from its active entries, then Adam's step on them and on its bias.

        grad D_j = sum_b c_bj r_b,   grad E_j = sum_b g_bj x_b,   grad b_j = sum_b g_bj

    `encoder`, `decoder` and `bias` are (weights, first moment, second moment); when `tied` the encoder is the decoder.
    """
    rate, root, momentum, decay, eps = settings
    n_features, d = decoder[0].shape
    n_chunks = 64
    for chunk in prange(n_chunks):
        g, h, one = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(1, np.float32)
        for j in range(chunk * n_features // n_chunks, (chunk + 1) * n_features // n_chunks):
            g[:], h[:], one[0] = 0, 0, 0
            for n in range(starts[j], starts[j + 1]):
                e, r, y = entries[n], residual[rows[n]], x[rows[n]]
                c, f = code[e], gradient[e]
                one[0] += f
                if tied:
                    for i in range(d):
                        g[i] += c * r[i] + f * y[i]
                else:
                    for i in range(d):
                        g[i] += c * r[i]
                        h[i] += f * y[i]
            if not tied:
                adam(encoder[0][j], h, encoder[1][j], encoder[2][j], rate, root, momentum, decay, eps)
            unit(g, decoder[0][j], inverse[j])
            adam(decoder[0][j], g, decoder[1][j], decoder[2][j], rate, root, momentum, decay, eps)
            adam(bias[0][j : j + 1], one, bias[1][j : j + 1], bias[2][j : j + 1], rate, root, momentum, decay, eps)
