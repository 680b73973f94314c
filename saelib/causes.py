"""Case studies, output side: take a feature out of the stream, let the blocks behind run on, and see what changes.

    x' = x - scale * c_j(x) f_j        at every position that a dictionary was made for

A less-than-rank-one ablation (paper, section 5.2): the stream is lowered along f_j only until the feature is off. Left alone
are positions that were not harvested (the first) and outliers. Only the blocks behind the hook run, from stored activations.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import Tensor

from saelib import autointerp, cases, models
from saelib.dictionaries import Dictionary
from saelib.patching import LanguageModel
from saelib.store import ActivationStore


class CauseError(ValueError):
    """An effect or a tree cannot be found as asked; the message says why and what to change."""


@dataclass(frozen=True)
class Level:
    """A layer with its dictionary: ``store`` the held-out activations that it was made for, ``whole`` the same with outliers,
    ``text`` what lies behind ``store``, ``tokens`` [n_rows, context] all held-out rows."""

    dictionary: Dictionary
    store: ActivationStore
    whole: ActivationStore
    text: cases.Text
    tokens: Tensor
    _codes: dict[int, Tensor] = field(default_factory=dict)

    def code(self, feature: int) -> Tensor:
        """`cases.codes` of one feature, [n], computed once."""
        self.compute([feature])
        return self._codes[feature]

    def compute(self, features: list[int]) -> None:
        """Keep the codes of several features, which one pass over the activations gives."""
        if missing := [feature for feature in dict.fromkeys(features) if feature not in self._codes]:
            found = cases.codes(self.dictionary, self.store, missing)
            self._codes.update(zip(missing, found.T.contiguous(), strict=True))

    @property
    def hook(self) -> str:
        return self.store.hook

    @property
    def writes(self) -> Tensor:
        """What one unit of each code writes, [n_features, d], in the model's units."""
        return self.dictionary.scale * self.dictionary.directions.detach()


