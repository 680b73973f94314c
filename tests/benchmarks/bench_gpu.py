"""Harvest, training and patching on the device that `models.default_device` picks, each against its limit in the same run.

``python -m tests.benchmarks.bench_gpu [harvest] [training] [agreement] [--quick]``; without names all three. `bench_patch`
takes the same device. Models are GPT-NeoX of the exact shapes of Pythia-70M and 410M with random weights, activations are made
up: rates depend on shapes alone. Settings are those of the profiles paper-70m and paper-410m (float16 on disk, products in
float32).

Harvest: all hooks of the profile, written to disk, against the bare forward of the same blocks on the same batches.
Training: `training.train` from a store on disk, against the same steps on activations that are on the device already (what
streaming costs), and against autograd with torch's Adam. A profiler looks at 200 steps in the middle of a training.
Agreement: the same short training and the same harvest on the CPU and on the device.
"""

import argparse
import collections
import itertools
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging

from saelib import activations, dictionaries, files, losses, metrics, models, steps, training
from saelib.corpus import TokenRows
from saelib.store import ActivationStore
from tests import standin
from tests.benchmarks.timing import interleaved, report

DEVICE = models.default_device()
#: layers, width, heads, hooks of the profile, ratio, alpha, batch
SHAPES = {
    "70M": (6, 512, 8, [*(f"blocks.{n}.hook_resid_post" for n in range(6)), "blocks.1.mlp.hook_post"], 2, 8.577e-4, 1024),
    "410M": (24, 1024, 16, [*(f"blocks.{n}.hook_resid_post" for n in (3, 5, 7, 11, 15, 19, 23)), "blocks.11.hook_mlp_out"],
             4, 1e-4, 256),
}  # fmt: skip
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def waited(function):
    """`function`, ending when the device has done it."""

    def call():
        function()
        wait()

    return call


