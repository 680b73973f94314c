"""Claims and cards: what a notebook prints in its checked cells. The only printing in the library."""

import platform
import random
from collections.abc import Sequence

import numpy as np
import torch
import yaml

import saelib
from saelib.paths import EXPECTED


class ClaimFailed(AssertionError):
    """One or more claims did not hold; the message gives the measured values."""


class Claims:
    """Check measured values against bounds, print one stable line per claim, raise at the end if one failed.

    The printed line holds the claim's name and its bound, never the measured value, so that it is the same on every
    machine; a failure raises with the values. Bounds come from ``data/expected/<profile>.yaml`` under `notebook`: a bound
    named there (``at_least``, ``at_most``, ``between``, ``near``) is used by `expect`; a claim without a row there is
    refused, so that a bound cannot be forgotten. A claim that was stated and does not hold here keeps its row and gets
    ``missed`` with what was measured: it is printed as a known miss, and raises once it holds, so that the note cannot
    outlive the miss; with ``narrow: true``, where runs fall on both sides of the bound, it never raises. A profile without
    a file makes no claims: they are printed as not judged.
    """

    def __init__(self, notebook: str, profile: str):
        path = EXPECTED / f"{profile}.yaml"
        self.bounds = yaml.safe_load(path.read_text()).get(notebook, {}) if path.exists() else None
        self.failures: list[str] = []

    def expect(self, name: str, value: float) -> None:
        """Judge `value` by the bound that the profile's file gives for the claim `name`."""
        if self.bounds is None:
            print(f"not judged  {name} (no bounds for this profile)")
            return
        if name not in self.bounds:
            raise KeyError(f"no bound for the claim '{name}'; known are {', '.join(self.bounds)}")
        row = self.bounds[name]
        bound = {key: limit for key, limit in row.items() if key not in ("why", "missed", "narrow")}
        holds, known = judge(value, **bound), "missed" in row
        text = ", ".join(f"{key.replace('_', ' ')} {limit}" for key, limit in bound.items())
        print(f"{'known miss' if known else 'ok' if holds else 'FAILED':10}  {name}: {text}")
        if not holds and not known:
            self.failures.append(f"{name}: measured {value:.6g}, wanted {text}")
        if holds and known and not row.get("narrow"):
            self.failures.append(
                f"{name}: a known miss holds now, measured {value:.6g}; give it a `why` for its `missed`"
            )

    def done(self) -> None:
        """Raise `ClaimFailed` with every measured value that missed its bound."""
        if self.failures:
            raise ClaimFailed("; ".join(self.failures))


def judge(
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    between: Sequence[float] | None = None,
    near: float | None = None,
    rel: float | None = None,
    abs: float | None = None,  # noqa: A002 (the name that a reader expects)
) -> bool:
    """Whether `value` keeps the one bound given. ``near`` takes exactly one of ``rel`` and ``abs``. NaN keeps none."""
    given = [bound for bound in (at_least, at_most, between, near) if bound is not None]
    if len(given) != 1:
        raise ValueError("give exactly one of at_least, at_most, between and near")
    if (near is None) != (rel is None and abs is None) or (rel is not None and abs is not None):
        raise ValueError("near takes exactly one of rel and abs, and only near takes them")
    if at_least is not None:
        return bool(value >= at_least)
    if at_most is not None:
        return bool(value <= at_most)
    if between is not None:
        return bool(between[0] <= value <= between[1])
    return bool(np.abs(value - near) <= (rel * np.abs(near) if rel is not None else abs))


def shape_card(**things) -> None:
    """Print name, shape and dtype of each tensor, and plain values as they are: equal on every machine."""
    width = max(map(len, things))
    for name, thing in things.items():
        if hasattr(thing, "shape"):
            shape = " x ".join(f"{size:,}" for size in thing.shape)
            print(f"{name:{width}}  {shape}  {str(thing.dtype).removeprefix('torch.')}")
        else:
            print(f"{name:{width}}  {f'{thing:,}' if isinstance(thing, int) else thing}")


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch, and return a generator of that seed to pass on explicitly."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def environment_line() -> str:
    """Versions, threads and device, for an untagged cell."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return f"saelib {saelib.__version__}, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, {device}"
