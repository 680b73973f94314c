"""Feature pages: a folder per dictionary that a browser opens from disk, without a server or a network (`make features`).

The page is the three files of ``saelib/pages``. This module computes what they show and writes it beside them as scripts,
since a page opened from disk may load scripts but not read files.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import saelib
from saelib import autointerp, dictionaries, files, fragments, metrics, models, paths, profiles, store, training
from saelib.activations import HarvestError
from saelib.corpus import TokenRows
from saelib.fragments import FragmentError

ASSETS = Path(__file__).parent / "pages"
BINS, COMMONEST = 10, 5  # of a histogram, as in the paper's case studies (section 5.1)
SHOWN = {"top": 12, "high": 5, "low": 5}  # contexts: strongest; random ones above and up to half of the maximum
BEFORE, AFTER = 24, 10  # tokens of a context around the one that it was chosen for
PROMOTED, NEAREST = 10, 6  # tokens promoted and as many suppressed; features of the nearest directions
SUMMARY = 100  # characters of an explanation in the list
PER_FILE = 64  # features per script
MEMORY = 400_000_000  # bytes of codes held at once

Show = Callable[[int], str]  # from a token to its text


class PageError(ValueError):
    """No pages can be made; the message says what is wrong and what there is."""


#: What the command reports in one line; anything else is a fault of the program and shows its traceback.
EXPECTED = (
    PageError,
    profiles.ProfileError,
    dictionaries.DictionaryError,
    HarvestError,
    models.ModelError,
    FragmentError,
)


@torch.inference_mode()
def logit_effects(bridge, hook: str, directions: Tensor, *, n: int = PROMOTED) -> tuple[Tensor, Tensor]:
    """Effects and ids, [n_features, 2n] each, of the n tokens that a direction promotes most (strongest first) and of the n
    that it suppresses most (strongest last).

        e_j = W_U (N(u_j) - N(0)), less its mean over the vocabulary;    u_j = W d_j / rms(W d_j)

    d_j is the direction [d], N the model's final norm, W_U its unembedding. W is the identity where the hook lies in the
    residual stream or at something added to it, else the output matrix of that MLP or attention. This is the direct path
    alone, in logits, of a stream that holds nothing but the direction. Later layers take no part, so order and ratios
    say more than the size does.
    """
    layer, site = models.parse_hook(hook, bridge.cfg.n_layers)
    path, what = models.HOOKS[site]
    write = bridge.blocks[layer].get_submodule(path[1:]) if what == "input" else torch.nn.Identity()
    parts = []
    for d in directions.to(bridge.cfg.device, torch.float32).split(64):
        u = write(d[None]) - write(torch.zeros_like(d[None, :1]))
        u = u / u.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        logits, at_zero = (bridge.unembed(bridge.ln_final(x))[0] for x in (u, torch.zeros_like(u[:, :1])))
        effect = logits - at_zero
        effect = effect - effect.mean(-1, keepdim=True)
        high, low = effect.topk(n), effect.topk(n, largest=False)
        parts.append([torch.cat([a, b.flip(1)], 1).cpu() for a, b in zip(high, low, strict=True)])
    effects, ids = zip(*parts, strict=True)
    return torch.cat(effects), torch.cat(ids)


def short(value: float) -> float | None:
    """Three significant digits; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else float(f"{value:.3g}")


