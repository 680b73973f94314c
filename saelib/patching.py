"""Patch the features of a dictionary into a running model and measure how near its answer comes to the counterfactual's.

    x' = x + sum over chosen j of (c_j(counterfactual) - c_j(base)) f_j          at every position

with x the residual stream of the base prompt, c_j the code and f_j what a unit of it writes, ``scale * directions[j]``, in
the model's units: the dictionary's own error on the base prompt is kept (paper section 4). The score is the mean over
prompts of KL(patched || counterfactual) at the last position, in nats; the edit is the mean over positions of ||x' - x||.
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from saelib import files, models
from saelib.dictionaries import Dictionary
from saelib.ioi import Prompts


class PatchError(ValueError):
    """A patch cannot be made; the message says why."""


@dataclass(frozen=True)
class LanguageModel:
    """A model, its blocks in order, and its name. Its weights take no gradient."""

    name: str
    model: torch.nn.Module
    blocks: list[torch.nn.Module]


def load(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> LanguageModel:
    """The model `name` (as for `models.load_model`) in its raw coordinates, ready for `Tail` at any layer."""
    from transformers import AutoModelForCausalLM

    model = models.read_pretrained(AutoModelForCausalLM, name, models.RAW, revision, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)
    # a slice of the last position is not contiguous, for which the unembedding would be done prompt by prompt
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    adapter = models.adapter_of(name, model.config, models.RAW, revision)
    blocks = [adapter.get_component(model, f"blocks.{number}") for number in range(model.config.num_hidden_layers)]
    return LanguageModel(name, model, blocks)


class Tail:
    """The blocks behind a residual `hook`, ready to run on patched activations of `prompts`.

    What lies before the first column in which any pair differs is computed once, and its keys and values kept, so that an
    evaluation costs the remaining blocks over the remaining columns.

    Attributes: ``x`` and ``x_counterfactual`` [n, pos, d] the stream over those columns; ``change`` [n, pos] bool, the
    positions that can change; ``n_positions`` [n] of each prompt, its first token not counted; ``logits`` and
    ``logits_counterfactual`` [n, vocab] at the last position; ``kl_base`` [n] in nats, the KL with nothing patched; ``spec``
    all that these depend on.

    Raises `models.ModelError` for a hook that the model lacks and for one that is not a residual stream.
    """

    @torch.no_grad()
    def __init__(self, lm: LanguageModel, hook: str, prompts: Prompts):
        self.layer, site = models.parse_hook(hook, len(lm.blocks))
        if site != "hook_resid_post":
            raise models.ModelError(
                f"'{hook}': prompts are patched in the residual stream, blocks.<layer>.hook_resid_post"
            )
        self.lm, self.hook, self.prompts = lm, hook, prompts
        tokens = {part: getattr(prompts, part).tolist() for part in ("base", "counterfactual", "start")}
        self.spec = {"model": lm.name, "dtype": str(lm.model.dtype), "hook": hook, "prompts": files.key(tokens)}
        device, dtype = lm.model.device, lm.model.dtype
        columns, start = torch.arange(prompts.base.shape[1], device=device), prompts.start.to(device)[:, None]
        real, places = columns >= start, (columns - start).clamp(min=0)
        kept = int(prompts.first.min())  # columns whose keys and values are kept
        seen = []

        def hear(module, inputs, output):
            seen.append(output)

        handle = lm.blocks[self.layer].register_forward_hook(hear)
        try:
            whole = {"attention_mask": real.long(), "position_ids": places, "logits_to_keep": 1}
            cache = lm.model(prompts.base.to(device), use_cache=True, **whole).past_key_values
            lm.model(prompts.counterfactual.to(device), use_cache=False, **whole)
        finally:
            handle.remove()
        self._is_tuple = isinstance(seen[0], tuple)
        self.x, self.x_counterfactual = ((one[0] if self._is_tuple else one)[:, kept:] for one in seen)
        self._prefix = [tuple(part[:, :, :kept].clone() for part in (one.keys, one.values)) for one in cache.layers]
        allowed = real[:, None, None, :] & (columns <= columns[kept:, None])
        self._mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        self._mask.masked_fill_(~allowed, torch.finfo(dtype).min)
        self._places, self._tokens = places[:, kept:], prompts.base[:, kept:].to(device)
        self.change = columns[kept:] >= prompts.first.to(device)[:, None]
        self.n_positions = real.sum(1) - 1
        self.logits = self.run(self.x[None])[0]
        changed = self.x + (self.x_counterfactual - self.x) * self.change[..., None]
        self.logits_counterfactual = self.run(changed[None])[0]
        self.target = self.logits_counterfactual.log_softmax(-1)
        self.kl_base = self._kl(self.logits)

    def run(self, x: Tensor) -> Tensor:
        """Logits [m, n, vocab], float32, at the last position for `m` versions of the stream, ``x`` [m, n, pos, d]."""
        m, n = x.shape[:2]
        with self._starting_from(x.flatten(0, 1).to(self.x.dtype)):
            logits = self.lm.model(
                self._tokens.repeat(m, 1),
                attention_mask=self._mask.repeat(m, 1, 1, 1),
                position_ids=self._places.repeat(m, 1),
                past_key_values=_Prefix(self._prefix, m),
                logits_to_keep=1,
            ).logits
        return logits[:, -1].float().unflatten(0, (m, n))

    @contextmanager
    def _starting_from(self, x: Tensor):
        """Let the hook's block give `x` and those before it nothing new."""
        first = self.lm.blocks[: self.layer + 1]
        for block in first:
            block.forward = lambda *args, **kwargs: (x,) if self._is_tuple else x
        try:
            yield
        finally:
            for block in first:
                del block.forward

    def _kl(self, logits: Tensor) -> Tensor:
        """KL(patched || counterfactual) [..., n] in nats of `logits` [..., n, vocab]."""
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * (log_p - self.target)).sum(-1)

    def kl(self, x: Tensor) -> Tensor:
        """KL(patched || counterfactual) [m, n] in nats of ``x`` [m, n, pos, d]."""
        return self._kl(self.run(x))

    def edit(self, x: Tensor) -> Tensor:
        """Sum over the positions of each prompt of ||x' - x||, [m, n], in the model's units."""
        return (x - self.x).float().norm(dim=-1).sum(-1)


