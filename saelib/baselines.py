"""Baselines: default basis, random directions, PCA and ICA as members of the `Dictionary` interface.

Plain functions make a `Linear` dictionary, smaller ones give it another form: `rectified`, `both_signs`, `top_k`,
`oriented`. Source of the forms "as in the paper's code": autoencoders/pca.py, ica.py, learned_dict.py, topk_encoder.py.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import saelib
from saelib import dictionaries, files
from saelib.dictionaries import Dictionary, Linear, unit_rows
from saelib.paths import require
from saelib.store import ActivationStore

VARIANCE_FLOOR = 1e-10  # of the largest variance: components with less cannot be whitened in float32


class BaselineError(ValueError):
    """A baseline cannot be made as asked; the message says why and what to change."""


def linear(encoder: Tensor, directions: Tensor, mean: Tensor | None = None) -> Linear:
    """`Linear` with the given `encoder` and `directions` [n_features, d] (made unit rows) and `mean` [d], by default 0."""
    made = Linear(*directions.shape)
    made.encoder.copy_(encoder)
    made.decoder.copy_(unit_rows(directions))
    if mean is not None:
        made.mean.copy_(mean)
    return made


def default_basis(d: int) -> Linear:
    """The coordinates themselves: c = x, signed. `rectified`, it is the paper's default basis (IdentityReLU)."""
    return linear(torch.eye(d), torch.eye(d))


def random_directions(n_features: int, d: int, *, generator: torch.Generator) -> Linear:
    """c = M x with `n_features` rows M drawn evenly from the sphere, signed. `rectified`, it is the paper's baseline, but for
    the length of the rows: the paper's are not unit rows, which a correlation cannot see."""
    rows = unit_rows(torch.randn(n_features, d, generator=generator))
    return linear(rows, rows)


def pca(x: Tensor, n_components: int | None = None, *, centre: bool = True) -> Linear:
    """Principal components of `x` [n, d], largest variance first: c = V (x - mean), signed.

    The covariance is taken around the mean in any case; with ``centre=False`` the mean is not taken off before encoding,
    as in the paper's code. All d components reconstruct x exactly.
    """
    mean, _, rows = _eigen(x, n_components)
    return linear(rows, rows, mean if centre else None)


