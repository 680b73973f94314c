"""Case studies, input side: find the feature of a token, and say on what it is active. Returns tables, draws nothing.

A feature is chosen on one half of the held-out documents and reported on the other. *Above half* means: a code above half of
the largest code of the select half. Purity is the share of the target token among the positions where a feature is active
(overall) or above half (paper, sections 5.1 and D). Intervals: 95% bootstrap over documents.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saelib.corpus import TokenRows
from saelib.dictionaries import ALL, Dictionary
from saelib.metrics import bootstrap_ratio
from saelib.store import ActivationStore

CHUNK = 4096  # activations encoded at once


class CaseError(ValueError):
    """A case study cannot be made as asked; the message says why and what to change."""


@dataclass(frozen=True)
class Text:
    """The text behind the kept activations of a store: ``token``, ``document``, ``row`` and ``column`` [n], and ``select`` [n]
    bool: whether the document belongs to the half on which features are chosen."""

    token: Tensor
    document: Tensor
    row: Tensor
    column: Tensor
    select: Tensor

    def __len__(self) -> int:
        return len(self.token)


def token_ids(tokenizer, targets: list[str]) -> dict[str, int]:
    """The id of each target token. Raises `CaseError` for a text that is not one token, with the tokens that it is."""
    ids = {target: tokenizer(target, add_special_tokens=False)["input_ids"] for target in targets}
    for target, pieces in ids.items():
        if len(pieces) != 1:
            parts = ", ".join(repr(tokenizer.decode([piece])) for piece in pieces) or "nothing"
            raise CaseError(f"{target!r} is not one token of this model but {len(pieces)} ({parts}): take a single one")
    return {target: pieces[0] for target, pieces in ids.items()}


def halves(document: Tensor, names: list[str]) -> Tensor:
    """Which documents choose, [len(names)] bool. Those of each source (``names`` are "source/id"), longest first, are dealt to
    the two halves as 0, 1, 1, 0, so that both hold every register in about the same amount and nothing is drawn."""
    size = torch.bincount(document.flatten().long(), minlength=len(names))
    table = pd.DataFrame({"source": [name.split("/")[0] for name in names], "size": size.numpy()})
    place = table[table["size"] > 0].sort_values("size", ascending=False, kind="stable").groupby("source").cumcount()
    select = torch.zeros(len(names), dtype=torch.bool)
    select[place[place.mod(4).isin([0, 3])].index.tolist()] = True
    return select


def read(rows: TokenRows, store: ActivationStore) -> Text:
    """The text of the held-out `rows` behind each kept activation of `store`."""
    if list(rows.held_out.shape) != store.manifest["spec"]["rows"]["held_out"]:
        raise CaseError(f"rows of shape {list(rows.held_out.shape)} are not those of {store.folder}")
    first = store.first_position
    width = rows.held_out.shape[1] - first
    place = torch.arange(len(rows.held_out) * width) if store.kept is None else store.kept
    row, column = place // width, place % width + first
    document = rows.held_out_doc[row, column].long()
    select = halves(rows.held_out_doc[:, first:], rows.documents)
    return Text(rows.held_out[row, column].long(), document, row, column, select[document])


@torch.inference_mode()
def codes(dictionary: Dictionary, store: ActivationStore, features: list[int]) -> Tensor:
    """Codes [n, len(features)] of some features at every kept activation. Raises `CaseError` for a dead one and for a
    dictionary of another width."""
    if dictionary.d != store.d:
        raise CaseError(f"the dictionary is for width {dictionary.d}, {store.hook} has {store.d}")
    found = torch.cat([_encode(dictionary, x, features) for x in store.chunks(CHUNK)])
    if dead := [feature for feature, alive in zip(features, (found > 0).any(0).tolist(), strict=True) if not alive]:
        raise CaseError(
            f"feature {dead[0]} at {store.hook} is dead: never above 0 on {len(found):,} held-out activations"
        )
    return found


def _encode(dictionary: Dictionary, x: Tensor, features: list[int] | slice = ALL) -> Tensor:
    return dictionary.encode(x.to(dictionary.mean.device, torch.float32), features).cpu()


@torch.inference_mode()
def search(
    dictionary: Dictionary, store: ActivationStore, text: Text, ids: dict[str, int], *, recall: float
) -> pd.DataFrame:
    """The feature of `dictionary` for each target of `ids`, chosen on the select half: of those that are active on at least
    `recall` of the target's occurrences, the one whose purity above half is most surely high (largest lower end of its 95%
    Wilson interval, so that few positions count for little).

    Returns target, feature, maximum, occurrences, recall, n_above, purity_above, purity and sure, a row per target. Two
    passes over the activations. Raises `CaseError` for a target that does not occur and where no feature has the recall.
    """
    parts = text.select.nonzero()[:, 0].split(CHUNK)
    maximum = torch.stack([_encode(dictionary, store.rows(part)).amax(0) for part in parts]).amax(0)
    wanted, total, hits, occurrences = torch.tensor(list(ids.values())), [0, 0], [0, 0], 0
    for part in parts:
        code, target = _encode(dictionary, store.rows(part)), (text.token[part, None] == wanted).float()
        occurrences = occurrences + target.sum(0)
        for level, bound in enumerate((torch.zeros(()), maximum / 2)):
            on = (code > bound).float()
            total[level], hits[level] = total[level] + on.sum(0), hits[level] + target.T @ on
    for target, count in zip(ids, occurrences.tolist(), strict=True):
        if not count:
            raise CaseError(
                f"{target!r} does not occur in the select half ({int(text.select.sum()):,} tokens): more text, or another token"
            )
    share = hits[0] / occurrences[:, None]
    sure = torch.where(share >= recall, wilson(hits[1], total[1]), -1.0)
    best = sure.argmax(1)
    if (sure.amax(1) < 0).any():
        target = list(ids)[int((sure.amax(1) < 0).nonzero()[0])]
        raise CaseError(f"no feature at {store.hook} is active on {recall:.0%} of {target!r}: ask for less recall")
    at = lambda values: values.gather(1, best[:, None])[:, 0].numpy()  # noqa: E731
    table = {
        "target": list(ids),
        "feature": best.numpy(),
        "maximum": maximum[best].numpy(),
        "occurrences": occurrences.numpy(),
    }
    table |= {
        "recall": at(share),
        "n_above": total[1][best].numpy(),
        "purity_above": at(hits[1] / total[1].clamp(min=1)),
    }
    return pd.DataFrame(table | {"purity": at(hits[0] / total[0].clamp(min=1)), "sure": at(sure)})


def wilson(hits: Tensor, total: Tensor, z: float = 1.96) -> Tensor:
    """Lower end of the Wilson interval of hits / total; 0 where total is 0."""
    n = total.clamp(min=1e-9)
    spread = z * (hits * (n - hits).clamp(min=0) / n + z**2 / 4).sqrt()
    return ((hits + z**2 / 2 - spread) / (n + z**2)).clamp(min=0)


def share(hit: Tensor, among: Tensor, document: Tensor, name: str, *, seed: int = 0) -> dict[str, float]:
    """Share of `hit` [n] among the positions `among` [n], as {name, name_low, name_high, n_name}; NaN where there are none."""
    counts = [np.bincount(document.numpy(), mask.double().numpy()) for mask in (hit & among, among)]
    present = counts[1] > 0
    if not present.any():
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan, f"n_{name}": 0}
    part, whole = (count[present] for count in counts)
    low, high = bootstrap_ratio(part, whole, seed=seed)
    return {name: part.sum() / whole.sum(), f"{name}_low": low, f"{name}_high": high, f"n_{name}": int(whole.sum())}


def report(code: Tensor, text: Text, hit: Tensor, maximum: float) -> dict[str, float]:
    """Purity above half and overall, and recall, of a feature's `code` [n] on the report half, with intervals and counts;
    `hit` [n] marks the target's positions, `maximum` is that of the select half."""
    mine = ~text.select
    level = {"purity_above": code > maximum / 2, "purity": code > 0}
    found = {name: share(hit, on & mine, text.document, name) for name, on in level.items()}
    recall = share(code > 0, hit & mine, text.document, "recall")
    return found["purity_above"] | found["purity"] | recall