class Stream:
    """The residual stream at a level's hook for some rows, ready to be changed and to run on.

    Attributes: ``tokens`` [n, pos]; ``x`` [n, pos, d] float32; ``code`` [n, pos, n_features], 0 where nothing may be ablated.
    """

    @torch.no_grad()
    def __init__(self, lm: LanguageModel, level: Level, rows: Tensor, n_tokens: int | None = None):
        self.lm, self.level = lm, level
        self.layer, site = models.parse_hook(level.hook, len(lm.blocks))
        if site != "hook_resid_post":
            raise CauseError(f"{level.hook}: only features of the residual stream, hook_resid_post, are ablated")
        self.tokens = level.tokens[rows, :n_tokens].long()
        first = level.store.first_position
        width, kept = level.tokens.shape[1] - first, self.tokens.shape[1] - first
        place = rows[:, None] * width + torch.arange(kept)
        start = self._begin(self.tokens[:, : max(first, 1)])[:, :first]
        x = level.whole.rows(place.flatten()).float().view(len(rows), kept, -1)
        self.x = torch.cat([start, x.to(start)], 1)
        free = torch.ones(level.whole.n, dtype=torch.bool)
        if level.store.kept is not None:
            free = torch.zeros_like(free).index_fill_(0, level.store.kept, True)
        self.code = level.dictionary.encode(self.x)
        self.code[:, :first] = 0
        self.code[:, first:] *= free[place, None].to(self.code)

    def _begin(self, tokens: Tensor) -> Tensor:
        """The stream at the first positions, which no harvest stores, [n, first, d]."""
        seen = []
        handle = self.lm.blocks[self.layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
        self.lm.model.base_model(tokens.to(self.lm.model.device), use_cache=False)
        handle.remove()
        self._is_tuple = isinstance(seen[0], tuple)
        return seen[0][0] if self._is_tuple else seen[0]

    def without(self, features: Tensor | list[int], rows: Tensor | slice = slice(None)) -> Tensor:
        """x' [n, pos, d] with `features` ablated, of the chosen `rows` of this stream."""
        return self.x[rows] - self.code[rows][..., features] @ self.level.writes[features]

    def run(self, x: Tensor, tokens: Tensor, until: int | None = None) -> Tensor:
        """With `x` [n, pos, d] behind this hook's block: the stream behind block `until`, or the logits (None)."""
        wrap, found = (lambda y: (y,)) if self._is_tuple else (lambda y: y), []
        blocks = self.lm.blocks
        with ExitStack() as stack:
            for number, block in enumerate(blocks):
                if number <= self.layer:
                    block.forward = lambda *args, **kwargs: wrap(x)
                elif until is not None and number > until:
                    block.forward = lambda y, *args, **kwargs: wrap(y)
                else:
                    continue
                stack.callback(block.__dict__.pop, "forward")
            if until is None:
                return self.lm.model(tokens.to(x.device), use_cache=False).logits.float()
            handle = blocks[until].register_forward_hook(lambda module, inputs, output: found.append(output))
            stack.callback(handle.remove)
            self.lm.model.base_model(tokens.to(x.device), use_cache=False)
        return found[0][0] if self._is_tuple else found[0]


@torch.no_grad()
def effects(stream: Stream, features: list[int], where: Tensor, *, batch: int = 2) -> tuple[Tensor, Tensor]:
    """log p(original) - log p(feature ablated), in nats: positive where the feature raises a token.

    Returns the change of the true next token, [len(features), n, pos - 1], and the mean change over the vocabulary at the
    positions ``where[k]`` [n, pos] of each feature, [len(features), vocab]. `batch` rows share a pass, whose logits are held.
    """
    change = torch.zeros(len(features), len(stream.x), stream.x.shape[1] - 1)
    vocabulary = [0.0] * len(features)
    for part in torch.arange(len(stream.x)).split(batch):
        tokens, following = stream.tokens[part], stream.tokens[part, 1:, None].to(stream.x.device)
        base = stream.run(stream.x[part], tokens)
        whole = base.logsumexp(-1)
        for k, feature in enumerate(features):
            if not stream.code[part][..., feature].any():
                continue
            logits = stream.run(stream.without([feature], part), tokens)
            shift = whole - logits.logsumexp(-1)  # log p = logit - log of the sum over the vocabulary
            moved = base[:, :-1].gather(2, following) - logits[:, :-1].gather(2, following)
            change[k, part] = (moved[..., 0] - shift[:, :-1]).cpu()
            at = where[k, part].to(shift.device)
            vocabulary[k] = vocabulary[k] + (base[at] - logits[at] - shift[at][:, None]).sum(0).cpu()
    counts = where.flatten(1).sum(1).clamp(min=1)
    return change, torch.stack([torch.as_tensor(total).expand(base.shape[-1]) for total in vocabulary]) / counts[
        :, None
    ]


def equal_mass(stream: Stream, feature: int, n: int, generator: torch.Generator, among: int = 20) -> list[int]:
    """`n` other features drawn from the `among` whose summed code over the stream is nearest to that of `feature` (ratio)."""
    mass = stream.code.sum((0, 1))
    if mass[feature] == 0:
        raise CauseError(f"feature {feature} at {stream.level.hook} is dead on these rows: it has no effect to compare")
    distance = (mass.log() - mass[feature].log()).abs()
    distance[feature] = torch.inf
    nearest = distance.argsort(stable=True)[:among]
    return nearest[torch.randperm(len(nearest), generator=generator)[:n]].tolist()


class Contexts:
    """Up to `n` places of one half where `feature` of `parent` lies above half of its maximum, among the first `n_tokens` of
    their rows, and the stream there at an earlier level `child`. ``fall`` asks what ablating features of it does to the parent.

    Raises `CauseError` for a child that is not upstream and where there is no such place; `cases.CaseError` for a dead feature.
    """

    def __init__(self, lm, child: Level, parent: Level, feature: int, select: bool, n: int, n_tokens: int, generator):
        layer = models.parse_hook(parent.hook, len(lm.blocks))[0]
        if models.parse_hook(child.hook, len(lm.blocks))[0] >= layer:
            raise CauseError(
                f"{child.hook} does not lie before {parent.hook}, so nothing at it can cause what is there"
            )
        text, code = parent.text, parent.code(feature)
        strong = (code >= code[text.select].max() / 2) & (code > 0) & (text.select == select) & (text.column < n_tokens)
        places = strong.nonzero()[:, 0]
        if not len(places):
            raise CauseError(
                f"feature {feature} at {parent.hook} is nowhere above half of its maximum in the first {n_tokens} tokens of a "
                f"{'select' if select else 'report'} row: take more rows or longer contexts"
            )
        places = places[torch.randperm(len(places), generator=generator)[:n]]
        self.column, self.parent, self.feature, self.layer = text.column[places], parent, feature, layer
        self.stream = Stream(lm, child, text.row[places], int(self.column.max()) + 1)
        reach = torch.arange(self.stream.x.shape[1]) <= self.column[:, None]
        self.stream.code.mul_(reach[..., None].to(self.stream.code))  # what comes after the place cannot reach it
        with torch.no_grad():
            self.activation = self._read(self.stream.x, torch.arange(len(places)))

    def _read(self, x: Tensor, which: Tensor) -> Tensor:
        """The parent's code [m] at its token, with `x` [m, pos, d] at the child's level in the contexts `which` [m]."""
        later = self.stream.run(x, self.stream.tokens[which, : x.shape[1]], self.layer)[
            torch.arange(len(which)), self.column[which]
        ]
        return self.parent.dictionary.encode(later)[:, self.feature]

    def first_order(self) -> Tensor:
        """Mean relative fall per feature as the gradient guesses it, [n_features]: one backward pass."""
        x = self.stream.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self._read(x, torch.arange(len(x))).sum(), x)
        guess = (self.stream.code * (gradient @ self.stream.level.writes.T)).sum(1)
        return (guess / self.activation.clamp(min=1e-6)[:, None]).mean(0).detach()

    @torch.no_grad()
    def fall(self, sets: list[list[int]], batch: int = 64) -> Tensor:
        """(a - a') / a [len(sets), n]: relative fall of the parent's activation when each set of features is ablated in each
        context. Sets that are silent in a context cost nothing there."""
        result = torch.zeros(len(sets), len(self.column))
        active = torch.stack([self.stream.code[..., one].flatten(1).any(1) for one in sets]).cpu()
        pairs = active.nonzero()
        for part in pairs[self.column[pairs[:, 1]].argsort()].split(batch):  # places of alike columns share a pass
            reach = int(self.column[part[:, 1]].max()) + 1
            x = torch.stack([self.stream.without(sets[s], slice(i, i + 1))[0] for s, i in part.tolist()])
            before = self.activation[part[:, 1]]
            fall = (before - self._read(x[:, :reach], part[:, 1])) / before.clamp(min=1e-6)
            result[part[:, 0], part[:, 1]] = fall.cpu()
        return result


