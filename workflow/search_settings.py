"""Which training settings are good on the bundled model? One change at a time, judged on another layer than the results.

``make search`` writes data/expected/settings_search.csv, a row per setting and version: layer 6, held-out FVU on lines between
neighbouring alphas (or k) at 30, 60 and 120 active features. The rule, fixed beforehand: a setting is taken over into
notebook 02 if it lowers the mean of the three by more than 2% of itself at no more passes. It does not say what to do when
several pass; notebook 02 says what was chosen then, and that this was after a look at the table.

Finished dictionaries are kept in data/runs/search, so the search can be stopped and goes on. Rows of other settings and of
other versions stay in the table; ``--kinds`` and ``--changes`` ("none", "lr 0.002, decay 0.3") choose what is made again.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import saelib
from saelib import checks, files, models, paths, store, training

L0 = (30, 60, 120)
ALPHAS, KS = (6e-4, 1.2e-3, 2.4e-3, 4.8e-3), (30, 60, 120)
CHANGES = [
    {"lr": 3e-4}, {"lr": 2e-3}, {"lr": 4e-3},
    {"batch_size": 128}, {"batch_size": 512}, {"batch_size": 2048},
    {"warmup_steps": 200}, {"decay": 0.3}, {"decay": 1.0}, {"lr": 2e-3, "decay": 0.3}, {"lr": 2e-3, "decay": 1.0},
    {"lr": 4e-3, "decay": 1.0}, {"beta2": 0.99}, {"lr": 2e-3, "decay": 0.3, "beta2": 0.99}, {"centre": True},
    {"scale": False}, {"passes": 1}, {"passes": 4},
]  # fmt: skip


def at_l0(l0: list[float], fvu: list[float], targets=L0) -> list[float]:
    """FVU at the `targets`, linear in log L0 between neighbours; NaN more than 2% outside of what was measured."""
    order = np.argsort(l0)
    x, y = np.log(np.maximum(np.array(l0)[order], 1e-9)), np.array(fvu)[order]
    near = [target * (1 - 0.02) <= max(l0) and target * (1 + 0.02) >= min(l0) for target in targets]
    return np.where(near, np.interp(np.log(targets), x, y), math.nan).tolist()


def named(change: dict) -> str:
    """A change as the table names it."""
    return ", ".join(f"{name} {value}" for name, value in change.items()) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--hook", default="blocks.6.hook_resid_post")
    parser.add_argument("--kinds", nargs="+", default=["tied", "standard", "topk"])
    parser.add_argument("--changes", nargs="+", default=[named(change) for change in ({}, *CHANGES)])
    parser.add_argument("--out", type=Path, default=paths.EXPECTED / "settings_search.csv")
    arguments = parser.parse_args()
    folder = paths.run_dir(arguments.profile) / "activations" / arguments.hook
    train, held_out = (store.ActivationStore(folder, split, outlier_factor=8.0) for split in ("train", "held_out"))
    table = pd.read_csv(arguments.out, comment="#") if arguments.out.exists() else pd.DataFrame()
    for kind in arguments.kinds:
        for change in [change for change in ({}, *CHANGES) if named(change) in arguments.changes]:
            base = training.TrainConfig(kind=kind, alpha=0.0, k=KS[0] if kind == "topk" else 0)
            base = replace(base, **change)
            # without scaling, the same optimum lies at alpha times the scale
            factor = 1.0 if base.scale else train.scale
            points = (
                [replace(base, k=k) for k in KS]
                if kind == "topk"
                else [replace(base, alpha=a * factor) for a in ALPHAS]
            )
            options = {"dtype": models.fast_dtype(), "checkpoint_every": 10**6}
            found = training.sweep(train, held_out, points, paths.run_dir("search") / arguments.hook, **options)
            fvu = at_l0([row["l0"] for row in found], [row["fvu"] for row in found])
            row = {"kind": kind, "change": named(change), "saelib": saelib.__version__}
            row |= {f"fvu at {target}": value for target, value in zip(L0, fvu, strict=True)} | {"mean": np.mean(fvu)}
            row["points"] = "; ".join(f"L0 {r['l0']:.0f} FVU {r['fvu']:.3f}" for r in found)
            # the last of its kind takes the place of the row of the same setting and version
            table = pd.concat([table, pd.DataFrame([row])]).drop_duplicates(["kind", "change", "saelib"], keep="last")
            base = "R 2, lr 1e-3, batch 256, 2 passes, scaled, not centred"
            head = f"# make search: {arguments.hook}, {train.n:,} activations; changes to {base}; {checks.environment_line()}\n"
            with files.atomic(arguments.out) as temporary:
                temporary.write_text(head + table.to_csv(index=False, float_format="%.4f"))
            print(row, flush=True)


if __name__ == "__main__":
    main()
