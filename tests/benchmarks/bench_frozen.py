"""What the frozen step counter of the paper's code changes: held-out FVU and L0 with it over those without.

On the activations that a run left (``python -m tests.benchmarks.bench_frozen [PROFILE] [HOOK]``, by default laptop, layer 6),
tied dictionaries, the paper's nominal rate 1e-3, one pass, three alphas.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from saelib import models, paths, store, training

ALPHAS = (5e-4, 1e-3, 2e-3)


def main(profile: str = "laptop", hook: str = "blocks.6.hook_resid_post"):
    folder = paths.run_dir(profile) / "activations" / hook
    if not (folder / "manifest.json").exists():
        print(f"  not measured: {folder} is not there; run `make replicate PROFILE={profile}` first")
        return
    splits = [store.ActivationStore(folder, split, outlier_factor=8.0) for split in ("train", "held_out")]
    base = training.TrainConfig(batch_size=256, passes=1, lr=1e-3)
    with tempfile.TemporaryDirectory() as place:
        for alpha in ALPHAS:
            configs = [replace(base, alpha=alpha, frozen_step=frozen) for frozen in (False, True)]
            right, frozen = training.sweep(
                *splits, configs, Path(place), dtype=models.fast_dtype(), evaluations_per_pass=0
            )
            ratios = ", ".join(
                f"{name} {frozen[key]:.4g} against {right[key]:.4g} (ratio {frozen[key] / right[key]:.3f})"
                for name, key in (("FVU", "fvu"), ("L0", "l0"))
            )
            print(f"  alpha {alpha:g}, frozen against right: {ratios}")


if __name__ == "__main__":
    main(*sys.argv[1:])
