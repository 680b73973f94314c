"""Harvest: run text through the model once and write the activations of several hooks to disk, resumably."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import saelib
from saelib import files, models
from saelib.corpus import TokenRows

SPLITS = ("train", "held_out")
BATCH = 8  # rows per forward pass; part of the specification, since the last digits of a result depend on it


class HarvestError(RuntimeError):
    """The activations on disk cannot be used or made; the message says which file and why."""


def shard_name(split: str, number: int) -> str:
    """File name of a shard: ``train-00000.safetensors``."""
    return f"{split}-{number:05d}.safetensors"


def plan(rows: TokenRows, rows_per_shard: int) -> list[tuple[str, int, int, int]]:
    """The shards of a harvest as (split, number, first row, row after the last)."""
    shards = []
    for split in SPLITS:
        n = len(getattr(rows, split))
        starts = range(0, n, rows_per_shard)
        shards += [(split, number, start, min(n, start + rows_per_shard)) for number, start in enumerate(starts)]
    return shards


def specification(
    rows: TokenRows, hook: str, *, coordinates: str, dtype: str, first_position: int, rows_per_shard: int
):
    """What the activations of one hook depend on. Other hooks of the same run are no part of it."""
    return {
        "saelib": saelib.__version__,
        "torch": torch.__version__.split("+")[0],
        "hook": hook,
        "coordinates": coordinates,
        "dtype": dtype,
        "first_position": first_position,
        "rows_per_shard": rows_per_shard,
        "batch": BATCH,
        "rows": {split: list(getattr(rows, split).shape) for split in SPLITS},
        "tokens": rows.spec,
    }


def harvest(
    rows: TokenRows,
    hooks: list[str],
    folder: Path,
    make_forward: Callable[[list[str]], models.Forward],
    *,
    coordinates: str = "raw",
    dtype: torch.dtype = torch.float32,
    first_position: int = 1,
    rows_per_shard: int = 128,
    known: Path | None = None,
    announce: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Write the activations of `hooks` on all `rows` to ``folder/<hook>/`` and return the folder of each hook.

    One forward pass serves all hooks. A shard [rows * positions, d] is written to a temporary name, renamed, and only
    then entered with its hash into ``manifest.json``; killed at any moment and called again, the harvest goes on at
    the first shard that is not entered and ends with the same bytes as an undisturbed run. Activations made with another
    specification are announced and made anew. Hooks that are already complete cost nothing.

    Parameters
    ----------
    rows : token rows of both splits, int32 [n_rows, context].
    make_forward : from the hooks still needed to the forward function of `models.bare_forward` or
        `models.bridge_forward`; see `forward_for`. Not called when all is current.
    first_position : positions before this one are left out. 1 for the bundled model, whose first position is an
        outlier; the paper's code keeps all (0).
    dtype : how activations are stored; bfloat16 or float16 halve the disk space.
    rows_per_shard : token rows per shard; 128 rows of 256 tokens at d = 576 are 38 MB in 16 bits.
    known : the folder of another harvest of the same model and text, such as notebook 01's: its shards of the same rows in the
        same layout are taken from there (as links), not computed.

    Raises `files.DiskFull` and leaves no half shard; `HarvestError` when activations overflow `dtype`.
    """
    name = str(dtype).removeprefix("torch.")
    settings = {"coordinates": coordinates, "dtype": name, "first_position": first_position}
    manifests = {}
    for hook in dict.fromkeys(hooks):
        spec = specification(rows, hook, rows_per_shard=rows_per_shard, **settings)
        manifests[hook] = _open_manifest(folder / hook / "manifest.json", spec, announce)
    shards = plan(rows, rows_per_shard)
    if known is not None:
        for hook, manifest in manifests.items():
            _take_over(known, folder / hook, manifest, rows, shards)
    missing = {
        shard: [hook for hook, manifest in manifests.items() if shard_name(*shard[:2]) not in manifest["shards"]]
        for shard in shards
    }
    needed = [hook for hook in manifests if any(hook in hooks for hooks in missing.values())]
    if needed:
        forward = make_forward(needed)
        context = rows.train.shape[1]
        done = sum((stop - start) * context for (_, _, start, stop), hooks in missing.items() if not hooks)
        total = sum((stop - start) * context for _, _, start, stop in shards)
        bar = tqdm(total=total, initial=done, desc=f"harvest {len(needed)} hooks", unit="tok", unit_scale=True)
        # One set of buffers, used again and again: on a CPU fresh memory costs more than the copy into it. The files of a
        # shard are hashed and written side by side while no forward pass runs: a thread beside it would hold up every product.
        buffer = {}
        with bar, ThreadPoolExecutor(8) as writers:
            for (split, number, start, stop), wanted in ((s, w) for s, w in missing.items() if w):
                for first in range(start, stop, BATCH):
                    tokens = getattr(rows, split)[first : min(first + BATCH, stop)]

                    def take(hook, values, place=first - start):
                        values, gpu = values[:, first_position:], values.is_cuda
                        if hook not in buffer:
                            shape = (rows_per_shard, *values.shape[1:])
                            buffer[hook] = tuple(
                                torch.empty(size, dtype=kind, pin_memory=gpu)
                                for size, kind in ((shape, dtype), (shape[:2], torch.float32))
                            )
                        kept, norm = (whole[place : place + len(values)] for whole in buffer[hook])
                        if gpu:  # queued behind the forward pass; waited for once per shard
                            values = values.to(dtype)
                            kept.copy_(values, non_blocking=True)
                        else:
                            values = kept.copy_(values)
                        norm.copy_(values.float().norm(dim=2), non_blocking=gpu)

                    forward(tokens, take)
                    bar.update(tokens.numel())

                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                name, n_rows = shard_name(split, number), stop - start
                jobs = []
                for hook in wanted:
                    values, norm = (whole[:n_rows].flatten(0, 1) for whole in buffer[hook])
                    jobs.append(
                        writers.submit(_write_shard, folder / hook, name, values, norm, manifests[hook], len(shards))
                    )
                for job in jobs:
                    job.result()
    return {hook: folder / hook for hook in manifests}


