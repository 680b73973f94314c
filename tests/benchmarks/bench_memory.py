"""Peak memory of harvest and of training, for one and for eight times the tokens; and of training on 50 million activations.

The 50 million are a store of sparse files: zeros that take no disk, read like any other. The statistics that would read all
of it once are given; 300 steps are taken.
"""

import json
import subprocess
import sys

PROGRAM = """
import json, sys, tempfile
from pathlib import Path
import torch
from saelib import activations, models, store, training
from saelib.corpus import TokenRows
what, n_rows = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
tokens = torch.randint(1000, 40_000, (n_rows, 256), dtype=torch.int32)
rows = TokenRows(tokens, tokens[:16], tokens, tokens[:16], spec={})
if what == "harvest":
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(12)]
    forward = models.bare_forward("smollm2-135m-instruct", hooks, dtype=models.fast_dtype())
else:  # random activations: what is measured is the store and the training
    hooks, dtype = ["blocks.0.hook_resid_post"], torch.bfloat16
    forward = lambda tokens, take: take(hooks[0], torch.randn(*tokens.shape, 576))
with tempfile.TemporaryDirectory() as folder:
    folders = activations.harvest(rows, hooks, Path(folder), lambda _: forward, dtype=torch.bfloat16)
    if what == "training":
        train, held_out = (store.ActivationStore(folders[hooks[0]], split) for split in activations.SPLITS)
        config = training.TrainConfig(batch_size=2048)
        training.train(train, held_out, config, Path(folder), dtype=models.fast_dtype())
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps(int(peak.split()[1]) / 1e6))
"""

SPARSE = """
import json, struct, tempfile
from pathlib import Path
import torch
from saelib import files, models, store, training
N, D, SHARD = 50_000_000, 512, 2**15
torch.set_num_threads(2)
with tempfile.TemporaryDirectory() as place:
    folder = Path(place)

    def write(split, n):
        shards = {}
        for number, first in enumerate(range(0, n, SHARD)):
            rows = min(SHARD, n - first)
            parts, end = {}, 0
            for name, kind, shape in (("activations", "F16", [rows, D]), ("norm", "F32", [rows])):
                size = rows * (2 * D if name == "activations" else 4)
                parts[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
                end += size
            head = json.dumps(parts).encode()
            head += b" " * (-len(head) % 8)
            path = folder / f"{split}-{number:05d}.safetensors"
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", len(head)) + head)
                file.truncate(8 + len(head) + end)
            shards[path.name] = {"rows": rows, "sha256": "not asked for"}
        known = {"shards": {name: entry["sha256"] for name, entry in shards.items()}, "scale": 1.0, "mean": [0.0] * D}
        files.write_json(folder / f"statistics-{split}-None-{n}.json", known)
        return shards

    shards = write("train", N) | write("held_out", SHARD)
    spec = {"hook": "made", "dtype": "float16"}
    files.write_json(folder / "manifest.json", {"spec": spec, "d": D, "complete": True, "shards": shards})
    options = {"outlier_factor": None, "verify": False}
    train, held_out = (store.ActivationStore(folder, split, **options) for split in ("train", "held_out"))
    step, taken = training.steps.step, []

    def counted(*arguments):
        taken.append(1)
        if len(taken) > 300:
            raise KeyboardInterrupt
        return step(*arguments)

    training.steps.step = counted
    try:
        training.train(train, held_out, training.TrainConfig(batch_size=1024, scale=False), folder, dtype=models.fast_dtype())
    except KeyboardInterrupt:
        assert train.n == N and len(taken) == 301
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps(int(peak.split()[1]) / 1e6))
"""


def peak(*arguments: str) -> float:
    """Gigabytes at most resident of a Python program that prints them last."""
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    for what, sizes in (("harvest", (32, 256)), ("training", (400, 3200))):
        for n_rows in sizes:
            found = peak(PROGRAM, what, str(n_rows))
            print(f"  {what:9} {n_rows * 256:>9,} tokens: {found:.2f} GB at most resident (limit 3 GB)")
    print(f"  training on 50,000,000 x 512 fp16 of sparse files: {peak(SPARSE):.2f} GB at most resident (limit 4 GB)")


if __name__ == "__main__":
    main()
