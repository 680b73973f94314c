"""ActivationStore: harvested activations read back, shuffled over all shards in bounded memory, with statistics."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from saelib import files
from saelib.activations import SPLITS, HarvestError
from saelib.paths import require

WINDOW = 65_536  # rows gathered at once while shuffling: 75 MB at d = 576 in 16 bits


class ActivationStore:
    """One split of the activations of one hook, memory-mapped.

    Rows whose norm exceeds ``outlier_factor`` times the median norm are left out (the bundled model has a few attention
    sinks a hundred times longer than the rest); how many is in ``n_left_out``. ``outlier_factor=None`` keeps all.
    ``n_rows`` takes the first of the kept rows only.

    Attributes: ``n`` kept rows, ``d`` width, ``hook``, ``mean`` [d] float32, ``scale`` float: the root mean square per
    coordinate around zero, sqrt(mean(x^2)), in the model's units.

    Raises `MissingArtefact` when nothing was harvested and `HarvestError` naming the shard that is incomplete, truncated
    or altered.
    """

    def __init__(
        self,
        folder: Path,
        split: str = "train",
        *,
        outlier_factor: float | None = 10.0,
        n_rows: int | None = None,
        verify: bool = True,
    ):
        self.manifest = files.read_json(require(folder / "manifest.json", "01_collect_activations"))
        if not self.manifest["complete"]:
            raise HarvestError(
                f"{folder}: the harvest was not finished. Run notebook 01 again: it goes on where it stopped"
            )
        self.folder, self.split, self.outlier_factor = folder, split, outlier_factor
        self.hook, self.d = self.manifest["spec"]["hook"], self.manifest["d"]
        self.dtype = getattr(torch, self.manifest["spec"]["dtype"])
        self.first_position = self.manifest["spec"]["first_position"]
        shards = {name: entry for name, entry in self.manifest["shards"].items() if name.startswith(split + "-")}
        if not shards:
            raise HarvestError(f"{folder} holds no shards of the split '{split}'; splits are {', '.join(SPLITS)}")
        self.shards = [folder / name for name in sorted(shards)]
        for path in self.shards:
            check_shard(path, shards[path.name], deep=verify)
        self.starts = torch.tensor([0] + [shards[path.name]["rows"] for path in self.shards]).cumsum(0)
        norms = torch.cat([self._tensor(path, "norm") for path in self.shards])
        self.median_norm = norms.median().item()
        limit = float("inf") if outlier_factor is None else outlier_factor * self.median_norm
        self.n_left_out = int((norms > limit).sum())
        # positions of the kept rows; None where all are kept, so that a large store needs no index
        self.kept = (norms <= limit).nonzero()[:, 0] if self.n_left_out else None
        self.n = len(norms) - self.n_left_out
        if n_rows is not None and n_rows > self.n:
            raise HarvestError(
                f"{folder} has {self.n:,} activations of the split '{split}', fewer than the {n_rows:,} asked for"
            )
        self.n = n_rows or self.n
        self.mean, self.scale = self._statistics()

    def __len__(self) -> int:
        return self.n

    @staticmethod
    def _tensor(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def _statistics(self) -> tuple[torch.Tensor, float]:
        cached = self.folder / f"statistics-{self.split}-{self.outlier_factor}-{self.n}.json"
        shards = {path.name: self.manifest["shards"][path.name]["sha256"] for path in self.shards}
        if cached.exists() and (stored := files.read_json(cached))["shards"] == shards:
            return torch.tensor(stored["mean"], dtype=torch.float32), stored["scale"]
        total, squares = torch.zeros(self.d, dtype=torch.float64), 0.0
        for chunk in self.chunks(16_384):
            total += chunk.double().sum(0)
            squares += chunk.double().square().sum().item()
        mean, scale = total / self.n, (squares / (self.n * self.d)) ** 0.5
        files.write_json(cached, {"shards": shards, "scale": scale, "mean": mean.tolist()})
        return mean.float(), scale

    def rows(self, index: torch.Tensor, *, pin: bool = False) -> torch.Tensor:
        """Activations [len(index), d] of the kept rows `index`, in that order, in the stored dtype.

        Reads shard by shard, so that no more than one shard is mapped at a time. With `pin` into page-locked memory, from
        which a GPU reads by itself. By NumPy: `batches` calls it in a thread, and while a thread lives that ran an operation of
        torch's, with OpenMP helpers of its own, a training step of the main thread takes 1.1 to 1.6 times as long (measured).
        """
        place = index.numpy() if self.kept is None else self.kept.numpy()[index.numpy()]
        order = place.argsort(kind="stable")
        place = place[order]
        bounds = np.searchsorted(place, self.starts.numpy())
        result = torch.empty(len(index), self.d, dtype=self.dtype, pin_memory=pin)
        to = result.view(torch.uint8).numpy()
        for path, start, (first, last) in zip(self.shards, self.starts[:-1].tolist(), pairwise(bounds), strict=True):
            if first < last:
                rows = self._tensor(path, "activations").view(torch.uint8).numpy()
                to[order[first:last]] = rows[place[first:last] - start]
        return result

    def chunks(self, size: int, limit: int | None = None) -> Iterator[torch.Tensor]:
        """All kept rows (or the first `limit`) in order, `size` at a time."""
        end = self.n if limit is None else min(limit, self.n)
        for start in range(0, end, size):
            yield self.rows(torch.arange(start, min(end, start + size)))

    def batches(self, size: int, *, seed: int, start: int = 0, pin: bool = False) -> Iterator[torch.Tensor]:
        """One pass over all kept rows in random order, [size, d] each; the last incomplete batch is dropped.

        A permutation of all rows is drawn from `seed`; windows of it are gathered, one ahead in a thread, so memory is two
        windows plus four bytes per row; `pin` as in `rows`. ``start`` skips that many batches and gives just what an
        undisturbed pass would.
        """
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        per_window = max(1, WINDOW // size) * size
        end = self.n // size * size
        firsts = list(range(start * size, end, per_window))

        def gather(first: int) -> torch.Tensor:
            return self.rows(order[first : min(end, first + per_window)], pin=pin)

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(gather, firsts[0]) if firsts else None
            for number in range(len(firsts)):
                window = ahead.result()
                if number + 1 < len(firsts):
                    ahead = pool.submit(gather, firsts[number + 1])
                yield from window.split(size)

    def n_batches(self, size: int) -> int:
        """Batches in one pass."""
        return self.n // size


def check_shard(path: Path, entry: dict, *, deep: bool) -> None:
    """Raise `HarvestError` naming the shard when it is missing, or (``deep``) when its hash is not the manifest's."""
    advice = "delete the folder of this hook and run notebook 01 again"
    if not path.exists():
        raise HarvestError(f"shard {path} is missing: {advice}")
    if deep and files.sha256(path) != entry["sha256"]:
        raise HarvestError(f"shard {path} was truncated or altered (its hash is not the manifest's): {advice}")
