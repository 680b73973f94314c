"""Peak memory of harvest and of training, for one and for eight times the tokens."""

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


def main():
    for what, sizes in (("harvest", (32, 256)), ("training", (400, 3200))):
        for n_rows in sizes:
            command = [sys.executable, "-c", PROGRAM, what, str(n_rows)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak = json.loads(done.stdout.splitlines()[-1])
            print(f"  {what:9} {n_rows * 256:>9,} tokens: {peak:.2f} GB at most resident (limit 3 GB)")


if __name__ == "__main__":
    main()
