"""What lies past the laptop: tokens, bytes, GPU hours and dollars, and where the design breaks first.

    python workflow/plan.py > docs/plan.md

Arithmetic on stated assumptions; `tests/test_plan.py` holds docs/plan.md to what this prints. Change a number in
`ASSUMED` or `MEASURED`, run it again, commit both.
"""

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Model:
    """A GPT-NeoX model: number of layers and width of the residual stream."""

    name: str
    layers: int
    d: int

    @property
    def parameters(self) -> float:
        """In the blocks (no embedding, none is multiplied in a harvest): 12 d^2 per layer."""
        return 12 * self.layers * self.d**2


MODELS = (Model("70M", 6, 512), Model("410M", 24, 1024), Model("2.8B", 32, 2560), Model("12B", 36, 5120))
ACTIVATIONS = (50e6, 1e9)
#: name: (value, unit, where it comes from)
ASSUMED = {
    "alphas": (16, "dictionaries per layer", "the paper's code, bigrun0308"),
    "ratio": (2, "features per dimension", "the paper, Figure 2"),
    "context": (256, "tokens per row", "the paper's code"),
    "bytes": (2, "bytes per coordinate on disk", "fp16, the paper's code"),
    "peak": (989, "dense bf16 TFLOP/s", "data sheet of an H100 SXM; not measured here"),
    "harvest share": (0.3, "of the peak, forward pass", "assumed: short rows, small matrices at 70M do worse"),
    "training share": (0.25, "of the peak, training", "assumed: five products of a few thousand rows each, and Adam"),
    "batch": (1024, "activations per step", "the paper's code"),
    "step floor": (0.6, "ms per step at least", "assumed: some 30 kernel launches and Python, whatever the width"),
    "layer floor": (0.15, "ms per layer and 2,048 tokens at least", "assumed: the same for a forward pass"),
    "disk": (3, "GB/s read", "assumed: one NVMe disk, in order"),
    "price": (2.5, "dollars per GPU hour", "assumed: rented H100, 2025"),
    "memory": (256, "GB of main memory", "assumed: the host of one GPU"),
    "gpu memory": (80, "GB", "the same GPU"),
    "local disk": (8, "TB", "assumed: the same host"),
    "patience": (24, "hours for one model on one GPU", "assumed: what a person waits for"),
}
#: What was measured on two cores of shared machines (the last two with avx512_bf16); it sets no figure of the table.
MEASURED = {
    "tokenising": (
        212_000,
        "tokens per second, streaming included; loaded machine",
        "tests/benchmarks/bench_stream.py",
    ),
    "harvest": (3_100, "tokens per second, 12 layers of SmolLM2-135M, bf16", "tests/benchmarks/bench_harvest.py"),
    "step": (39_000, "activations per second, d 576, R 2, batch 2048, dense bf16", "tests/benchmarks/bench_step.py"),
}
A = {name: value for name, (value, _, _) in ASSUMED.items()}


def costs(model: Model, n: float) -> dict:
    """One row of the table: `n` activations of every layer of `model`, a sweep over alphas at each, one pass."""
    width = model.d
    forward = 2 * model.parameters + 2 * 2 * model.layers * A["context"] / 2 * width  # products, causal attention
    step = 2 * 5 * width * A["ratio"] * width  # five products over n_features x d
    harvest = (
        max(n * forward / (A["peak"] * 1e12 * A["harvest share"]), n / 2048 * model.layers * A["layer floor"] / 1e3)
        / 3600
    )
    per_dictionary = (
        max(n * step / (A["peak"] * 1e12 * A["training share"]), n / A["batch"] * A["step floor"] / 1e3) / 3600
    )
    training = per_dictionary * A["alphas"] * model.layers
    layer = n * width * A["bytes"]
    reading = layer / (A["disk"] * 1e9) / 3600 * A["alphas"] * model.layers
    return {
        "layer": layer,
        "all": layer * model.layers,
        "harvest": harvest,
        "training": training,
        "reading": reading,
        "hours": harvest + max(training, reading),
        "index": 4 * n,
        "tokens": 8 * n,
        "dictionary": 4 * 4 * A["ratio"] * width * width,
        "step": step,
    }


def breaks(found: dict) -> str:
    """What gives way first in this design, in the order in which a run meets it."""
    rules = (
        (found["tokens"] > 4e9, "the token table in memory (8 bytes per token): token rows to disk, read by `mmap`"),
        (
            found["all"] > A["local disk"] * 1e12,
            "the store on one disk: layers in turn, or no store: harvest and train at once",
        ),
        (found["index"] + 4e8 > 4e9, "the permutation of all rows: shuffle shards, then rows in a window of shards"),
        (
            found["layer"] > A["memory"] * 1e9,
            "shuffled reading, once a layer exceeds main memory: shuffle shards, then rows",
        ),
        (
            found["reading"] > found["training"],
            "reading once per dictionary: train the alphas side by side on one read",
        ),
        (found["dictionary"] > A["gpu memory"] * 1e9, "one dictionary on one GPU: features sharded over GPUs"),
        (found["hours"] > A["patience"], "one GPU: layers over GPUs (the SLURM fan-out), then data-parallel torchrun"),
    )
    return next((text for broken, text in rules if broken), "nothing: one GPU, one disk")