def save_model(folder: Path, layers: int, d: int, heads: int) -> str:
    config = GPTNeoXConfig(
        vocab_size=50_304, hidden_size=d, intermediate_size=4 * d, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    standin.make_tokenizer().save_pretrained(folder)
    return str(folder)


def token_rows(n: int) -> TokenRows:
    tokens = torch.randint(1, 1000, (n, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    return TokenRows(tokens, tokens[:0], tokens[:0], tokens[:0], spec={})


def harvest(place: Path, name: str, n_rows: int, rounds: int) -> None:
    layers, d, heads, hooks, *_ = SHAPES[name]
    model, rows, folder = save_model(place / name, layers, d, heads), token_rows(n_rows), place / "activations"
    config = {"num_hidden_layers": 1 + max(int(hook.split(".")[1]) for hook in hooks), "dtype": DTYPE}
    bare = AutoModelForCausalLM.from_pretrained(model, **config).to(DEVICE).eval().base_model
    ways = {compatibility: activations.forward_for(model, dtype=DTYPE, device=DEVICE, compatibility=compatibility)(hooks)
            for compatibility in (False, True)}  # fmt: skip

    @torch.inference_mode()
    def limit():
        for part in rows.train.split(activations.BATCH):
            bare(part.to(DEVICE), use_cache=False)

    def run(compatibility: bool, **options):
        forward = ways[compatibility]
        activations.harvest(rows, hooks, folder, lambda _: forward, dtype=DTYPE, first_position=0, **options)

    def heard():
        for part in rows.train.split(activations.BATCH):
            ways[False](part, lambda hook, values: None)

    functions = {"bare forward (the limit)": limit, "forward with hooks heard": heard}
    functions |= {
        "saelib harvest, raw": lambda: run(False),
        "saelib harvest, the paper's coordinates": lambda: run(True),
    }
    seconds = interleaved(
        {label: waited(function) for label, function in functions.items()}, rounds, 1,
        lambda: shutil.rmtree(folder, ignore_errors=True),
    )  # fmt: skip
    run(False)
    paths = [path for hook in hooks for path in sorted((folder / hook).glob("train*"))]
    gigabytes = sum(path.stat().st_size for path in paths) / 1e9
    print(f"  {name}: {n_rows} rows of 256, {len(hooks)} hooks, {gigabytes:.2f} GB written, {DTYPE}")
    report(seconds, "bare forward (the limit)", rows.train.numel(), "tokens")
    ours = sorted(seconds["saelib harvest, raw"])[rounds // 2]
    print(f"  {'written':42} {gigabytes / ours:12.2f} GB/s")
    shards = [load_file(path) for path in paths]
    begin = time.perf_counter()
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"again-{number}")
        files.sha256(folder / f"again-{number}")
    print(f"  {'writing and hashing alone, one thread':42} {gigabytes / (time.perf_counter() - begin):12.2f} GB/s")
    shutil.rmtree(folder)


def make_store(folder: Path, n: int, d: int, rows_per_shard: int = 32_768) -> None:
    """A store of `n` training and 16,384 held-out made-up activations: sparse sums of 4 d directions."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    features = torch.randn(4 * d, d, generator=generator, device=DEVICE)
    manifest = {
        "spec": {"hook": "made", "dtype": "float16", "first_position": 0},
        "d": d,
        "complete": True,
        "shards": {},
    }
    sizes = [("train", number, rows_per_shard) for number in range(n // rows_per_shard)] + [("held_out", 0, 16_384)]
    for split, number, size in sizes:
        strength = torch.rand(size, 4 * d, generator=generator, device=DEVICE)
        strength = (strength - 0.99).relu_().mul_(100)
        values = (strength @ features / (4 * d * 0.01 / 3) ** 0.5).half().cpu()
        path = folder / activations.shard_name(split, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"activations": values, "norm": values.float().norm(dim=1)}, path)
        manifest["shards"][path.name] = {"rows": size, "sha256": files.sha256(path)}
    files.write_json(folder / "manifest.json", manifest)


def train(place: Path, name: str, n: int, rounds: int, quick: bool) -> None:
    _, d, _, _, ratio, alpha, batch = SHAPES[name]
    make_store(place / "made" / name, n, d)
    store, held_out = (
        ActivationStore(place / "made" / name, split, outlier_factor=1e6) for split in activations.SPLITS
    )
    config = training.TrainConfig(ratio=ratio, alpha=alpha, batch_size=batch, passes=1, scale=False)
    there = store.rows(torch.arange(store.n)).to(DEVICE)
    made = {key: training.start(store, config).to(DEVICE) for key in ("stream", "there", "autograd")}
    adam = {key: steps.adam(made[key], config.lr) for key in ("stream", "there")}
    plain = torch.optim.Adam(made["autograd"].parameters(), lr=config.lr)

    def loop(key: str, batches):
        errors = []
        for number, x in enumerate(batches, start=1):
            x = made[key].standardise(x.to(DEVICE, non_blocking=True))
            errors.append(steps.step(made[key], adam[key], x, alpha, torch.float32, config.lr)["error"])
            if number % training.LOG_EVERY == 0:
                torch.stack(errors).tolist()
                errors.clear()

    def autograd():
        for x in there.split(batch):
            plain.zero_grad()
            x = made["autograd"].standardise(x)
            code = made["autograd"].encode(x)
            losses.sae_loss(x, made["autograd"].decode(code), code, alpha)[0].backward()
            plain.step()

    def whole():
        training.train(store, held_out, config, place / "out", device=DEVICE, announce=lambda text: None)

    pin = DEVICE.type == "cuda"
    limit = "steps, activations on the device (the limit)"
    functions = {limit: lambda: loop("there", there.split(batch))}
    functions["steps, streamed from disk"] = lambda: loop("stream", store.batches(batch, seed=0, pin=pin))
    functions["reading windows alone"] = lambda: collections.deque(store.batches(batch, seed=0, pin=pin), maxlen=0)
    functions["training.train, whole"] = whole
    functions["autograd and torch's Adam, on the device"] = autograd
    seconds = interleaved(
        {label: waited(function) for label, function in functions.items()}, rounds, 1,
        lambda: shutil.rmtree(place / "out", ignore_errors=True),
    )  # fmt: skip
    print(f"  {name}: d {d}, R {ratio}, batch {batch}, {n:,} activations, {n // batch} steps, products in float32")
    report(seconds, limit, n, "activations")
    median = sorted(seconds[limit])[rounds // 2]
    print(f"  {'one step':42} {1e3 * median / (n // batch):12.3f} ms")
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        whole()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        print(f"  {'peak device memory of training.train':42} {peak:12.0f} MB")
        shutil.rmtree(place / "out")
    profile(whole, skip=20 if quick else 200, steps_seen=25 if quick else 200)
    shutil.rmtree(place / "made" / name)
    shutil.rmtree(place / "out")


def profile(run, *, skip: int, steps_seen: int) -> None:
    """Look at `steps_seen` steps of the training `run`, from step `skip` on: waits, copies and kernels per step."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    seen, step, number, clock = torch.profiler.profile(activities=kinds), steps.step, itertools.count(), [0.0, 0.0]

    def counted(*arguments, **options):
        now = next(number)
        if now in (skip, skip + steps_seen):
            wait()
            if now == skip:
                seen.start()
            clock[now > skip] = time.perf_counter()
            if now > skip:
                seen.stop()
        return step(*arguments, **options)

    steps.step = counted
    try:
        run()
    finally:
        steps.step = step
    counts, busy = collections.Counter(), 0.0
    for event in seen.events():
        counts[event.name.split(" (")[0]] += 1
        if event.device_type == torch.autograd.DeviceType.CUDA and "Memcpy" not in event.name:
            busy += event.time_range.elapsed_us()
    wanted = ("Memcpy HtoD", "Memcpy DtoH", "Memcpy DtoD", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize",
              "cudaHostAlloc", "cudaMalloc", "cudaLaunchKernel", "aten::item", "aten::_local_scalar_dense")  # fmt: skip
    print(f"  per step, over {steps_seen} steps (the loss is read every {training.LOG_EVERY}):")
    print("   ", ", ".join(f"{name} {counts[name] / steps_seen:.2f}" for name in wanted if counts[name]))
    if busy:
        wall = (clock[1] - clock[0]) * 1e6
        print(
            f"    kernels {busy / steps_seen:.0f} us of {wall / steps_seen:.0f} us: idle {1 - busy / wall:.0%} (profiled)"
        )


def agreement(place: Path, n: int) -> None:
    """The CPU and the device: held-out FVU of the same short training, and one harvest in float32."""
    make_store(place / "made" / "both", n, 512)
    store, held_out = (
        ActivationStore(place / "made" / "both", split, outlier_factor=1e6) for split in activations.SPLITS
    )
    for kind, options in {"tied": {}, "untied": {}, "standard": {}, "topk": {"k": 32, "alpha": 0.0}}.items():
        config = training.TrainConfig(kind=kind, **{"alpha": 8.577e-4, "batch_size": 1024, "passes": 1} | options)
        found = [training.train(store, held_out, config, place / f"on {device}", device=device, announce=lambda text: None)[1]
                 for device in ("cpu", DEVICE)]  # fmt: skip
        one, two = (about["metrics"]["fvu"] for about in found)
        print(f"  {kind:10} FVU on the CPU {one:.5f}, on {DEVICE.type} {two:.5f}: apart by {abs(two / one - 1):.2%}")
    dictionary = dictionaries.load(place / "on cpu" / f"{config.name}.safetensors", device=DEVICE)[0]
    again = metrics.evaluate(dictionary, held_out.chunks(8192), held_out.mean.to(DEVICE)).fvu
    print(f"  {'the CPU dictionary evaluated there':36} apart by {abs(again / one - 1):.2e}")
    model, rows = save_model(place / "both", *SHAPES["70M"][:3]), token_rows(16)
    hooks = SHAPES["70M"][3]
    for dtype in (torch.float32, DTYPE):
        kept = [activations.harvest(rows, hooks, place / f"{device} {dtype}",
                                    activations.forward_for(model, dtype=kind, device=device), dtype=kind)
                for device, kind in (("cpu", torch.float32), (DEVICE, dtype))]  # fmt: skip
        worst = 0.0
        for hook in hooks:
            a, b = (load_file(next(part[hook].glob("train-*.safetensors")))["activations"].float() for part in kept)
            worst = max(worst, ((a - b).norm() / a.norm()).item())
        print(f"  harvest on {DEVICE.type} in {dtype} against the CPU in float32: |a - b| / |a| up to {worst:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["harvest", "training", "agreement"])
    parser.add_argument("--quick", action="store_true", help="sizes that only show that all of it runs")
    parser.add_argument("--only", choices=SHAPES, help="one of the two shapes")
    chosen = parser.parse_args()
    logging.disable_progress_bar()
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"  {where}, torch {torch.__version__}, {torch.get_num_threads()} threads of the host", flush=True)
    place, quick = Path(tempfile.mkdtemp()), chosen.quick
    try:
        for name in [chosen.only] if chosen.only else SHAPES:
            if "harvest" in chosen.parts:
                harvest(place, name, 8 if quick else 512 if name == "70M" else 256, 1 if quick else 3)
            if "training" in chosen.parts:
                n = 65_536 if quick else 1_048_576 if name == "70M" else 524_288
                train(place, name, n, 1 if quick else 3, quick)
        if "agreement" in chosen.parts:
            agreement(place, 65_536 if quick else 262_144)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
