"""What a dictionary does to its model: the loss when a hook's activations are replaced by reconstructions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from saelib import metrics, models

#: From activations [n, d] (float32, the model's units) to what the model gets instead; None leaves the model alone. Every
#: `Dictionary` is an edit (its reconstruction); `torch.zeros_like` is zero ablation, ``constant(store.mean)`` mean ablation.
Edit = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Losses:
    """``rows[label]`` [n_rows]: mean cross-entropy of each row under each edit, in nats per token. ``spared``: how many of
    the n_rows * (context - first_position) activations kept their value under every edit, being longer than the limit."""

    rows: dict[str, np.ndarray]
    spared: int


def constant(value: Tensor) -> Edit:
    """The edit that puts `value` [d] in the place of every activation."""
    return lambda x: value.to(x).expand(len(x), -1)


def recovered(ce: np.ndarray, clean: np.ndarray, ablated: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Share of the loss recovered, (ablated - ce) / (ablated - clean), from losses [n_rows] of the same rows, and its 95%
    bootstrap interval over rows. Take mean ablation: of a stream of zeros the next norm amplifies rounding, and its loss
    differs by nats between float32 and bfloat16. (The paper gives perplexity, ``exp(ce.mean())``.)"""
    gain, whole = ablated - ce, ablated - clean
    return float(gain.sum() / whole.sum()), metrics.bootstrap_ratio(gain, whole)


@torch.inference_mode()
def losses_under(
    name: str,
    tokens: Tensor,
    hook: str,
    edits: dict[str, Edit],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    first_position: int = 1,
    limit: float = float("inf"),
    batch: int = 4,
    revision: str | None = None,
) -> Losses:
    """Loss of the model `name` on `tokens` [n_rows, context] under each of `edits` to the activations of `hook`.

    In the model's raw coordinates. The blocks that no edit can change run once for all edits.

    Parameters
    ----------
    first_position : where edits begin (earlier positions were not harvested; the paper's code: 0). The loss is that of the
        predictions made at the same positions.
    limit : activations with a longer norm keep their value under every edit and count as ``spared``. The default spares
        none: that is the figure for the whole model, since attention leans on the few sinks that a store leaves out of
        training. ``store.outlier_factor * store.median_norm`` asks how well a dictionary does on what it was trained for.
    batch : rows per forward pass; the logits of so many rows are held at once, in `dtype`.

    Raises `models.ModelError` for a hook that the model does not have and for an edit of another width than the hook.
    """
    from transformers import AutoModelForCausalLM

    if tokens.shape[1] < first_position + 2:
        raise models.ModelError(f"rows of {tokens.shape[1]} tokens leave nothing to predict from {first_position} on")
    model = models.read_pretrained(AutoModelForCausalLM, name, models.RAW, revision, dtype=dtype)
    layer, site = models.parse_hook(hook, model.config.num_hidden_layers)
    adapter = models.adapter_of(name, model.to(device).eval().config, models.RAW, revision)
    module, what = models._module_behind(adapter, model, layer, site)
    unchanged = range(layer + (site == "hook_resid_post"))
    memory = _run_once([adapter.get_component(model, f"blocks.{number}") for number in unchanged])
    rows, spared, label = {key: [] for key in edits}, dict.fromkeys(edits, 0), ""

    def replace(module, inputs, output=None):
        held, edit = inputs if what == "input" else output, edits[label]
        if edit is None:
            return held
        whole, *rest = held if isinstance(held, tuple) else (held,)
        x = whole.reshape(*whole.shape[:2], -1).clone()
        chosen = x.float().norm(dim=2) <= limit
        spared[label] += int((~chosen[:, first_position:]).sum())
        chosen[:, :first_position] = False
        old = x[chosen].float()
        if getattr(edit, "d", x.shape[2]) != x.shape[2] or (new := edit(old)).shape != old.shape:
            raise models.ModelError(f"edit '{label}' does not fit {hook} of {name}, which has width {x.shape[2]}")
        x[chosen] = new.to(x.dtype)
        return (x.view_as(whole), *rest) if isinstance(held, tuple) else x.view_as(whole)

    (module.register_forward_pre_hook if what == "input" else module.register_forward_hook)(replace)
    for part in tqdm(tokens.to(device).long().split(batch), desc=f"losses at {hook}", unit="batch", leave=False):
        memory.clear()
        for label in edits:
            logits = model(part, use_cache=False).logits[:, first_position:-1]
            for scores, right in zip(logits, part[:, first_position + 1 :], strict=True):  # a row in float32 at a time
                rows[label].append(nn.functional.cross_entropy(scores.float(), right).item())
    return Losses({key: np.array(losses) for key, losses in rows.items()}, max(spared.values(), default=0))


def _run_once(blocks: list[nn.Module]) -> dict:
    """Let each of `blocks`, the first of a model, compute only if the returned memory does not hold its output yet."""
    memory = {}
    for block in blocks:

        def forward(*args, run=block.forward, key=block, **kwargs):
            return memory[key] if key in memory else memory.setdefault(key, run(*args, **kwargs))

        block.forward = forward
    return memory