def histogram(value: Tensor, token: Tensor, *, bins: int = 10, top: int = 5, by_count: bool = False) -> pd.DataFrame:
    """Counts of `value` [n] in equal bins from its minimum to its maximum, by token: columns bin, low, high, token (-1: all
    others), count. Shown are the `top` tokens with the largest mean share of a bin, or (``by_count``, the paper's way) the
    commonest of all, which are those of the fullest bin."""
    edges = np.linspace(value.min(), max(value.max(), value.min() + 1e-6), bins + 1)
    place = np.clip(np.digitize(value.numpy(), edges) - 1, 0, bins - 1)
    counts = pd.crosstab(place, token.numpy()).reindex(range(bins), fill_value=0)
    weight = counts if by_count else counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    kept = weight.mean().nlargest(top).index
    shown = counts[kept].assign(**{"-1": counts.drop(columns=kept).sum(axis=1)}).rename(columns={"-1": -1})
    long = shown.rename_axis(index="bin", columns="token").stack().rename("count").reset_index()
    return long.assign(low=edges[long["bin"]], high=edges[long["bin"] + 1])


def commonest(token: Tensor, tokenizer, n: int = 3) -> list[str]:
    """The `n` commonest of `token` [m], decoded, commonest first."""
    counts = torch.bincount(token).topk(min(n, len(token.unique())))
    return [tokenizer.decode([one]) for one in counts.indices.tolist()]


def contexts(code: Tensor, text: Text, tokens: Tensor, *, n: int = 8, width: int = 10) -> pd.DataFrame:
    """The strongest position of each of the `n` documents of the report half with the strongest ones, and up to `width`
    tokens before and after in the same row. Columns context, offset (0: the position), token, activation (NaN: not known)."""
    grid = torch.full(tokens.shape, torch.nan)
    grid[text.row, text.column] = code
    strength = pd.DataFrame({"document": text.document, "code": torch.where(text.select, 0, code)})
    strongest = strength.loc[strength.groupby("document")["code"].idxmax()].nlargest(n, "code")
    found = []
    for number, place in enumerate(strongest.index[strongest["code"] > 0]):
        row, column = int(text.row[place]), int(text.column[place])
        span = torch.arange(max(column - width, 1), min(column + width + 1, tokens.shape[1]))
        window = {
            "offset": (span - column).numpy(),
            "token": tokens[row, span].numpy(),
            "activation": grid[row, span].numpy(),
        }
        found.append(pd.DataFrame(window).assign(context=number))
    return pd.concat(found, ignore_index=True)