def size(n: float) -> str:
    """Bytes for people."""
    return f"{n / 1e12:,.1f} TB" if n >= 1e12 else f"{n / 1e9:,.1f} GB" if n < 1e10 else f"{n / 1e9:,.0f} GB"


def number(value: float) -> str:
    """Two digits that count, no more."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def table() -> pd.DataFrame:
    """The plan's table, as text."""
    rows = []
    for n in ACTIVATIONS:
        for model in MODELS:
            found = costs(model, n)
            rows.append({
                "Pythia": model.name,
                "activations per layer": f"{n / 1e6:,.0f} M",
                "tokens": f"{n / 1e6:,.0f} M",
                "one layer": size(found["layer"]),
                "all layers": size(found["all"]),
                "harvest, GPU h": number(found["harvest"]),
                "sweep, GPU h": number(found["training"]),
                "reading for it, h": number(found["reading"]),
                "dollars": number(found["hours"] * A["price"]),
                "what breaks first, and what replaces it": breaks(found),
            })  # fmt: skip
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGE = """# A plan on paper: past the laptop

Made by `python workflow/plan.py > docs/plan.md`; a test holds this page to that script. No GPU was at hand: every GPU figure
here is arithmetic on the assumptions below, not a measurement. A job is one harvest of every layer and one sweep ({alphas}
alphas at R = {ratio}) at each, one pass, trained one by one as the code does now. Dollars are for the harvest and the longer of
sweep and reading.

{table}

Every activation costs one token; all layers share one forward pass. A step costs five matrix products, `2 * 5 * R * d^2`
operations per activation ({step:,.0f} at 70M); a harvest `2 * 12 * layers * d^2` and the attention.

## Assumptions

{assumptions}

## Measured on two cores

{measurements}

A GPU at the assumed rate harvests 70M at {rate:,.1f} million tokens per second, {times:,.0f} times what two cores tokenise, so
there text is the bottleneck: tokenise once, to disk, on all cores (`tokens.safetensors` is that file), before the GPU is
rented.

## What breaks, in order

1. **Token rows in memory.** `corpus.make_rows` holds ids and document numbers, 8 bytes per token: {rows_few} for 50 million,
   {rows_many} for a billion. Replaced by writing rows as they fill and reading them through `mmap`; the parts of
   `saelib.streams` are most of it.
2. **The store on one disk.** {store} for a billion activations of 12B. Replaced by one layer at a time (a forward pass each),
   or by no store: a buffer of some million activations in memory that a harvest fills and training empties. Resuming byte
   for byte then needs the harvest's place in the text in every checkpoint.
3. **The permutation of all rows.** 4 bytes per row, {index} for a billion, and single rows read from all over a disk once a
   layer no longer fits the main memory that caches it. Replaced by a shuffle of the shards and, within a window of them, of
   the rows (the paper's code shuffles within one 2 GiB chunk only).
4. **Reading once per dictionary.** The alphas of a sweep are independent; trained side by side on the same batches they read
   once (the paper's code does so by vmap). On two cores that gained nothing; on a GPU with small d it fills the device.
5. **One GPU.** Layers and sites are jobs of their own. Within one dictionary: data-parallel training by `torchrun`, an
   all-reduce of the gradient per step ({gradient} at 12B and R = 2), which at batches of some thousand activations is the
   limit; so larger batches first.
6. **One dictionary on one GPU.** Weights, gradient and two moments take {whole} at 12B and R = 2, {whole_32} at R = 32: that is
   still one GPU. Beyond, features are sharded: each GPU holds a block of rows, encodes with it, and the reconstructions are
   summed; TopK needs a second exchange for the threshold.
"""


def page() -> str:
    """The whole of docs/plan.md."""
    small, large, d = costs(MODELS[0], ACTIVATIONS[0]), costs(MODELS[-1], ACTIVATIONS[-1]), MODELS[-1].d
    rate = ACTIVATIONS[0] / small["harvest"] / 3600

    def notes(values: dict, *columns: str) -> str:
        return markdown(
            pd.DataFrame([(name, f"{v:,g}", *rest) for name, (v, *rest) in values.items()], columns=columns)
        )

    return PAGE.format(
        alphas=A["alphas"],
        ratio=A["ratio"],
        table=markdown(table()),
        step=small["step"],
        assumptions=notes(ASSUMED, "assumption", "value", "unit", "why"),
        measurements=notes(MEASURED, "rate", "value", "unit", "where"),
        rate=rate / 1e6,
        times=rate / MEASURED["tokenising"][0],
        rows_few=size(8 * ACTIVATIONS[0]),
        rows_many=size(8 * ACTIVATIONS[1]),
        store=size(large["all"]),
        index=size(large["index"]),
        gradient=size(4 * A["ratio"] * d**2),
        whole=size(large["dictionary"]),
        whole_32=size(large["dictionary"] * 32 / A["ratio"]),
    )


if __name__ == "__main__":
    print(page(), end="")
