"""Train dictionaries: one, resumably; or a sweep over alphas, ratios and seeds."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import saelib
from saelib import dictionaries, files, metrics, steps
from saelib.dictionaries import Dictionary
from saelib.store import ActivationStore

LOG_EVERY = 25  # steps between two readings of the loss: reading waits for the device
EVALUATION_ROWS = 4096  # held-out activations of the evaluations during training


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and what is kept."""


@dataclass(frozen=True)
class TrainConfig:
    """What a trained dictionary depends on, besides the activations. The paper's values in brackets.

    kind : "tied", "untied", "standard" or "topk" ["tied"; "untied" for some MLP dictionaries].
    ratio : n_features / d [0.5 to 8; 2 in Figure 2].
    alpha : weight of the L1 term on the code's scale, see `losses.sae_loss` [8.577e-4 residual, 3.162e-4 MLP, for
        activations in the model's units; here activations are scaled to a mean square of 1 per coordinate]. 0 for "topk".
    lr : Adam's learning rate [1e-3 nominal]. Its first beta is 0.9, eps 1e-8.
    batch_size : activations per step [1024 or 2048].
    passes : passes over the activations [1, over 21 million].
    warmup_steps, decay : linear warm-up, and the share of all steps at the end over which the rate falls to 0 [0, 0].
    centre : take off the mean before encoding and add it after decoding [False].
    scale : divide by the root mean square per coordinate [False].
    seed : of the initial weights and of the order of the activations.
    k : active features of "topk", 0 for the others [not in the paper].
    frozen_step : leave Adam's step counter at its start, the defect of the paper's code (see `steps.step`) [True in effect].
    beta2 : Adam's second beta [0.999]. In a training of a few thousand steps 0.99 forgets the large first gradients sooner.
    """

    kind: str = "tied"
    ratio: float = 2.0
    alpha: float = 1e-3
    lr: float = 1e-3
    batch_size: int = 256
    passes: int = 2
    warmup_steps: int = 0
    decay: float = 0.0
    centre: bool = False
    scale: bool = True
    seed: int = 0
    k: int = 0
    frozen_step: bool = False
    beta2: float = 0.999

    def __post_init__(self):
        if self.kind not in dictionaries.KINDS:
            raise ValueError(f"kind '{self.kind}' is none of {', '.join(dictionaries.KINDS)}")
        positive = {name: getattr(self, name) for name in ("ratio", "lr", "batch_size", "passes")}
        others = {"alpha": self.alpha, "warmup_steps": self.warmup_steps}
        for name, value in (positive | others).items():
            if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
                raise ValueError(f"{name} = {value}: wants a finite number {'above' if name in positive else 'from'} 0")
        if (self.k > 0) != (self.kind == "topk") or (self.k and self.alpha):
            raise ValueError("k is for the kind 'topk', which wants k from 1 and alpha 0; the others want k = 0")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"beta2 lies between 0 and 1, not at {self.beta2}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is a share of all steps, 0 to 1, not {self.decay}")

    @property
    def name(self) -> str:
        """File stem, for example ``tied_r2_a0.003_s0``; with a short key behind it when another field is not the default."""
        stem = f"{self.kind}_r{self.ratio:g}_{f'k{self.k}' if self.k else f'a{self.alpha:g}'}_s{self.seed}"
        named = {"kind", "ratio", "alpha", "seed", "k"}
        others = {
            f.name: value for f in fields(self) if f.name not in named and (value := getattr(self, f.name)) != f.default
        }
        return f"{stem}_{files.key(others)[:6]}" if others else stem


def settings(config: TrainConfig) -> dict:
    """The fields of `config`; the last two only where they are no default, so that older dictionaries stay current."""
    later = {f.name: f.default for f in fields(config) if f.name in ("frozen_step", "beta2")}
    return {name: value for name, value in asdict(config).items() if name not in later or value != later[name]}


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate at `step` (from 0) of `total`: linear warm-up, constant, linear decay to 0."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    tail = config.decay * total
    fall = min(1.0, (total - step) / tail) if tail else 1.0
    return config.lr * min(rise, fall)


def specification(
    store: ActivationStore,
    held_out: ActivationStore,
    config: TrainConfig,
    dtype: torch.dtype,
    evaluations_per_pass: int,
) -> dict:
    """All that the written bytes depend on: settings, the manifests of both stores and our version."""
    return {
        "saelib": saelib.__version__,
        "config": settings(config),
        "dtype": str(dtype).removeprefix("torch."),
        "evaluations_per_pass": evaluations_per_pass,
        "activations": files.key(store.manifest),
        "n_rows": store.n,
        "held_out": files.key(held_out.manifest),
        "outlier_factors": [store.outlier_factor, held_out.outlier_factor],
        "evaluation_rows": EVALUATION_ROWS,
    }