class _Prefix(DynamicCache):
    """Keys and values of the columns that never change, in as many copies as there are versions; remembers nothing new."""

    def __init__(self, prefix: list[tuple[Tensor, Tensor]], copies: int):
        super().__init__()
        self.prefix, self.copies = prefix, copies

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        old = (part.repeat(self.copies, 1, 1, 1) for part in self.prefix[layer_idx])
        return tuple(torch.cat([a, b], 2) for a, b in zip(old, (key_states, value_states), strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix[-1][0].shape[2]


@dataclass(frozen=True)
class Patch:
    """What each feature of a dictionary would add to the stream of a `Tail`.

    ``steps`` [n, pos, n_features]: code on the counterfactual minus code on the base, 0 where nothing can change;
    ``writes`` [n_features, d]: what one unit of each code writes, in the model's units; ``candidates``: the features whose
    code differs somewhere, all others do nothing and are never tried; ``spec`` all that its KL depends on.
    """

    tail: Tail
    steps: Tensor
    writes: Tensor
    candidates: Tensor
    spec: dict

    def apply(self, chosen: Tensor | Sequence[int]) -> Tensor:
        """x' [n, pos, d] with the features `chosen` (their numbers in the dictionary) patched."""
        chosen = torch.as_tensor(chosen, dtype=torch.long, device=self.steps.device)
        return self.tail.x + (self.steps[..., chosen] @ self.writes[chosen]).to(self.tail.x.dtype)

    @torch.no_grad()
    def measure(self, sets: Iterable[Tensor | Sequence[int]], *, together: int = 8) -> tuple[Tensor, Tensor]:
        """KL in nats and summed edit length of each prompt, [n_sets, n] each, for several sets of features.

        `together` sets share a forward pass. Means over prompts: ``kl.mean(1)`` and ``edit.sum(1) / tail.n_positions.sum()``.
        """
        sets, kl, edit = list(sets), [], []
        for first in range(0, len(sets), together):
            x = torch.stack([self.apply(chosen) for chosen in sets[first : first + together]])
            kl.append(self.tail.kl(x).cpu())
            edit.append(self.tail.edit(x).cpu())
        return torch.cat(kl), torch.cat(edit)

    def mean_kls(self, sets: Iterable[Tensor | Sequence[int]]) -> list[float]:
        """KL in nats, mean over prompts, with each of `sets` patched: what `selection.prune_orders` asks for."""
        return self.measure(sets)[0].mean(1).tolist()


@torch.no_grad()
def patch(tail: Tail, dictionary: Dictionary, label: str = "dictionary") -> Patch:
    """The `Patch` of `dictionary` (any member of the interface) at the hook of `tail`.

    Raises `PatchError` for a dictionary of another width and for one of which no code differs between the prompts.
    """
    if dictionary.d != tail.x.shape[-1]:
        raise PatchError(
            f"'{label}' has width {dictionary.d}, but {tail.hook} of {tail.lm.name} has {tail.x.shape[-1]}: take one that was "
            "trained at this hook"
        )
    difference = dictionary.encode(tail.x_counterfactual.float()) - dictionary.encode(tail.x.float())
    steps = difference * tail.change[..., None]
    candidates = (steps != 0).any(0).any(0).nonzero()[:, 0]
    if not len(candidates):
        raise PatchError(
            f"no code of '{label}' differs between base and counterfactual at {tail.hook}: its features are dead on these "
            "prompts, so nothing can be patched; take a smaller alpha or another layer"
        )
    content = hashlib.sha256()
    for value in dictionary.state_dict().values():
        content.update(value.cpu().numpy().tobytes())
    spec = tail.spec | {"dictionary": label, "content": content.hexdigest()}
    return Patch(tail, steps, dictionary.scale * dictionary.directions.detach(), candidates, spec)
