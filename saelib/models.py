"""Load a language model: the bundled one, a local folder or a Hub name; and read activations from it."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from saelib import hub, sources
from saelib.paths import RAW

#: The hooks that can be harvested, with the component whose input or output each one is.
HOOKS = {
    "hook_resid_post": ("", "output"),
    "hook_mlp_out": (".mlp", "output"),
    "mlp.hook_post": (".mlp.out", "input"),
    "attn.hook_z": (".attn.o", "input"),
}

#: forward(tokens [batch, pos]) gives {hook: [batch, pos, d]}. forward(tokens, take) calls take(hook, values) instead as each
#: hook fires and keeps nothing, which spares the memory of all hooks at once.
Take = Callable[[str, torch.Tensor], object]
Forward = Callable[..., dict[str, torch.Tensor]]


class ModelError(ValueError):
    """The model, a layer or a hook does not exist; the message says what does."""


def default_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, float32 elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def as_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """``"auto"`` gives `fast_dtype`; otherwise ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(f"no dtype '{name}': use auto, float32, bfloat16 or float16")
    return fast_dtype(device) if name == "auto" else getattr(torch, name)


def locate(name: str, raw: Path = RAW, revision: str | None = None) -> str:
    """What `transformers` must be given for `name` (see `saelib.hub`): a folder (bundled or local) or a Hub name.

    Raises `ModelError` for a folder or a checkpoint that is not there.
    """
    name, bundled = _parse(name, revision).place, sources.catalogue()["models"]
    if name in bundled:
        return str(sources.fetch_model(name, raw))
    path = Path(name).expanduser()
    if (path / "config.json").exists():
        return str(path)
    if path.exists() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise ModelError(
            f"no model at '{name}': a model folder holds config.json and safetensors weights, a Hub name looks like "
            f"owner/name, and the bundled models are {', '.join(bundled)}"
        )
    return name


def _parse(name: str, revision: str | None = None) -> hub.ModelName:
    try:
        return hub.parse(name, revision)
    except hub.HubError as error:
        raise ModelError(str(error)) from error


def read_pretrained(loader, name: str, raw: Path, revision: str | None = None, **options):
    """``loader.from_pretrained`` with our names, no remote code, and an error that says what to do; a model whose name asks
    for it comes with centred writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a second of loading; our own bars show what takes long
    parts, place = _parse(name, revision), locate(name, raw, revision)
    try:
        found = loader.from_pretrained(place, trust_remote_code=False, revision=parts.revision or "main", **options)
    except OSError as error:
        raise ModelError(hub.explain(error, place, parts.revision)) from error
    if parts.centred and isinstance(found, torch.nn.Module):
        centre_writes(found, adapter_of(name, found.config, raw, revision))
    return found


@torch.no_grad()
def centre_writes(model: torch.nn.Module, adapter) -> None:
    """Put the residual stream of `model` into the paper's coordinates: zero mean over the coordinates, at every position.

    Every matrix and bias that writes into the stream (embedding, attention output, MLP output) loses its mean over the
    stream's coordinates, as TransformerLens does by default (``center_writing_weights``, in use in the paper's code).
    Every reader begins with a layer norm, which takes that mean off itself: the logits stay what they were. So the plain
    model of `transformers` runs in these coordinates in every notebook, and agrees with a bridge in compatibility mode.

    Raises `ModelError`, naming the module, for a model in which that would change the logits (RMS norm, tied embedding) or
    whose writers are of another form.
    """
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    others = [name for name in norms if not isinstance(model.get_submodule(name), torch.nn.LayerNorm)]
    if others or not norms or model.config.tie_word_embeddings:
        what = (
            f"'{others[0]}' is no layer norm"
            if others
            else "its embedding is tied"
            if norms
            else "it has no layer norm"
        )
        raise ModelError(f"the writes of this model cannot be centred: {what}; leave out 'centred:'")
    blocks = range(model.config.num_hidden_layers)
    writers = [
        "embed",
        *(f"blocks.{number}.{part}.{end}" for number in blocks for part, end in (("attn", "o"), ("mlp", "out"))),
    ]
    for path in writers:
        module = adapter.get_component(model, path)
        if not isinstance(module, torch.nn.Embedding | torch.nn.Linear):
            raise ModelError(f"the writes of this model cannot be centred: {path} is a {type(module).__name__}")
        along = 1 if isinstance(module, torch.nn.Embedding) else 0
        for weight in filter(lambda value: value is not None, (module.weight, getattr(module, "bias", None))):
            weight -= weight.double().mean(along, keepdim=True).to(weight.dtype)


def load_tokenizer(name: str, raw: Path = RAW, revision: str | None = None):
    """The model's fast tokenizer."""
    from transformers import AutoTokenizer

    return read_pretrained(AutoTokenizer, name, raw, revision)


