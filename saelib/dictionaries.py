"""Dictionaries: one interface for every method that turns an activation into a code and back."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saelib import files
from saelib.paths import MissingArtefact, require

ALL = slice(None)


class DictionaryError(ValueError):
    """A dictionary file is not what it says; the message names the file and what is wrong."""


class Dictionary(nn.Module):
    """A set of directions in activation space with an encoder.

    Every member works in the model's own coordinates and units: it holds the ``mean`` [d] that it takes off and the
    ``scale`` [] that it divides by, so that callers never scale anything. ``x`` is [..., d], a ``code`` is
    [..., n_features], non-negative unless a member says otherwise.

        code = encode(x),   x_hat = decode(code) = scale * code @ directions + mean
    """

    kind: str

    def __init__(self, d: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))

    def _apply(self, fn, recurse: bool = True):
        """Move or convert all but the settings that are asked for at every call: reading them from a GPU would wait for it."""
        kept = {name: self._buffers[name] for name in ("k", "rectify") if name in self._buffers}
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        return self

    @property
    def directions(self) -> Tensor:
        """Unit-norm rows [n_features, d]: what each feature writes."""
        raise NotImplementedError

    @property
    def n_features(self) -> int:
        return self.directions.shape[0]

    @property
    def d(self) -> int:
        return self.mean.shape[0]

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / scale, [..., d], in the dictionary's dtype: the coordinates in which it was trained."""
        return (x.to(self.mean.dtype) - self.mean) / self.scale

    def encode(self, x: Tensor, features: Tensor | list[int] | slice = ALL) -> Tensor:
        """Code [..., n_features] of activations [..., d], or its columns `features`: the others then cost nothing, except
        where features compete (TopK)."""
        raise NotImplementedError

    def decode(self, code: Tensor) -> Tensor:
        """Reconstruction [..., d] of a code [..., n_features]."""
        return self.scale * (code @ self.directions) + self.mean

    def forward(self, x: Tensor) -> Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x))


def unit_rows(matrix: Tensor) -> Tensor:
    """Rows divided by their norm, clamped at 1e-8 as in the paper's code (autoencoders/sae_ensemble.py)."""
    return matrix / matrix.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def _xavier(n_features: int, d: int, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_features, d), generator=generator))


class TiedSAE(Dictionary):
    """The paper's autoencoder (Eq. 1 to 3): one matrix M of unit rows encodes and decodes.

        c = ReLU(M x + b),   x_hat = M^T c,   M = W / ||W||_row

    ``weight`` W [n_features, d] is free; the norm is taken inside the differentiable loss (source: the paper's code,
    FunctionalTiedSAE), which stops the cheat of growing rows. No decoder bias. Xavier-uniform start, b = 0.
    """

    kind = "tied"

    def __init__(self, n_features: int, d: int, *, generator: torch.Generator | None = None):
        super().__init__(d)
        self.weight = _xavier(n_features, d, generator)
        self.bias = nn.Parameter(torch.zeros(n_features))

    @property
    def directions(self) -> Tensor:
        return unit_rows(self.weight)

    def encode(self, x: Tensor, features: Tensor | list[int] | slice = ALL) -> Tensor:
        return torch.relu(self.standardise(x) @ unit_rows(self.weight[features]).T + self.bias[features])


class UntiedSAE(Dictionary):
    """The untied form (Eq. 5 and 6, MLP activations): a free encoder E and a decoder D of unit rows.

        c = ReLU(E x + b),   x_hat = D^T c,   D = V / ||V||_row

    ``weight`` E and ``decoder`` V are [n_features, d] (source: the paper's code, FunctionalSAE). Same Xavier start.
    """

    kind = "untied"

    def __init__(self, n_features: int, d: int, *, generator: torch.Generator | None = None):
        super().__init__(d)
        self.weight = _xavier(n_features, d, generator)
        self.decoder = nn.Parameter(self.weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(n_features))

    @property
    def directions(self) -> Tensor:
        return unit_rows(self.decoder)

    def encode(self, x: Tensor, features: Tensor | list[int] | slice = ALL) -> Tensor:
        return torch.relu(self.standardise(x) @ self.weight[features].T + self.bias[features])


class StandardSAE(UntiedSAE):
    """The untied form with a decoder bias, as SAELens ("standard") and dictionary_learning (AutoEncoder) train it.

        c = ReLU(E (x - a) + b),   x_hat = D^T c + a

    ``decoder_bias`` a [d], in the standardised coordinates of x, starts at 0. Rows of E and V start with length 0.1: codes are
    small at first, and Adam turns short rows faster. `training.start` sets a to the mean of the activations (both as Gao et
    al. 2024 and SAELens) and the rows to deviations of single activations from it. On layer 6, 128,000 activations, the first
    two lower the FVU of this form by 4% and of TopK by 7%, the third by another 3% and 2 to 4%.
    """

    kind = "standard"

    def __init__(self, n_features: int, d: int, *, generator: torch.Generator | None = None):
        super().__init__(n_features, d, generator=generator)
        self.weight.data = 0.1 * unit_rows(self.weight.data)
        self.decoder.data = self.weight.data.clone()
        self.decoder_bias = nn.Parameter(torch.zeros(d))

    def encode(self, x: Tensor, features: Tensor | list[int] | slice = ALL) -> Tensor:
        centred = self.standardise(x) - self.decoder_bias
        return torch.relu(centred @ self.weight[features].T + self.bias[features])

    def decode(self, code: Tensor) -> Tensor:
        return self.scale * (code @ self.directions + self.decoder_bias) + self.mean