def _eigen(x: Tensor, n_components: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [d], variances [k] in falling order and unit eigenvectors [k, d] of the covariance of `x`, in float64."""
    n, d = x.shape
    k = d if n_components is None else n_components
    if not 1 <= k <= d:
        raise BaselineError(f"{k} components of activations of width {d}: ask for 1 to {d}")
    if n <= k:
        raise BaselineError(f"{n} activations are too few for {k} components: give more than {k}")
    mean, covariance = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for part in x.split(16_384):
        mean += part.double().sum(0) / n
    for part in x.split(16_384):
        part = part.double() - mean
        covariance += part.T @ part / n
    variance, vectors = torch.linalg.eigh(covariance)
    return mean, variance.flip(0)[:k], vectors.T.flip(0)[:k]


def rectified(dictionary: Linear) -> Linear:
    """The same with ReLU: negative codes become 0, as in the paper's default basis and random directions."""
    made = copy.deepcopy(dictionary)
    made.rectify.fill_(True)
    return made


def both_signs(dictionary: Linear) -> Linear:
    """Each direction and its negative as two features, [V; -V], with ReLU: what a signed code says, without signs."""
    made = linear(
        torch.cat([dictionary.encoder, -dictionary.encoder]),
        torch.cat([dictionary.decoder, -dictionary.decoder]),
        dictionary.mean,
    )
    made.scale.copy_(dictionary.scale)
    return rectified(made)


def top_k(dictionary: Linear, k: int) -> Linear:
    """The same with all but the `k` codes of largest magnitude set to 0."""
    if not 1 <= k <= dictionary.n_features:
        raise BaselineError(f"k = {k}: the dictionary has {dictionary.n_features} directions, ask for 1 to as many")
    made = copy.deepcopy(dictionary)
    made.k.fill_(k)
    return made


@dataclass(frozen=True)
class Moments:
    """Of each feature's code over some activations: ``mean``, ``variance``, ``skew`` = E[(c - mean)^3] / variance^1.5 and
    ``kurtosis`` = E[(c - mean)^4] / variance^2 (3 for a Gaussian), each [n_features] float64; NaN where it never varies."""

    mean: Tensor
    variance: Tensor
    skew: Tensor
    kurtosis: Tensor


@torch.inference_mode()
def moments(dictionary: Dictionary, chunks: Iterable[Tensor]) -> Moments:
    """`Moments` of the codes of `dictionary` over `chunks` of activations [n, d], in one pass."""
    return moments_of(dictionary.encode(x.to(dictionary.mean)) for x in chunks)


def moments_of(codes: Iterable[Tensor]) -> Moments:
    """`Moments` over chunks of codes [n, features], in float64."""
    sums, n = 0.0, 0
    for code in codes:
        code = code.double()
        square = code * code
        sums = sums + torch.stack([power.sum(0) for power in (code, square, square * code, square * square)]).cpu()
        n += len(code)
    m, m2, m3, m4 = sums / n
    variance = m2 - m**2
    variance[variance <= 1e-12 * m2] = torch.nan
    third = m3 - 3 * m * m2 + 2 * m**3
    fourth = m4 - 4 * m * m3 + 6 * m**2 * m2 - 3 * m**4
    return Moments(m, variance, third / variance**1.5, fourth / variance**2)


def oriented(dictionary: Linear, x: Tensor) -> Linear:
    """The same with each direction turned so that its code is skewed to the right on `x` [n, d]: the heavy tail positive.

    An ICA direction and its negative are equally good, and the paper takes the sign as it came; the paper's test looks at
    the largest codes alone, so a feature whose heavy tail came out negative is tested on the wrong side.
    """
    sign = torch.where(moments(dictionary, x.split(8192)).skew < 0, -1.0, 1.0)[:, None].to(dictionary.mean)
    made = copy.deepcopy(dictionary)
    made.encoder *= sign
    made.decoder *= sign
    return made


def ica(
    x: Tensor, n_components: int | None = None, *, iterations: int = 100, tolerance: float = 1e-4, seed: int = 0
) -> tuple[Linear, list[float]]:
    """Independent components of `x` [n, d] by parallel FastICA (log cosh), and the change at each iteration.

        s = W z,  z = D (x - mean) whitened;   W <- polar factor of  E[tanh(s) z^T] - diag(E[1 - tanh(s)^2]) W

    Directions are the rows of the mixing map (W D)^-1, made unit rows, and a code is s times the length of its row, so that
    all d components reconstruct x exactly. The change is scikit-learn's: 1 - the smallest |cosine| of a row of W with itself
    one iteration before; the fit ends when it is below `tolerance` or after `iterations`. Signs are as they came: `oriented`.

    The iteration is scikit-learn's FastICA, which the paper's code uses (tests/test_baselines.py compares the two): products
    in float32, the polar factor in float64, where scikit-learn in float32 breaks down on 576 components. The code's
    StandardScaler is left out, since whitening undoes it but for the start.
    """
    mean, variance, rows = _eigen(x, n_components)
    if variance[-1] < VARIANCE_FLOOR * variance[0]:
        usable = int((variance >= VARIANCE_FLOOR * variance[0]).sum())
        raise BaselineError(f"only {usable} of {len(rows)} components have variance: ask for {usable} or fewer")
    whiten, mixing = rows / variance.sqrt()[:, None], rows * variance.sqrt()[:, None]
    white = [(part.float() - mean.float()) @ whiten.float().T for part in x.split(8192)]
    w = _polar(torch.randn(len(rows), len(rows), generator=torch.Generator().manual_seed(seed)).double())
    changes: list[float] = []
    with tqdm(total=iterations, desc="ICA", unit="iteration", leave=False) as bar:
        while len(changes) < iterations and (not changes or changes[-1] >= tolerance):
            product, slope = torch.zeros(w.shape), torch.zeros(len(w))
            for z in white:
                code = (z @ w.float().T).tanh_()
                product += code.T @ z / len(x)
                slope += (1 - code.square_()).sum(0) / len(x)
            before, w = w, _polar(product.double() - slope[:, None] * w)
            changes.append(1 - (w * before).sum(1).abs().min().item())
            bar.set_postfix_str(f"change {changes[-1]:.1e}", refresh=False)
            bar.update()
    directions = w @ mixing
    return linear(directions.norm(dim=1, keepdim=True) * (w @ whiten), directions, mean), changes


def _polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a square `matrix`, (M M^T)^-1/2 M: symmetric decorrelation."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return vectors / values.clamp(min=torch.finfo(matrix.dtype).tiny).sqrt() @ vectors.T @ matrix


def ica_top_k_of_the_code(dictionary: Linear, x: Tensor, k: int) -> Linear:
    """ICA top-K as the paper's code has it: unmixing rows made for standardised coordinates multiply the activations as
    they are, nothing is centred, and the same rows (not the mixing ones) are the directions. `x`: what ICA was fitted on."""
    spread = moments(dictionary, x.split(8192)).variance.sqrt()[:, None]
    rows = (dictionary.encoder / spread * x.float().std(0)).float()
    return top_k(both_signs(linear(rows, rows)), k)


def sample(store: ActivationStore, n: int, *, seed: int = 0) -> Tensor:
    """`n` activations [n, d] of `store` drawn without repetition, float32: the same for every method."""
    if n > store.n:
        raise BaselineError(f"{n} activations wanted, {store.folder} has {store.n}: ask for fewer or harvest more")
    return store.rows(torch.randperm(store.n, generator=torch.Generator().manual_seed(seed))[:n]).float()


def fitted(
    name: str, make: Callable[[], tuple[Linear, dict]], folder: Path, store: ActivationStore, **parameters
) -> tuple[Linear, dict]:
    """The dictionary that ``make()`` returns with a description, kept as ``folder/<name>.safetensors`` and .json.

    Loaded, not made again, while `parameters`, the activations of `store` and saelib's version are the same. The
    description has ``spec``, ``seconds`` and what `make` says. `parameters` must hold all that `make` depends on.
    """
    path = folder / f"{name}.safetensors"
    spec = {
        "saelib": saelib.__version__,
        "activations": files.key(store.manifest),
        "outlier_factor": store.outlier_factor,
        "parameters": parameters,
    }
    if path.with_suffix(".json").exists():
        dictionary, about = dictionaries.load(path)
        if about["spec"] == spec:
            return dictionary, about
    start = time.perf_counter()
    dictionary, said = make()
    if dictionary.d != store.d:
        raise BaselineError(f"'{name}' has width {dictionary.d}, but {store.hook} has {store.d}")
    dictionaries.save(dictionary, path, spec=spec, seconds=time.perf_counter() - start, **said)
    return dictionary, files.read_json(path.with_suffix(".json"))


def load_all(folder: Path) -> dict[str, Linear]:
    """Every finished baseline in `folder` by its name."""
    require(folder, "03_baselines")
    return {path.stem: dictionaries.load(path.with_suffix(".safetensors"))[0] for path in sorted(folder.glob("*.json"))}