def describe(code: np.ndarray, tokens: np.ndarray, show: Show, draw: np.random.Generator) -> dict:
    """What one feature does in a text; `code` [n_rows, length] is NaN where the activation is not known.

    ``purity``: of the activations above half the maximum, the share on their commonest token. ``bins``: how many tokens are
    active in each of ten equal bins from 0 to the maximum, the commonest tokens (``legend``) one by one and then the rest.
    ``fires``: the three tokens with the largest sums of activations.
    """
    flat, tokens = code.ravel(), tokens.ravel()
    active = np.flatnonzero(flat > 0)
    result = {"n": len(active), "frequency": short(len(active) / max(1, (~np.isnan(flat)).sum()))}
    if not len(active):
        return result | {"max": 0, "mean": 0, "purity": None, "fires": [], "legend": [], "bins": [], "contexts": {}}
    values = flat[active].astype(np.float64)
    names, group, count = np.unique(tokens[active], return_inverse=True, return_counts=True)
    top, strong = values.max(), np.bincount(group[values > values.max() / 2])
    commonest = np.argsort(-count, kind="stable")[:COMMONEST]
    column = np.full(len(names), len(commonest))
    column[commonest] = np.arange(len(commonest))
    bins = np.zeros((BINS, len(commonest) + 1), dtype=int)
    np.add.at(bins, (np.minimum((BINS * values / top).astype(int), BINS - 1), column[group]), 1)
    mixed = draw.permutation(active)
    ranked = {"top": active[np.argsort(-values, kind="stable")]}
    ranked |= {"high": mixed[flat[mixed] > top / 2], "low": mixed[flat[mixed] <= top / 2]}
    heaviest = np.argsort(-np.bincount(group, values), kind="stable")[:3]
    return result | {
        "max": short(top),
        "mean": short(values.mean()),
        "purity": short(strong.max() / strong.sum()),
        "fires": [show(token) for token in names[heaviest].tolist()],
        "legend": [show(token) for token in names[commonest].tolist()],
        "bins": bins.tolist(),
        "contexts": contexts(code, ranked),
    }


def contexts(code: np.ndarray, ranked: dict[str, np.ndarray]) -> dict[str, list]:
    """For each group the first of the `ranked` positions (into the flat `code`) that are not within `AFTER` tokens of one
    chosen before, as [row, start, stop, position, [offset, activation, offset, activation, ...]]: offsets from the start,
    of active tokens alone; activation -1 where it is not known."""
    taken: dict[int, list[int]] = {}
    chosen: dict[str, list] = {group: [] for group in ranked}
    for group, order in ranked.items():
        for place in order:
            row, position = divmod(int(place), code.shape[1])
            if any(abs(position - other) <= AFTER for other in taken.get(row, [])):
                continue
            taken.setdefault(row, []).append(position)
            start, stop = max(0, position - BEFORE), min(code.shape[1], position + AFTER + 1)
            part = np.nan_to_num(code[row, start:stop], nan=-1.0).tolist()
            levels = [number for offset, a in enumerate(part) if a for number in (offset, short(a))]
            chosen[group].append([row, start, stop, position, levels])
            if len(chosen[group]) == SHOWN[group]:
                break
    return chosen


