"""Dictionaries in the folder layouts of SAELens 6 and of dictionary_learning 0.1: written for their users, read from them.

Both hold four plain tensors and know of no tying, unit rows, mean or scale. With encoder E, unit rows D, bias b and decoder
bias a (tied: E = D; tied and untied: a = 0) these fold in without loss:

    ours      c  = ReLU(E ((x - mean) / scale - a) + b),    x_hat = scale (D^T c + a) + mean
    theirs    c' = ReLU(E (x - t) + b'),                    x_hat = D^T c' + t
    hence     c' = scale c,    b' = scale b,    t = mean + scale a

Codes in files are thus in the model's units, `scale` times ours (rows stay unit ones: dictionary_learning wants that), and what
is loaded has mean 0 and scale 1. A row of theirs of length w is divided by w and the encoder's row and bias multiplied: the
code is w c', x_hat stays. Their losses sum over coordinates: our alpha is an L1 weight of d scale alpha there.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from saelib import files
from saelib.dictionaries import Dictionary, DictionaryError, StandardSAE, TopKSAE

# description, weights, and the axes of E, b, D and t in them
SAELENS = "cfg.json", "sae_weights.safetensors", {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d"}
DL = "config.json", "ae.pt", {"encoder.weight": "nd", "encoder.bias": "n", "decoder.weight": "dn", "bias": "d"}


def save_saelens(dictionary: Dictionary, folder: Path, *, model: str, hook: str, context: int, **about) -> None:
    """Write `folder` for ``SAE.load_from_disk``: W_enc [d, n], b_enc [n], W_dec [n, d], b_dec [d]; topk keeps its k.

    `model`, `hook` ("blocks.3.hook_resid_post"), `context` (tokens in a row) and JSON-able `about` go into ``metadata``.
    """
    cfg = {"d_in": dictionary.d, "d_sae": dictionary.n_features, "dtype": "float32", "apply_b_dec_to_input": True}
    cfg |= {"architecture": "standard", "device": "cpu", "normalize_activations": "none", "reshape_activations": "none"}
    if dictionary.kind == "topk":  # which codes are largest does not depend on a positive scale
        cfg |= {"architecture": "topk", "k": int(dictionary.k), "rescale_acts_by_decoder_norm": False}
    # without a version from 6 on SAELens takes the file for an older one and rewrites it
    named = {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, "kind": dictionary.kind}
    cfg["metadata"] = named | {"model_name": model, "hook_name": hook, "context_size": context} | about
    _save(dictionary, folder, ("tied", "untied", "standard", "topk"), SAELENS, save_file, cfg)


def load_saelens(folder: Path) -> Dictionary:
    """`StandardSAE` or `TopKSAE` of a folder whose architecture is standard or topk; `DictionaryError` for all else."""
    cfg = _read(path := folder / SAELENS[0], files.read_json)
    given, k = cfg.get("architecture"), (cfg.get("k") or 0) if cfg.get("architecture") == "topk" else None
    more = {name: cfg.get(name) for name in ("normalize_activations", "reshape_activations", "activation_fn_str")}
    more = {name: value for name, value in more.items() if value not in (None, False, "none", "relu")}
    if given not in ("standard", "topk") or more:
        raise DictionaryError(f"{path}: architecture '{given}' {more or ''} cannot be read here; standard and topk can")
    made = _load(folder, SAELENS, load_file, cfg.get("d_sae"), cfg.get("d_in"), k)
    if k and not cfg.get("rescale_acts_by_decoder_norm") and (made.decoder.norm(dim=1) - 1).abs().max() > 1e-3:
        raise DictionaryError(f"{path}: topk cannot take rows of other lengths than 1, it would keep other codes")
    if not cfg.get("apply_b_dec_to_input", True):  # E x + b = E (x - t) + (b + E t)
        made.bias.data += made.weight.data @ made.decoder_bias.data
    return made


def save_dictionary_learning(dictionary: Dictionary, folder: Path, *, model: str, hook: str, context: int, **about):
    """Write `folder` for ``utils.load_dictionary``, or (ae.pt) ``AutoEncoder.from_pretrained``; `about` goes to ``trainer``."""
    layer = next((int(part) for part in hook.split(".") if part.isdigit()), None)  # SAELens will read it as resid_post
    named = {"dict_class": "AutoEncoder", "trainer_class": "StandardTrainer", "lm_name": model, "submodule_name": hook}
    named |= {"activation_dim": dictionary.d, "dict_size": dictionary.n_features, "layer": layer}
    head = {"trainer": named | {"kind": dictionary.kind} | about, "buffer": {"io": "out", "ctx_len": context}}
    _save(dictionary, folder, ("tied", "untied", "standard"), DL, torch.save, head)


def load_dictionary_learning(folder: Path) -> Dictionary:
    """`StandardSAE` of a folder whose ``dict_class`` is AutoEncoder; `DictionaryError` for all else."""
    trainer = _read(path := folder / DL[0], files.read_json).get("trainer", {})
    if (given := trainer.get("dict_class")) != "AutoEncoder":
        raise DictionaryError(f"{path}: dict_class '{given}' cannot be read here; AutoEncoder can")
    n, d = trainer.get("dict_size"), trainer.get("activation_dim")
    return _load(folder, DL, lambda path: torch.load(path, map_location="cpu", weights_only=True), n, d)


def _save(dictionary: Dictionary, folder: Path, kinds: tuple, layout: tuple, save, head: dict) -> None:
    if dictionary.kind not in kinds:
        raise DictionaryError(f"{folder}: this format cannot hold kind '{dictionary.kind}', only {', '.join(kinds)}")
    rows, scale, shift = dictionary.directions, dictionary.scale, getattr(dictionary, "decoder_bias", 0)
    encoder = rows if dictionary.kind == "tied" else dictionary.weight
    parts = zip(
        layout[2].items(), (encoder, scale * dictionary.bias, rows, dictionary.mean + scale * shift), strict=True
    )
    plain = {name: (p.T if axis == "dn" else p).data.cpu().float().contiguous().clone() for (name, axis), p in parts}
    (folder / layout[0]).unlink(missing_ok=True)  # written last: without it the folder does not count as finished
    with files.atomic(folder / layout[1]) as temporary:
        save(plain, temporary)
    files.write_json(folder / layout[0], head)


def _load(folder: Path, layout: tuple, read, n: int, d: int, k: int | None = None) -> Dictionary:
    found, axes = _read(path := folder / layout[1], read), layout[2]
    shapes = {name: tuple(getattr(part, "shape", ())) for name, part in found.items()}
    wanted = {name: tuple({"n": n, "d": d}[one] for one in axis) for name, axis in axes.items()}
    if shapes != wanted or k not in (None, *range(1, n + 1)):
        raise DictionaryError(f"{path} holds {shapes}, but {layout[0]} wants {wanted}{'' if k is None else f', k {k}'}")
    encoder, bias, decoder, centre = (found[name].T if axes[name] == "dn" else found[name] for name in axes)
    made, length = StandardSAE(n, d) if k is None else TopKSAE(n, d, k=k), decoder.float().norm(dim=1)
    parts = {"weight": encoder * length[:, None], "bias": bias * length, "decoder": decoder, "decoder_bias": centre}
    made.load_state_dict(made.state_dict() | parts)
    return made


def _read(path: Path, read) -> dict:
    try:
        return dict(read(path))
    except Exception as error:  # a missing, damaged or hostile file can raise anything
        raise DictionaryError(f"{path} is damaged or not plain (pickled classes are refused): {error}") from error
