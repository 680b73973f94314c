"""A run folder of a small size for the feature pages, whose text is hostile: markup, quotes, separators, a bidi mark."""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from conftest import MARK, RESIDUAL
from safetensors.torch import save_file
from transformers import AutoTokenizer

from saelib import dictionaries, files, fragments, paths, profiles, store, training

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    '"];window.hacked = 3;//',
    "&lt;b&gt;\u2028\u2029\\'\"",
    "\u202egnp.<style>*{display:none}</style>",
]
DEAD, RARE = 3, 5


def make_run(folder: Path, llama: str, rows, harvested: Path, *, n_features: int) -> None:
    """Below `folder`: a model whose tokenizer knows the hostile tokens, and a run "made" with its activations, token rows (a
    sixth of them hostile) and one dictionary, in which feature `DEAD` is never active and `RARE` is hardly ever."""
    shutil.copytree(llama, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(HOSTILE)
    tokenizer.save_pretrained(folder / "model")
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(HOSTILE), dtype=torch.int32)
    held_out = rows.held_out.clone()
    where = torch.arange(6, held_out.numel(), 6)
    held_out.view(-1)[where] = ids[where % len(ids)]
    run = folder / "runs" / "made"
    shutil.copytree(harvested, run / "activations")
    parts = {name: getattr(rows, name) for name in ("train", "train_doc", "held_out_doc")}
    save_file(parts | {"held_out": held_out}, run / "activations" / "tokens.safetensors")
    documents = ["<i>made</i>" + name for name in rows.documents]
    head = {"spec": rows.spec | {"separator": MARK}, "documents": documents, "tokens_by_source": {}}
    files.write_json(run / "activations" / "tokens.json", head)
    config = training.TrainConfig(ratio=n_features / 32)
    dictionary = dictionaries.TiedSAE(n_features, 32, generator=torch.Generator().manual_seed(0))
    dictionary.bias.data[DEAD] = -1e6
    values = store.ActivationStore(run / "activations" / RESIDUAL, "held_out").rows(torch.arange(100)).float()
    dictionary.bias.data[RARE] = -(values @ dictionary.directions[RARE]).topk(3).values[-1].item()
    path = run / "dictionaries" / RESIDUAL / f"{config.name}.safetensors"
    dictionaries.save(dictionary, path, spec={"config": asdict(config)})


def use_run(folder: Path, patch) -> None:
    """Point the library at `folder`, at fragments of five tokens (rows have fifteen), and at parameters that fit."""
    settings = {"model": str(folder / "model"), "main_hook": RESIDUAL, "outlier_factor": 10.0, "n_features": 50}
    settings |= {"main_ratio": None, "alpha": 1e-3, "seeds": [0], "rule_length": 8}
    (path,) = (folder / "runs" / "made" / "dictionaries" / RESIDUAL).glob("*.json")
    settings["main_ratio"] = files.read_json(path)["spec"]["config"]["ratio"]
    parameters = {"04_autointerp": settings, "02_train_dictionaries": {"lr": 1e-3}}
    patch.setattr(profiles, "load", lambda profile: parameters)
    patch.setattr(paths, "DATA", folder)
    patch.setattr(fragments, "LENGTH", 5)