def train(
    store: ActivationStore,
    held_out: ActivationStore,
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    evaluations_per_pass: int = 1,
    checkpoint_every: int = 1000,
    announce: Callable[[str], None] = print,
    position: str = "",
) -> tuple[Dictionary, dict]:
    """Train one dictionary on `store` into ``folder/<config.name>.safetensors``; return it and its description.

    The description holds the specification, ``history`` and ``metrics`` (`metrics.Evaluation`). The history has, at every
    25th step, the mean error since the last one, and sparsity and l0 of the batch; and held-out ``fvu`` and ``l0`` on
    4,096 activations, `evaluations_per_pass` times a pass.
    A finished dictionary of the same specification is loaded, not trained. A checkpoint is written every
    `checkpoint_every` steps; a killed run goes on from it and ends with the same bytes.

    An L0 at zero or above a quarter of the features is announced, as a sign of an alpha on another scale. `dtype` is that of
    the matrix products; weights and optimiser stay float32. Raises `TrainingError` with the step at
    which the loss was no longer finite; the last checkpoint before it is kept.
    """
    path = folder / f"{config.name}.safetensors"
    spec = specification(store, held_out, config, dtype, evaluations_per_pass)
    if path.with_suffix(".json").exists():
        dictionary, about = dictionaries.load(path, device=device)
        if about["spec"] == spec:
            return dictionary, about
        announce(f"stale dictionary {path.name}: trained with other settings or activations, made anew")
        path.with_suffix(".json").unlink()
    if store.n_batches(config.batch_size) == 0:
        raise TrainingError(f"batch_size {config.batch_size} is more than the {store.n} activations of {store.folder}")
    dictionary = start(store, config).to(device)
    optimiser = steps.adam(dictionary, config.lr, config.beta2)
    checkpoint = folder / f"{config.name}.checkpoint.safetensors"
    step, history = _restore(checkpoint, dictionary, optimiser, spec)
    per_pass = store.n_batches(config.batch_size)
    total = per_pass * config.passes
    n_evaluations = evaluations_per_pass * config.passes
    evaluate_at = {round(total * k / n_evaluations) for k in range(1, n_evaluations + 1)}
    evaluation = next(held_out.chunks(EVALUATION_ROWS)).to(device)
    label, errors = f"{position}{config.name}", []
    keep_every = max(checkpoint_every // LOG_EVERY, 1) * LOG_EVERY
    with tqdm(total=total, initial=step, desc=label, unit="step", mininterval=0.5, leave=False) as bar:
        while step < total:
            epoch, within = divmod(step, per_pass)
            # a new order in each pass; the paper's code reuses one permutation for every chunk
            seed = config.seed * 1_000_003 + epoch
            for x in store.batches(config.batch_size, seed=seed, start=within, pin=dictionary.mean.is_cuda):
                x = dictionary.standardise(x.to(device, non_blocking=True))
                rate = learning_rate(step, total, config)
                found = steps.step(dictionary, optimiser, x, config.alpha, dtype, rate, config.frozen_step)
                step += 1
                errors.append(found["error"])
                if step % LOG_EVERY == 0 or step == total:
                    _log(history, step, errors, found, bar, checkpoint)
                    bar.update(step - bar.n)
                    errors.clear()
                if step in evaluate_at:
                    history["held_out"].append(_held_out(step, dictionary, evaluation))
                # only right after the loss was read and found finite, so that a checkpoint is always a good one
                if not errors and step % keep_every == 0 and step < total:
                    _check_weights(dictionary, step, checkpoint)
                    _keep(checkpoint, dictionary, optimiser, spec, step, history)
    _check_weights(dictionary, step, checkpoint)
    final = metrics.evaluate(dictionary, held_out.chunks(8192), held_out.mean.to(device))
    if config.alpha and not 0 < final.l0 <= dictionary.n_features / 4:
        announce(
            f"{config.name}: {final.l0:.0f} of {dictionary.n_features} features are active. Is alpha on the scale of "
            f"the printed loss (Eq. 4), which sums over coordinates? Ours averages: divide that alpha by d = {dictionary.d}"
        )
    about = {"spec": spec, "history": history, "metrics": asdict(final)}
    dictionaries.save(dictionary, path, **about)
    checkpoint.unlink(missing_ok=True)
    return dictionary, files.read_json(path.with_suffix(".json"))


def start(store: ActivationStore, config: TrainConfig) -> Dictionary:
    """The untrained dictionary of `config`, with the store's mean and scale where asked for.

    The standard and TopK forms start at the data: decoder bias at the mean, rows (of length 0.1) at the deviations of random
    activations from it. A store with fewer activations than features leaves the other rows as they were.
    """
    generator = torch.Generator().manual_seed(config.seed)
    options = {"k": config.k} if config.kind == "topk" else {}
    n_features = round(config.ratio * store.d)
    dictionary = dictionaries.KINDS[config.kind](n_features, store.d, generator=generator, **options)
    if config.centre:
        dictionary.mean.copy_(store.mean)
    if config.scale:
        centred = store.mean.square().mean().item() if config.centre else 0.0
        dictionary.scale.fill_(math.sqrt(store.scale**2 - centred))
    if hasattr(dictionary, "decoder_bias"):
        dictionary.decoder_bias.data.copy_(dictionary.standardise(store.mean))
        drawn = torch.randperm(store.n, generator=generator)[:n_features]
        rows = 0.1 * dictionaries.unit_rows(store.rows(drawn).float() - store.mean)
        dictionary.weight.data[: len(rows)] = dictionary.decoder.data[: len(rows)] = rows
    return dictionary


def sweep(
    store: ActivationStore, held_out: ActivationStore, configs: Iterable[TrainConfig], folder: Path, **options
) -> list[dict]:
    """`train` every configuration; what is finished is not trained again. Returns one flat row per dictionary."""
    rows = []
    configs = list(configs)
    for number, config in enumerate(configs, start=1):
        _, about = train(store, held_out, config, folder, position=f"{number}/{len(configs)} ", **options)
        rows.append({"name": config.name, "hook": store.hook, **settings(config), **about["metrics"]})
    return rows


def _log(history: dict, step: int, errors: list, found: dict, bar: tqdm, checkpoint: Path) -> None:
    """Read the errors since the last call (the only wait for the device) and enter their mean into `history`."""
    read = torch.stack(errors).tolist()
    for number, error in enumerate(read):
        if not math.isfinite(error):
            raise _broken("the loss was not finite", step - len(read) + number + 1, checkpoint)
    row = {
        "step": step,
        "error": sum(read) / len(read),
        "sparsity": float(found["sparsity"]),
        "l0": float(found["l0"]),
    }
    history["train"].append(row)
    bar.set_postfix_str(f"error {row['error']:.3f}, L0 {row['l0']:.0f}", refresh=False)


def _check_weights(dictionary: Dictionary, step: int, checkpoint: Path) -> None:
    """Raise if a weight is not finite or a direction has no length: a finite loss can be followed by either."""
    lengths = dictionary.directions.detach().norm(dim=1)
    if not (all(torch.isfinite(value).all() for value in dictionary.parameters()) and lengths.min() > 0.5):
        raise _broken("the weights were no longer finite", step, checkpoint)


def _broken(what: str, step: int, checkpoint: Path) -> TrainingError:
    kept = f"the checkpoint {checkpoint} is kept" if checkpoint.exists() else "no checkpoint was written yet"
    at = f"step {step} of {checkpoint.name.removesuffix('.checkpoint.safetensors')}"
    advice = "Lower the learning rate, or look for activations that are not finite"
    return TrainingError(f"{what} at {at}; {kept}. {advice}")


@torch.inference_mode()
def _held_out(step: int, dictionary: Dictionary, x: torch.Tensor) -> dict:
    found = metrics.evaluate(dictionary, [x], x.float().mean(0), resamples=2)
    return {"step": step, "fvu": found.fvu, "l0": found.l0}


def _keep(path: Path, dictionary: Dictionary, optimiser, spec: dict, step: int, history: dict) -> None:
    """Write a checkpoint: weights and Adam's moments as safetensors, the rest as JSON in its metadata."""
    tensors = {f"weight.{name}": value.detach() for name, value in dictionary.named_parameters()}
    for name, parameter in dictionary.named_parameters():
        tensors |= {f"adam.{name}.{part}": value for part, value in optimiser.state[parameter].items()}
    head = json.dumps({"key": files.key(spec), "step": step, "history": history})
    with files.atomic(path) as temporary:
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, temporary, metadata={"head": head})


def _restore(path: Path, dictionary: Dictionary, optimiser, spec: dict) -> tuple[int, dict]:
    """Load the checkpoint at `path` if there is a whole one of the same specification; else begin at step 0."""
    with contextlib.suppress(FileNotFoundError, SafetensorError):
        with safe_open(path, "pt") as file:
            head = json.loads(file.metadata()["head"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if head["key"] == files.key(spec):
            for name, parameter in dictionary.named_parameters():
                parameter.data.copy_(tensors[f"weight.{name}"])
                parts = ("step", "exp_avg", "exp_avg_sq")
                optimiser.state[parameter] = {
                    part: tensors[f"adam.{name}.{part}"].to(parameter.device) for part in parts
                }
            return head["step"], head["history"]
    return 0, {"train": [], "held_out": []}