def tree(
    lm: LanguageModel, levels: list[Level], feature: int, *, n_contexts: int = 20, n_tokens: int = 64, n_candidates: int = 32,
    n_children: int = 3, least: float = 0.01, seed: int = 0,
) -> nx.DiGraph:  # fmt: skip
    """Causal tree of `feature` of the last of `levels` (ordered by layer): paper, section 5.3 and Figure 5.

    For each node the features of the level before are ranked by the fall of the node that ablating each causes, on contexts of
    the select half: the `n_candidates` first by gradient are measured, and the `n_children` strongest of at least `least` kept.
    The edge's ``weight``, with ``low`` and ``high`` over contexts, is measured again on the report half; edges under `least`
    there are dropped. A node that is seen again gets another edge and is not expanded twice.

    Nodes are (hook, feature) with ``level``; a node with children has ``together`` [n], the fall when all of them are ablated,
    ``single`` [n], the sum of the single falls, and ``overlooked``: whether a kept child stood in the lower half of the
    gradient's order. Raises `CauseError` where there is no upstream level.
    """
    if len(levels) < 2:
        only = levels[0].hook if levels else "none"
        raise CauseError(
            f"a tree needs a dictionary at an earlier layer than its target's; given: {only}. Add a hook with one"
        )
    graph, generator = nx.DiGraph(), torch.Generator().manual_seed(seed)
    graph.add_node((levels[-1].hook, feature), level=len(levels) - 1)
    waiting = list(graph)
    while waiting:
        node = waiting.pop(0)
        depth = graph.nodes[node]["level"]
        if depth == 0:
            continue
        places = {"n": n_contexts, "n_tokens": n_tokens, "generator": generator}
        asked = [Contexts(lm, *levels[depth - 1 : depth + 1], node[1], select=half, **places) for half in (True, False)]
        candidates = asked[0].first_order().argsort(descending=True, stable=True)[:n_candidates].tolist()
        strength = asked[0].fall([[one] for one in candidates]).mean(1)
        best = [k for k in strength.argsort(descending=True).tolist()[:n_children] if strength[k] >= least]
        falls = asked[1].fall([[candidates[k]] for k in best]) if best else torch.zeros(0, 1)
        kept = [row for row in range(len(best)) if falls[row].mean() >= least]
        for row in kept:
            child = (levels[depth - 1].hook, candidates[best[row]])
            if child not in graph:
                graph.add_node(child, level=depth - 1)
                waiting.append(child)
            weight, low, high = autointerp.mean_interval(falls[row].double(), resamples=1000)
            graph.add_edge(child, node, weight=weight, low=low, high=high, n=falls.shape[1])
        if kept:
            together = asked[1].fall([[candidates[best[row]] for row in kept]])[0]
            late = max(best[row] for row in kept) >= len(candidates) // 2
            graph.nodes[node].update(together=together, single=falls[kept].sum(0), overlooked=late)
    return graph
