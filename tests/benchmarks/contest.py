"""The contest of bench_rivals.py and bench_frontier.py: SAELens, dictionary_learning and saelib on the same batches."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from saelib import export, files, training
from saelib.dictionaries import TopKSAE
from saelib.paths import run_dir
from saelib.store import ActivationStore
from tests.interop import environment
from tests.interop.peers import now

STORE = run_dir("laptop") / "activations" / "blocks.10.hook_resid_post"
RIVALS = {
    "saelens": {"peer": "saelens", "autocast": False},
    "saelens-autocast": {"peer": "saelens", "autocast": True},
    "dictionary_learning": {"peer": "dictionary_learning", "autocast": False},
    "dictionary_learning-autocast": {"peer": "dictionary_learning", "autocast": True},
}
OURS = {"saelib-float32": torch.float32, "saelib-bfloat16": torch.bfloat16}
LOAD = {"saelens": export.load_saelens, "dictionary_learning": export.load_dictionary_learning}


class Rows:
    """Activations in memory with all that `training.train` asks of an `ActivationStore`, and a clock."""

    def __init__(self, x: torch.Tensor):
        self.x, (self.n, self.d) = x, x.shape
        self.mean, self.scale = x.mean(0), x.square().mean().sqrt().item()
        self.folder, self.hook, self.outlier_factor, self.manifest = Path("memory"), "memory", None, {}
        self.begin = self.end = None

    def n_batches(self, size: int) -> int:
        return self.n // size

    def rows(self, index: torch.Tensor):
        return self.x[index]

    def chunks(self, size: int):
        yield from self.x.split(size)

    def batches(self, size: int, *, seed: int, start: int = 0, pin: bool = False):
        self.begin = self.begin or now()
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        for first in range(start * size, self.n // size * size, size):
            yield self.x[order[first : first + size].long()]
        self.end = now()


def activations(folder: Path, rows: int, held_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, d] and [held_out, d] from the store in `folder`, both over the root mean square of the first; or synthetic."""
    if (folder / "manifest.json").exists():
        store = ActivationStore(folder, outlier_factor=8.0)
        index = torch.randperm(store.n, generator=torch.Generator().manual_seed(0))[:rows]
        x = store.rows(index).float()
        other = next(ActivationStore(folder, "held_out", outlier_factor=8.0).chunks(held_out)).float()
        print(f"  {len(x):,} of {store.n:,} activations of {store.hook}, {len(other):,} held out")
    else:
        print(f"  NO STORE in {folder}: synthetic activations, 30 of 1,152 directions each and 16 shared dimensions")
        generator = torch.Generator().manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(1152, 576, generator=generator), dim=1)
        n = rows + held_out
        active = torch.rand(n, 1152, generator=generator) < 30 / 1152
        codes = active * torch.empty(n, 1152).exponential_(generator=generator)
        shared = torch.randn(n, 16, generator=generator) @ torch.randn(16, 576, generator=generator) / 24
        x, other = (codes @ directions + shared).split([rows, held_out])
    scale = x.square().mean().sqrt()
    return x / scale, other / scale


def train_ours(x: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, arguments) -> tuple:
    """A dictionary by `training.train`, and its seconds by the clock and of the processor."""
    config = training.TrainConfig(
        kind="topk" if arguments.k else "standard",
        ratio=arguments.features / x.shape[1],
        alpha=0.0 if arguments.k else arguments.alpha,
        k=arguments.k,
        lr=arguments.lr,
        batch_size=arguments.batch,
        passes=arguments.passes,
        warmup_steps=arguments.warmup,
        decay=arguments.decay,
        seed=arguments.seed,
        beta2=arguments.beta2,
    )
    for rows in (Rows(x[: 25 * arguments.batch]), Rows(x)):  # the first is the throwaway one
        with tempfile.TemporaryDirectory() as folder:
            dictionary, _ = training.train(rows, Rows(other), config, Path(folder), dtype=dtype)
    return dictionary, [last - first for first, last in zip(rows.begin, rows.end, strict=True)]


def train_rival(x: torch.Tensor, folder: Path, name: str, arguments) -> tuple:
    """A dictionary by the rival's own loop in its own environment, and its seconds by the clock and of the processor."""
    path = folder / f"activations-{len(x)}.safetensors"
    if not path.exists():
        save_file({"x": x}, path)
    steps = len(x) // arguments.batch * arguments.passes
    out = folder / name
    job = RIVALS[name] | {
        "activations": str(path),
        "out": str(out),
        "threads": arguments.threads,
        "n_features": arguments.features,
        "l1": x.shape[1] * arguments.alpha,
        "k": arguments.k,
        "lr": arguments.rival_lr or arguments.lr,
        "batch": arguments.batch,
        "passes": arguments.passes,
        "beta2": arguments.beta2,
        "seed": arguments.seed,
        "warmup": arguments.warmup if arguments.rival_warmup is None else arguments.rival_warmup,
        "l1_warmup": arguments.rival_l1_warmup,
        # dictionary_learning wants a step before the decay begins
        "decay": min(
            steps - 1, round(steps * (arguments.decay if arguments.rival_decay is None else arguments.rival_decay))
        ),
    }
    files.write_json(folder / "job.json", job)
    environment.run("train", folder / "job.json")
    where = out if job["peer"] == "saelens" else out / "trainer_0"
    made = load_topk(where) if arguments.k and job["peer"] == "dictionary_learning" else LOAD[job["peer"]](where)
    return made, json.loads((out / "seconds.json").read_text())


def load_topk(folder: Path) -> TopKSAE:
    """A TopK dictionary of dictionary_learning, from the tensors that peers.py leaves beside its pickle."""
    theirs = load_file(folder / "tensors.safetensors")
    made = TopKSAE(*theirs["encoder.weight"].shape, k=int(theirs["k"]))
    names = {"weight": "encoder.weight", "bias": "encoder.bias", "decoder_bias": "b_dec"}
    ours = {name: theirs[other] for name, other in names.items()}
    made.load_state_dict(ours | {"decoder": theirs["decoder.weight"].T}, strict=False)
    return made
