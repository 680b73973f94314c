"""SAELens, dictionary_learning and saelib train the same dictionary on the same batches: rate, FVU and L0 of each.

``python -m tests.benchmarks.bench_rivals --alpha 1e-3``. The form is what all three know: a free encoder, a decoder of
unit rows (SAELens: of any length, with the L1 term weighted by it) and a decoder bias. Activations are scaled to a mean
square of 1, held in memory, and handed out in the same order, one batch at a time. The rivals run their own training loops
(`SAETrainer.fit`, `trainSAE`) in their own environment (tests/interop), with logging off, in float32 as they default to and
with bfloat16 autocast (which dictionary_learning has for GPUs only; here it is forced). Their L1 weight is d alpha, since
they sum over coordinates where we average. Each starts from its own kind of random weights.

Timed is from the first batch asked for to the end of the last step, after a short training of a throwaway dictionary. Ours
holds a progress bar, a look at the loss every 25 steps, checkpoints and one evaluation on 4,096 held-out activations; theirs
what they do by default. Each round runs all in turn. Rates are printed by the clock and per processor second; with
--threads 1 the second hardly depends on who else computes. FVU and L0 are those of `saelib.metrics.evaluate` on held-out
activations, the rivals' dictionaries read by `saelib.export`. The rivals take our learning rate, warm-up and decay unless
--rival-lr and the like say otherwise.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from saelib import files, metrics, models
from tests.benchmarks.contest import OURS, RIVALS, STORE, activations, train_ours, train_rival


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=STORE, help="folder of harvested activations of one hook")
    parser.add_argument("--rows", type=int, default=100_000, help="activations to train on")
    parser.add_argument("--held-out", type=int, default=8192)
    parser.add_argument("--features", type=int, default=1152)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=1e-3, help="L1 weight on our scale; theirs is d times it")
    parser.add_argument("--k", type=int, default=0, help="train TopK with that many active features instead")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    parser.add_argument("--decay", type=float, default=0.0, help="share of all steps with linear decay to 0")
    parser.add_argument(
        "--rival-lr", type=float, help="the rivals' learning rate, warm-up and decay, where not as ours"
    )
    parser.add_argument("--rival-warmup", type=int)
    parser.add_argument("--rival-decay", type=float)
    parser.add_argument("--rival-l1-warmup", type=int, default=0, help="steps over which the rivals' L1 weight rises")
    parser.add_argument("--beta2", type=float, default=0.999, help="Adam's second beta, ours and SAELens'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="how often each trains; the rate is the median")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *RIVALS], default=[*OURS, *RIVALS])
    parser.add_argument("--out", type=Path, help="JSON file for the rows and the settings")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    os.environ["NUMBA_NUM_THREADS"] = str(arguments.threads)  # or numba's start gives torch all cores again
    load = os.getloadavg()[0]
    x, other = activations(arguments.store, arguments.rows, arguments.held_out)
    if arguments.batch > len(x) // 25:
        parser.error(f"--batch {arguments.batch} leaves fewer than 25 steps in {len(x)} rows")
    n = len(x) // arguments.batch * arguments.batch * arguments.passes
    seconds, trained = {name: [] for name in arguments.only}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name in arguments.only:
                if name in OURS:
                    trained[name], taken = train_ours(x, other, OURS[name], arguments)
                else:
                    trained[name], taken = train_rival(x, Path(folder), name, arguments)
                seconds[name].append(taken)
                print(
                    f"  round {number + 1}: {name} took {taken[0]:.1f} s, {taken[1]:.1f} of the processor",
                    file=sys.stderr,
                )
    rows = []
    native = "native" if models.fast_dtype() == torch.bfloat16 else "emulated"
    print(
        f"  d {x.shape[1]}, {arguments.features} features, {n // arguments.batch} steps of {arguments.batch}, ", end=""
    )
    print(f"alpha {arguments.alpha:g}, {arguments.threads} threads, bfloat16 {native}")
    print(
        f"  load before the start {load:.1f}: where it is not near 0, others compute too, and only the last rate means much"
    )
    print(
        f"  activations/s: median of {arguments.rounds}, its ratio to the first line, best; per processor second, best"
    )
    for name in arguments.only:
        found = metrics.evaluate(trained[name], other.split(4096), other.mean(0), resamples=2)
        wall, processor = zip(*seconds[name], strict=True)
        row = {"name": name, "rate": n / statistics.median(wall), "best": n / min(wall), "per_cpu": n / min(processor)}
        rows.append(row | {"seconds": seconds[name], "fvu": found.fvu, "l0": found.l0, "alive": found.alive})
        print(f"  {name:28} {row['rate']:8,.0f} {row['rate'] / rows[0]['rate']:5.2f} {row['best']:8,.0f}", end="")
        print(f" {row['per_cpu']:8,.0f}   FVU {found.fvu:.4f}   L0 {found.l0:6.1f}   alive {found.alive:.2f}")
    if arguments.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        files.write_json(arguments.out, {"settings": settings, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