def _open_manifest(path: Path, spec: dict, announce: Callable[[str], None]) -> dict:
    """The stored manifest if it fits `spec`, else a fresh one; what does not fit is deleted, never mixed in."""
    if path.exists():
        manifest = files.read_json(path)
        if files.key(manifest["spec"]) == files.key(spec):
            return manifest
        differ = [name for name in spec if manifest["spec"].get(name) != spec[name]]
        announce(f"stale activations at {path.parent.name} ({', '.join(differ)} changed): made anew")
        shutil.rmtree(path.parent)
    return {"spec": spec, "d": None, "complete": False, "shards": {}}


def _take_over(known: Path, folder: Path, manifest: dict, rows: TokenRows, shards: list[tuple]) -> None:
    """Link what the harvest in `known` has of the missing `shards` into `folder` and enter it in the manifest."""
    head, table = known / folder.name / "manifest.json", known / "tokens.safetensors"
    if known == folder.parent or not (head.exists() and table.exists()):
        return

    def layout(spec: dict) -> dict:
        """A specification without what says how many rows there are."""
        tokens = {name: value for name, value in spec["tokens"].items() if name not in ("n_train", "n_held_out")}
        return {name: value for name, value in spec.items() if name != "rows"} | {"tokens": tokens}

    other, theirs = files.read_json(head), load_file(table)
    if files.key(layout(other["spec"])) != files.key(layout(manifest["spec"])):
        return
    for split, number, start, stop in shards:
        name, own = shard_name(split, number), getattr(rows, split)[start:stop]
        same = torch.equal(theirs[split][start : start + manifest["spec"]["rows_per_shard"]], own)
        if name in manifest["shards"] or name not in other["shards"] or not same:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        try:
            (folder / name).hardlink_to(known / folder.name / name)
        except OSError:  # another disk
            with files.atomic(folder / name) as temporary:
                shutil.copyfile(known / folder.name / name, temporary)
        _enter(folder, name, other["shards"][name], other["d"], manifest, len(shards))


def _write_shard(folder: Path, name: str, values: torch.Tensor, norm: torch.Tensor, manifest: dict, n_shards: int):
    """Write one shard (activations [n, d], norms [n]), then enter it in the manifest; the last of `n_shards` completes it."""
    if not torch.isfinite(norm).all():
        raise HarvestError(f"{folder / name}: activations are not finite in {values.dtype}; store them wider")
    with files.atomic(folder / name) as temporary:
        save_file({"activations": values, "norm": norm}, temporary)
        digest = files.sha256(temporary)
    _enter(folder, name, {"rows": len(values), "sha256": digest}, values.shape[1], manifest, n_shards)


def _enter(folder: Path, name: str, entry: dict, d: int, manifest: dict, n_shards: int) -> None:
    manifest["d"], manifest["shards"][name] = d, entry
    manifest["complete"] = len(manifest["shards"]) == n_shards
    files.write_json(folder / "manifest.json", manifest)


def forward_for(
    name: str, *, dtype: torch.dtype, device, compatibility: bool = False
) -> Callable[[list[str]], models.Forward]:
    """The `make_forward` of `harvest` for a model name: the bare path in raw coordinates, the bridge in the paper's."""
    if compatibility:
        return lambda hooks: models.bridge_forward(
            models.load_model(name, device=device, dtype=dtype, compatibility=True), hooks
        )
    return lambda hooks: models.bare_forward(name, hooks, device=device, dtype=dtype)