class TopKSAE(StandardSAE):
    """The standard form that keeps the k largest codes instead of paying for each (Gao et al. 2024, arXiv 2406.04093).

        c = TopK(ReLU(E (x - a) + b)),   x_hat = D^T c + a

    Trained on the error alone, without their auxiliary loss for dead features. ``k`` is stored with the weights.
    """

    kind = "topk"

    def __init__(self, n_features: int, d: int, *, k: int = 32, generator: torch.Generator | None = None):
        super().__init__(n_features, d, generator=generator)
        self.register_buffer("k", torch.tensor(k))

    def encode(self, x: Tensor, features: Tensor | list[int] | slice = ALL) -> Tensor:
        return keep_largest(super().encode(x), int(self.k))[..., features]


class Linear(Dictionary):
    """A linear map that was fitted, not trained: what `saelib.baselines` makes of PCA, ICA and the other baselines.

        c = E (x - mean) / scale,  then ReLU if ``rectify``,  then all but the k largest |c_j| set to 0 if ``k`` > 0
        x_hat = scale * D^T c + mean

    ``encoder`` E [n_features, d], ``decoder`` D [n_features, d] of unit rows. Codes have both signs unless ``rectify``.
    """

    kind = "linear"

    def __init__(self, n_features: int, d: int):
        super().__init__(d)
        self.register_buffer("encoder", torch.zeros(n_features, d))
        self.register_buffer("decoder", torch.zeros(n_features, d))
        self.register_buffer("rectify", torch.tensor(False))
        self.register_buffer("k", torch.tensor(0))

    @property
    def directions(self) -> Tensor:
        return self.decoder

    def encode(self, x: Tensor, features: Tensor | list[int] | slice = ALL) -> Tensor:
        code = self.standardise(x) @ (self.encoder if self.k > 0 else self.encoder[features]).T
        code = torch.relu(code) if self.rectify else code
        return (code * (keep_largest(code.abs(), int(self.k)) > 0))[..., features] if self.k > 0 else code


def keep_largest(code: Tensor, k: int) -> Tensor:
    """`code` [..., n_features] with all but the `k` largest entries of each row set to 0."""
    values, places = code.topk(min(k, code.shape[-1]), dim=-1)
    return torch.zeros_like(code).scatter_(-1, places, values)


KINDS: dict[str, type[Dictionary]] = {member.kind: member for member in (TiedSAE, UntiedSAE, StandardSAE, TopKSAE)}
MEMBERS = KINDS | {Linear.kind: Linear}  # what a file may hold; KINDS are trained


def save(dictionary: Dictionary, path: Path, **about) -> None:
    """Write ``path`` (.safetensors) and ``path`` with .json: kind, shape, and whatever JSON-able is in `about`.

    The .json is written last: without it the dictionary does not count as finished.
    """
    path.with_suffix(".json").unlink(missing_ok=True)
    with files.atomic(path) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in dictionary.state_dict().items()}, temporary
        )
    head = {
        "kind": dictionary.kind,
        "n_features": dictionary.n_features,
        "d": dictionary.d,
        "sha256": files.sha256(path),
    }
    files.write_json(path.with_suffix(".json"), head | about)


def load(path: Path, *, device: torch.device | str = "cpu") -> tuple[Dictionary, dict]:
    """Read a dictionary and its .json. Raises `DictionaryError` for another kind, shape or an altered file."""
    about = files.read_json(require(path.with_suffix(".json"), "02_train_dictionaries"))
    if about["kind"] not in MEMBERS:
        raise DictionaryError(f"{path}: unknown kind '{about['kind']}'; known are {', '.join(MEMBERS)}")
    if files.sha256(path) != about["sha256"]:
        raise DictionaryError(f"{path} is not the file that its .json describes: delete both and train again")
    dictionary = MEMBERS[about["kind"]](about["n_features"], about["d"])
    try:
        dictionary.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise DictionaryError(f"{path}: {error}") from error
    return dictionary.to(device), about


def find(folder: Path, *, device: torch.device | str = "cpu", **wanted) -> tuple[Dictionary, dict]:
    """The first trained dictionary in `folder` whose settings (`training.TrainConfig`) are as `wanted`, and its .json."""
    for path in sorted(folder.glob("*.json")):
        config = files.read_json(path)["spec"]["config"]
        if all(config[name] == value for name, value in wanted.items()):
            return load(path.with_suffix(".safetensors"), device=device)
    raise MissingArtefact(f"no dictionary in {folder} with {wanted}. Notebook 02_train_dictionaries makes them")