def load_model(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compatibility: bool = False,
    revision: str | None = None,
    raw: Path = RAW,
):
    """Load `name` as a TransformerLens ``TransformerBridge``.

    Parameters
    ----------
    name : a bundled model of ``data/sources.yaml``, a local folder, or a Hub name; see `saelib.hub` for checkpoints.
    compatibility : fold the layer norms and centre the writing weights, the paper's coordinates (paper, App. B; its
        code used TransformerLens' default processing). Off: the raw coordinates of the model's own code.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    model = read_pretrained(AutoModelForCausalLM, name, raw, revision, dtype=dtype)
    tokenizer, model = load_tokenizer(name, raw, revision), model.to(device)
    bridge = TransformerBridge.boot_transformers(
        locate(name, raw, revision), hf_model=model, tokenizer=tokenizer, dtype=dtype, device=str(device)
    )
    if compatibility:
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def parse_hook(hook: str, n_layers: int) -> tuple[int, str]:
    """Split ``blocks.{layer}.{site}``; raise `ModelError` listing what exists for a wrong layer or site."""
    parts = hook.split(".", 2)
    site = parts[2] if len(parts) == 3 else ""
    if parts[0] != "blocks" or not parts[1:] or not parts[1].isdigit() or site not in HOOKS:
        raise ModelError(f"no hook '{hook}': use blocks.<layer>.<site> with a site of {', '.join(HOOKS)}")
    if int(parts[1]) >= n_layers:
        raise ModelError(f"no hook '{hook}': this model has layers 0 to {n_layers - 1}")
    return int(parts[1]), site


def bare_forward(
    name: str,
    hooks: list[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    raw: Path = RAW,
    alter: Callable[[torch.nn.Module], object] | None = None,
) -> Forward:
    """A function from tokens [batch, pos] to ``{hook: [batch, pos, d]}`` in the model's raw coordinates.
    Only the blocks up to the last hook are loaded and run, with the attention kernels of `transformers`, and no
    unembedding: equal to a cached run of the bridge (tests/test_models.py), and faster (tests/benchmarks). Which
    module stands behind a hook is taken from TransformerLens' architecture adapters, so no model needs code here.
    ``alter(model)`` is called before anything runs, for controls that change its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = read_pretrained(AutoConfig, name, raw, revision)
    places = {hook: parse_hook(hook, config.num_hidden_layers) for hook in hooks}
    config.num_hidden_layers = 1 + max(layer for layer, _ in places.values())
    with _quiet_loading():
        model = read_pretrained(AutoModelForCausalLM, name, raw, revision, config=config, dtype=dtype)
    model.to(device).eval()
    if alter:
        alter(model)
    adapter = adapter_of(name, config, raw, revision)
    listener: list[Take] = []

    def at(hook: str, what: str):
        def hear(module, inputs, outputs):
            value = inputs[0] if what == "input" else outputs
            value = value[0] if isinstance(value, tuple) else value
            listener[0](hook, value.reshape(*value.shape[:2], -1))

        return hear

    for hook, (layer, site) in places.items():
        module, what = _module_behind(adapter, model, layer, site)
        module.register_forward_hook(at(hook, what))

    @torch.inference_mode()
    def forward(tokens: torch.Tensor, take: Take | None = None) -> dict[str, torch.Tensor]:
        found = {}
        listener[:] = [take or found.__setitem__]
        model.base_model(tokens.to(device), use_cache=False)
        return found

    return forward


def _module_behind(adapter, model, layer: int, site: str):
    """The module of `model` whose input or output a hook is, and which of the two."""
    path, what = HOOKS[site]
    if site == "hook_mlp_out" and "ln2_post" in adapter.component_mapping["blocks"].submodules:
        path = ".ln2_post"  # Gemma 2 and its like normalise what the MLP adds to the stream
    return adapter.get_component(model, f"blocks.{layer}{path}"), what


def adapter_of(name: str, config, raw: Path, revision: str | None = None):
    """TransformerLens' adapter for this architecture (it knows the module behind each hook), from a bridge without weights."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # a copy: the bridge switches the config that it is given to eager attention, which is slower
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    tokenizer = load_tokenizer(name, raw, revision)
    return TransformerBridge.boot_transformers(
        locate(name, raw, revision), hf_model=empty, tokenizer=tokenizer, device="meta"
    ).adapter


def _quiet_loading():
    """Silence transformers' report of the blocks that are left out on purpose."""
    from contextlib import contextmanager

    from transformers.utils import logging

    @contextmanager
    def quiet():
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(before)

    return quiet()


def bridge_forward(bridge, hooks: list[str]) -> Forward:
    """The same function as `bare_forward` for a loaded bridge: works in compatibility mode too, stops after the last
    hook, and skips the unembedding."""
    places = {hook: parse_hook(hook, bridge.cfg.n_layers) for hook in hooks}
    last = 1 + max(layer for layer, _ in places.values())

    @torch.inference_mode()
    def forward(tokens: torch.Tensor, take: Take | None = None) -> dict[str, torch.Tensor]:
        tokens, found = tokens.to(bridge.cfg.device), {}
        _, cache = bridge.run_with_cache(tokens, names_filter=hooks, stop_at_layer=last, return_type=None)
        for hook in hooks:
            (take or found.__setitem__)(hook, cache[hook].reshape(*tokens.shape, -1))
        return found

    return forward
