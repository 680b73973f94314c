"""Fragments: short pieces of text with what each feature does there, and the choice of those that explain and score it."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from saelib.dictionaries import Dictionary
from saelib.store import ActivationStore

LENGTH = 64  # tokens per fragment
TOP = 20  # strongest fragments, from which the explainer's and half of the scored ones come; fewer is no test
EXPLAIN_RANKS, SCORE_RANKS = (0, 4, 8, 12, 16), (2, 6, 10, 14, 18)
N_RANDOM = 5


class FragmentError(ValueError):
    """No fragments can be cut or read; the message says why."""


@dataclass(frozen=True)
class Fragments:
    """``tokens`` [n, length] int64, and ``place`` [n, length]: the index of each token's activation among the kept ones
    of a store, -1 where the store has none (an outlier that it leaves out). The code at such a token is not known."""

    tokens: Tensor
    place: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice) -> "Fragments":
        return Fragments(self.tokens[which], self.place[which])


@dataclass(frozen=True)
class Record:
    """What the test needs of one feature. All [fragments, length]; activations are raw codes, NaN where not known.

    ``explain``: five of the top twenty for the explainer. ``scored``: five others of the top twenty, then five random ones.
    ``silent``: up to five fragments in which the feature is nowhere above 0 (for detection and fuzzing).
    """

    feature: int
    explain: Tensor
    explain_activations: Tensor
    scored: Tensor
    scored_activations: Tensor
    silent: Tensor


def cut(
    rows: Tensor, store: ActivationStore, *, seed: int, length: int = LENGTH, separator: int | None = None
) -> Fragments:
    """Cut token rows [n_rows, context] of the store's split into fragments that start at a random position of their row.

    The paper takes one fragment per line of text; we cut as many whole ones as a row holds behind a random offset, since
    our text is small. Positions that were never harvested (the first) are skipped; a fragment with a `separator` in it would
    hold two documents and is dropped. Where a fragment is cut depends on `seed` and the rows alone, so all hooks share it.
    """
    first = store.first_position
    n_rows, context = rows.shape
    wanted = store.manifest["spec"]["rows"][store.split]
    if list(rows.shape) != wanted:
        raise FragmentError(f"rows of shape {list(rows.shape)} are not those of {store.folder}, which are {wanted}")
    n, spare = divmod(context - first, length)
    if n == 0:
        raise FragmentError(f"rows of {context} tokens hold no fragment of {length} behind position {first}")
    place = torch.arange(n_rows * (context - first))
    if store.kept is not None:
        place = torch.full_like(place, -1).index_copy_(0, store.kept, torch.arange(store.n))
    offset = torch.randint(spare + 1, (n_rows, 1), generator=torch.Generator().manual_seed(seed))
    column = offset + torch.arange(n * length)
    tokens = rows[:, first:].long().gather(1, column).view(-1, length)
    places = place.view(n_rows, -1).gather(1, column).view(-1, length)
    whole = torch.ones(len(tokens), dtype=torch.bool) if separator is None else (tokens != separator).all(1)
    return Fragments(tokens[whole], places[whole])


@torch.inference_mode()
def codes(dictionary: Dictionary, store: ActivationStore, fragments: Fragments, features: Tensor, size=4096) -> Tensor:
    """Codes [n, length, len(features)] float32 of the chosen `features`; NaN where the activation is not known.

    One pass over the activations, `size` at a time. Memory: 4 bytes * n * length * len(features) (300 MB for 8,000
    fragments and 150 features), and one chunk's code.
    """
    if dictionary.d != store.d:
        raise FragmentError(f"the dictionary is for width {dictionary.d}, {store.hook} has {store.d}")
    device, flat = dictionary.mean.device, fragments.place.flatten()
    known = (flat >= 0).nonzero()[:, 0]
    result = torch.full((len(flat), len(features)), torch.nan)
    for part in known.split(size):
        code = dictionary.encode(store.rows(flat[part]).to(device, torch.float32), features.to(device))
        result[part] = code.float().cpu()
    return result.view(*fragments.place.shape, -1)


def records(
    fragments: Fragments, code: Tensor, features: Tensor, *, generator: torch.Generator
) -> tuple[list[Record], Counter]:
    """A `Record` for every feature that can be tested, and how many were skipped for which reason.

    The top twenty are those with the largest maximum. The random five are drawn from all other fragments whose maximum is
    not 0, except the ten that explain or are scored already: the paper's code may draw those again, and then scores what
    the explainer has seen. Skipped as "dead" (0 everywhere), "constant" (the same everywhere), or "fewer than 20
    fragments" (with a maximum that is not 0; a signed feature passes that test nearly always, as in the paper's code).

    Parameters
    ----------
    code : [n, length, len(features)] of `codes`; column k belongs to ``features[k]``.
    """
    lowest, highest = torch.where(code.isnan(), torch.inf, code), torch.where(code.isnan(), -torch.inf, code)
    maximum, overall_low = highest.amax(1), lowest.amin((0, 1))
    overall_high, active = maximum.amax(0), (maximum != 0) & maximum.isfinite()
    ranked = maximum.argsort(dim=0, descending=True, stable=True)
    lottery = torch.rand(maximum.shape, generator=generator)
    found, skipped = [], Counter()
    for column, feature in enumerate(features.tolist()):
        if overall_low[column] == overall_high[column]:
            skipped["dead" if overall_high[column] == 0 else "constant"] += 1
            continue
        if active[:, column].sum() < TOP:
            skipped[f"fewer than {TOP} fragments"] += 1
            continue
        order = ranked[:, column][active[ranked[:, column], column]]
        explain, top = order[list(EXPLAIN_RANKS)], order[list(SCORE_RANKS)]
        tickets = torch.where(active[:, column], lottery[:, column], -1)
        tickets[torch.cat([explain, top])] = -1
        scored = torch.cat([top, tickets.topk(N_RANDOM).indices])
        quiet = torch.where((maximum <= 0)[:, column] & maximum[:, column].isfinite(), lottery[:, column], -1)
        silent = quiet.topk(min(N_RANDOM, int((quiet >= 0).sum()))).indices
        found.append(
            Record(
                feature,
                fragments.tokens[explain],
                code[explain, :, column],
                fragments.tokens[scored],
                code[scored, :, column],
                fragments.tokens[silent],
            )
        )
    return found, skipped


def as_integers(activations: Tensor, top: int = 10) -> Tensor:
    """min(top, floor(top * relu(a) / max a)) over all of `activations`, int64: what the explainer is shown (paper, App. A;
    interpret.py of its code). Unknown (NaN) becomes 0, as does everything where nothing is above 0."""
    positive = activations.nan_to_num(0.0).relu()
    return (top * positive / positive.max().clamp(min=1e-30)).floor().clamp(max=top).long()
