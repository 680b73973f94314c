"""Make a part of what a notebook would make, with the same calls: one hook, one group of dictionaries.

Run by Snakemake (`script:`), which provides the global `snakemake`. No two parts make the same file.
"""

from dataclasses import replace
from pathlib import Path

from saelib import baselines, files, models, paths, store, training
from saelib.training import TrainConfig


def groups(p: dict) -> dict[str, list[TrainConfig]]:
    """What notebook 02 trains with parameters `p`, by the name of the part.

    ``tied`` at the main hook has the whole sweep, ``tied_inner`` and ``sizes_inner`` are those of the other hooks. What
    depends on a result (TopK at the L0 of a tied dictionary) is left to the notebook.
    """
    base = TrainConfig(
        ratio=p["main_ratio"], alpha=p["high_alpha"], lr=p["lr"], batch_size=p["batch_size"], passes=p["passes"],
        decay=p["decay"], scale=p["scale"], centre=p["centre"], seed=p["seeds"][0],
    )  # fmt: skip
    pair, ratios = (p["low_alpha"], p["high_alpha"]), p["ratios"]
    tied = [replace(base, alpha=alpha) for alpha in p["alphas"]]
    topk = [replace(base, kind="topk", alpha=0.0, decay=p["later_decay"], k=k) for k in p["ks"]]
    sizes = [replace(base, ratio=ratio, alpha=alpha) for ratio in ratios for alpha in pair]
    inner = [config for config in sizes if config.ratio < max(ratios)]
    seeds = [replace(base, alpha=alpha, seed=seed) for seed in p["seeds"][1:] for alpha in pair]
    seeds += [replace(base, ratio=min(ratios), seed=seed) for seed in p["seeds"]]
    mlp = {
        f"mlp_{kind}": [
            replace(base, passes=1, kind=kind, ratio=ratio, alpha=alpha)
            for ratio in p["mlp_ratios"] for alpha in p["mlp_alphas"]
        ]
        for kind in ("tied", "untied")
    }  # fmt: skip
    found = {
        "tied": [base, *tied],
        "rivals": [replace(config, kind="standard", decay=p["later_decay"]) for config in tied[1:-1]] + topk,
        "sizes": sizes,
        "seeds": seeds,
    }
    return distinct(found) | distinct({"tied_inner": tied[1:-1], "sizes_inner": inner}) | mlp


def distinct(found: dict[str, list[TrainConfig]]) -> dict[str, list[TrainConfig]]:
    """The groups of one hook, each configuration in the first that has it alone: two jobs must not write one file."""
    taken, result = set(), {}
    for group, configs in found.items():
        result[group] = [config for config in dict.fromkeys(configs) if config not in taken]
        taken |= {*configs}
    return result


def train(p: dict, hook: str, group: str) -> list[str]:
    """Train one group of notebook 02 at `hook`; the names of its dictionaries."""
    run, device, kept = paths.run_dir(p["profile"]), models.default_device(), {"outlier_factor": p["outlier_factor"]}
    folder, n_rows = run / "activations" / hook, p["mlp_rows"] if group.startswith("mlp_") else None
    group += "_inner" if group in ("tied", "sizes") and hook != p["main_hook"] else ""
    train_store = store.ActivationStore(folder, "train", n_rows=n_rows, **kept)
    held_out = store.ActivationStore(folder, "held_out", **kept)
    options = {"device": device, "dtype": models.as_dtype(p["dtype"], device)}
    options["evaluations_per_pass"] = 4 if group == "tied" else 0
    made = training.sweep(train_store, held_out, groups(p)[group], run / "dictionaries" / hook, **options)
    return [row["name"] for row in made]


def fit(p: dict, hook: str) -> list[str]:
    """Fit the independent components of notebook 03 at `hook`, at its main hook also those of other iterations."""
    run = paths.run_dir(p["profile"])
    train_store = store.ActivationStore(run / "activations" / hook, "train", outlier_factor=p["outlier_factor"])
    n, seed, tolerance = p["n_activations"], p["seed"], p["ica_tolerance"]
    budgets = {"ica_code": p["ica_iterations"]}
    budgets |= {f"ica_{other}": other for other in p["other_iterations"] if hook == p["main_hook"]}
    for name, iterations in budgets.items():

        def make(iterations=iterations):
            x = baselines.sample(train_store, n, seed=seed)
            found, changes = baselines.ica(x, iterations=iterations, tolerance=tolerance, seed=seed)
            return found, {"changes": changes}

        about = {"n": n, "seed": seed, "iterations": iterations, "tolerance": tolerance}
        baselines.fitted(name, make, run / "baselines" / hook, train_store, **about)
    return list(budgets)


def make(p: dict, hook: str, group: str) -> list[str]:
    """Make the part `group` at `hook`; the names of what it holds."""
    return fit(p, hook) if group == "ica" else train(p, hook, group)


if __name__ == "__main__":
    given, (hook, group) = snakemake.params.parameters, snakemake.wildcards  # noqa: F821
    files.write_json(Path(snakemake.output[0]).resolve(), {"hook": hook, "made": make(given, hook, group)})  # noqa: F821