def features(
    dictionary: dictionaries.Dictionary, held: store.ActivationStore, rows: TokenRows, show: Show, *,
    separator: int | None, block: int, rule_length: int, seed: int,
) -> Iterator[dict]:  # fmt: skip
    """`describe` of every feature, in order, with ``explanation`` and ``scores`` (None and empty where the test of notebook 04
    cannot be made: fewer than 20 fragments of text in which the feature is active).

    The dictionary encodes the text once, or once per group of features whose codes take `MEMORY` bytes. Features are
    explained by token rules, `block` at a time, so that those of the first block get what notebook 04 gives them.
    """
    text = rows.held_out[:, held.first_position :].numpy()
    length = text.shape[1]
    whole = fragments.cut(rows.held_out, held, seed=seed, length=length)
    pieces = fragments.cut(rows.held_out, held, seed=seed, length=min(fragments.LENGTH, length), separator=separator)
    known = whole.place.flatten() >= 0
    position = torch.zeros(held.n, dtype=torch.long)  # in the text, of each kept activation
    position[whole.place.flatten()[known]] = known.nonzero()[:, 0]
    rules = autointerp.TokenRules(length=rule_length, show=lambda token: repr(show(token)))
    draw = np.random.default_rng(seed)
    per_pass = block * max(1, MEMORY // (4 * block * text.size))
    with tqdm(total=dictionary.n_features, desc="feature pages", unit="feature") as bar:
        for group in torch.arange(dictionary.n_features).split(per_pass):
            codes = fragments.codes(dictionary, held, whole, group)
            for part, code in zip(group.split(block), codes.split(block, dim=2), strict=True):
                there = code.flatten(0, 1)[position[pieces.place.clamp(min=0)]]
                there[pieces.place < 0] = torch.nan
                found, _ = fragments.records(pieces, there, part, generator=torch.Generator().manual_seed(seed))
                told = {row["feature"]: row for row in autointerp.score_all(found, rules, rules)[0]}
                for feature, column in zip(part.tolist(), code.unbind(2), strict=True):
                    row = told.get(feature, {})
                    scores = {name: short(row[name]) for name in autointerp.PARTS if name in row}
                    about = {"explanation": row.get("explanation"), "scores": scores}
                    yield describe(column.numpy(), text, show, draw) | about
                    bar.update()


def script(call: str, *content) -> str:
    """JavaScript that hands `content` to the page. JSON in ASCII, with <, > and & written as escapes: whatever stands in a
    model's text, it can end neither the string nor a script element."""
    line = ",".join(json.dumps(part, allow_nan=False, separators=(",", ":")) for part in content)
    for mark in "<>&":
        line = line.replace(mark, f"\\u{ord(mark):04x}")
    return f"saelib.{call}({line});\n"


def write(
    folder: Path, about: dict, described: list[dict], rows: TokenRows, show: Show,
    effects: tuple[Tensor, Tensor], directions: Tensor,
) -> None:  # fmt: skip
    """Write the page and its data to `folder`, which appears whole or not at all; an older one there is replaced.

    In ``data``: ``summary.js`` (what the list shows), ``text.js`` (the rows of text that all contexts point into), and
    ``features-000.js`` and so on (`PER_FILE` features each, fetched when one of them is opened).
    """
    near = metrics.cosines(directions, directions).fill_diagonal_(-2).topk(min(NEAREST, len(directions) - 1))
    summary = []
    for one, ids, values, others, cosines in zip(described, *effects[::-1], near.indices, near.values, strict=True):
        tokens = [[show(token), short(value)] for token, value in zip(ids.tolist(), values.tolist(), strict=True)]
        one |= {"promoted": tokens[: len(tokens) // 2], "suppressed": tokens[len(tokens) // 2 :]}
        one["nearest"] = list(zip(others.tolist(), map(short, cosines.tolist()), strict=True))
        line = {name: one[name] for name in ("n", "frequency", "max", "mean", "purity", "fires")}
        line |= {"score": one["scores"].get("both"), "explanation": (one["explanation"] or "")[:SUMMARY]}
        summary.append(line | {"promotes": [token for token, _ in tokens[:3]]})
    scripts = {"summary": script("summary", about, summary), "text": script("text", *as_text(rows, about, show))}
    for first in range(0, len(described), PER_FILE):
        part = described[first : first + PER_FILE]
        scripts[f"features-{first // PER_FILE:03d}"] = script("features", first, part)
    with files.atomic_folder(folder) as temporary:
        for asset in ASSETS.iterdir():
            shutil.copyfile(asset, temporary / asset.name)
        for name, content in scripts.items():
            with files.atomic(temporary / "data" / f"{name}.js") as path:
                path.write_text(content)
        files.write_json(temporary / "about.json", about)


def as_text(rows: TokenRows, about: dict, show: Show) -> tuple[list, list, list]:
    """The different tokens as texts; each held-out row as indices into them; for each row [first position, document], ..."""
    first = about["first_position"]
    names, index = np.unique(rows.held_out[:, first:].numpy(), return_inverse=True)
    owners = []
    for owner in rows.held_out_doc[:, first:].numpy():
        starts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist()]
        owners.append([[start, rows.documents[owner[start]]] for start in starts])
    return [show(token) for token in names.tolist()], index.reshape(len(rows.held_out), -1).tolist(), owners


def find(profile: str, hook: str | None, name: str | None) -> tuple[Path, str, str, dict]:
    """Run folder, hook, name of the dictionary, and the parameters of notebook 04. By default its main hook and the
    dictionary that it scores there. Raises `paths.MissingArtefact` or `PageError`."""
    parameters, run = profiles.load(profile), paths.run_dir(profile)
    settings = parameters["04_autointerp"]
    hook = hook or settings["main_hook"]
    paths.require(run / "activations" / hook / "manifest.json", "01_collect_activations")
    folder = run / "dictionaries" / hook
    if name is None:
        wanted = {"kind": "tied", "ratio": settings["main_ratio"], "alpha": settings["alpha"]}
        wanted |= {"seed": settings["seeds"][0], "lr": parameters["02_train_dictionaries"]["lr"]}
        name = training.TrainConfig(**dictionaries.find(folder, **wanted)[1]["spec"]["config"]).name
    known = sorted(path.stem for path in folder.glob("*.json"))
    if known and name not in known:
        raise PageError(f"no dictionary '{name}' in {folder}; there are {', '.join(known)}")
    return run, hook, name, settings


def make(profile: str, hook: str | None = None, name: str | None = None) -> Path:
    """Write the pages of one dictionary to ``data/runs/<profile>/features/<hook>/<name>`` unless they are current."""
    run, hook, name, settings = find(profile, hook, name)
    dictionary, trained = dictionaries.load(run / "dictionaries" / hook / f"{name}.safetensors")
    held = store.ActivationStore(run / "activations" / hook, "held_out", outlier_factor=settings["outlier_factor"])
    harvest = held.manifest["spec"]
    options = {"block": settings["n_features"], "rule_length": settings["rule_length"], "seed": settings["seeds"][0]}
    about = {"profile": profile, "model": settings["model"], "hook": hook, "dictionary": name, "kind": dictionary.kind}
    about |= {"n_features": dictionary.n_features, "text": harvest["tokens"]["text"], "tokens": held.n}
    about |= {"left_out": held.n_left_out, "first_position": held.first_position}
    made_of = [saelib.__version__, trained["sha256"], held.manifest["shards"], settings["outlier_factor"], options]
    made_of += [files.sha256(path) for path in (Path(__file__), *sorted(ASSETS.iterdir()))]
    about["key"] = files.key({"about": about, "made of": made_of})
    folder = run / "features" / hook / name
    if (folder / "about.json").exists() and files.read_json(folder / "about.json") == about:
        return folder
    head = files.read_json(paths.require(run / "activations" / "tokens.json", "01_collect_activations"))
    rows = TokenRows(**load_file(run / "activations" / "tokens.safetensors"), **head)
    bridge = models.load_model(settings["model"], compatibility=harvest["coordinates"] != "raw")

    def show(token: int) -> str:
        return bridge.tokenizer.decode([token])

    separator = bridge.tokenizer.convert_tokens_to_ids(rows.spec["separator"])
    described = list(features(dictionary, held, rows, show, separator=separator, **options))
    directions = dictionary.directions.detach()
    write(folder, about, described, rows, show, logit_effects(bridge, hook, directions), directions)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """``python -m saelib.feature_pages PROFILE [--hook HOOK] [--dictionary NAME]``: prints the page's path and size."""
    parser = argparse.ArgumentParser(prog="python -m saelib.feature_pages", description="Write a dictionary's pages.")
    parser.add_argument("profile", nargs="?", default="laptop")
    parser.add_argument("--hook", help="default: the main hook of notebook 04")
    parser.add_argument("--dictionary", help="file name without its ending; default: the one that notebook 04 scores")
    given = parser.parse_args(arguments)
    try:
        folder = make(given.profile, given.hook, given.dictionary)
    except (*EXPECTED, OSError) as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder / 'index.html'} ({size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    main()
