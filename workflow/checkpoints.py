"""Which features exist when? Dictionaries of several training checkpoints of one model on the same tokens (beyond the paper).

    python workflow/checkpoints.py --profile paper-70m --checkpoints step512 step4000 step32000 step143000

The profile gives model, text, hook and settings; the checkpoints are revisions on the Hub or subfolders of the model's
folder (`saelib.hub`). Each checkpoint's activations of the profile's main hook train one tied dictionary at notebook 02's low
alpha. A feature of the last checkpoint's dictionary **exists** at an earlier one if there some feature's code goes with its
own, on the same held-out tokens, with a correlation of at least 0.7: codes can be compared where coordinates cannot, since
training may turn the stream. Every dictionary but the last has another start, so that nothing is shared by that alone; the
last checkpoint is trained from both, and what its features share with themselves from another start is the ceiling.

Writes ``<run>/checkpoints/table.csv``: FVU and L0 of each dictionary, the share of the last's features that exist there, their
mean largest correlation; and the mean largest cosine of the directions (MMCS), for comparison.
"""

import argparse
from dataclasses import replace

import pandas as pd
import torch

from saelib import activations, corpus, files, metrics, models, paths, profiles, store, training

EXISTS = 0.7  # correlation of codes; stated before any run


def best_correlation(codes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Largest Pearson correlation of each column of `codes` [n, f] with a column of `others` [n, g]; 0 for a dead one."""
    unit = [torch.nn.functional.normalize(part - part.mean(0), dim=0) for part in (codes, others)]
    return (unit[0].T @ unit[1]).amax(1)


def compare(profile: str, checkpoints: list[str], hook: str | None = None, folder=paths.PROFILES) -> pd.DataFrame:
    """The table described above, a row per checkpoint in the order given, with the last twice: from another start, then as
    the one compared with."""
    parameters = profiles.load(profile, folder=folder)
    first, second = parameters["01_collect_activations"], parameters["02_train_dictionaries"]
    name, device, hook = first["model"], models.default_device(), hook or second["main_hook"]
    run, dtype = paths.run_dir(profile) / "checkpoints", models.as_dtype(first["dtype"], device)
    rows = corpus.token_rows(
        run, first["text"], models.load_tokenizer(name, revision=checkpoints[-1]), model=name, seed=first["seed"],
        context=first["context"], n_train=first["n_train_rows"], n_held_out=first["n_held_out_rows"],
        separator=first["separator"], row_starts_with_separator=first["row_starts_with_separator"],
    )  # fmt: skip
    wanted = ("lr", "batch_size", "passes", "decay", "scale", "centre")
    config = training.TrainConfig(
        ratio=second["main_ratio"], alpha=second["low_alpha"], **{key: second[key] for key in wanted}
    )
    codes, directions, table = [], [], []
    for number, checkpoint in enumerate([*checkpoints, checkpoints[-1]]):
        seed = 0 if number == len(checkpoints) else 1
        place = f"{name}@{checkpoint}"
        forward = activations.forward_for(place, dtype=dtype, device=device, compatibility=first["compatibility"])
        coordinates = "processed" if first["compatibility"] else "raw"
        kept = {"coordinates": coordinates, "dtype": dtype, "first_position": first["first_position"]}
        made = activations.harvest(rows, [hook], run / checkpoint, forward, **kept)[hook]
        splits = [store.ActivationStore(made, split, outlier_factor=1e6) for split in activations.SPLITS]
        products = models.as_dtype(second["dtype"], device)
        config, options = replace(config, seed=seed), {"device": device, "dtype": products}
        dictionary, about = training.train(*splits, config, run / checkpoint / "dictionaries", **options)
        with torch.inference_mode():
            parts = [dictionary.encode(x.to(device)).cpu() for x in splits[1].chunks(8192, limit=100_000)]
        codes.append(torch.cat(parts))
        directions.append(dictionary.directions.detach().cpu())
        figures = {name: about["metrics"][name] for name in ("fvu", "l0")}
        table.append({"checkpoint": checkpoint, "seed": seed} | figures)
    alive = (codes[-1] > 0).sum(0) > 10
    for row, code, direction in zip(table, codes, directions, strict=True):
        correlation = best_correlation(codes[-1][:, alive], code)
        row |= {"features": int(alive.sum()), "exist": (correlation >= EXISTS).float().mean().item()}
        row["mean correlation"] = correlation.mean().item()
        row["mmcs"] = metrics.max_cosine(directions[-1][alive], direction).mean().item()
    table = pd.DataFrame(table)
    with files.atomic(run / "table.csv") as temporary:
        temporary.write_text(table.to_csv(index=False, float_format="%.4f"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", required=True)
    parser.add_argument("--checkpoints", nargs="+", required=True, help="revisions or steps, the last one last")
    parser.add_argument("--hook", help="another one than the profile's main hook")
    arguments = parser.parse_args()
    print(compare(arguments.profile, arguments.checkpoints, arguments.hook).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
