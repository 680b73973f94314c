"""Runs inside data/interop-venv, without saelib: loads, saves and trains with SAELens and dictionary_learning themselves.

peers.py exchange FOLDER    read what we exported below FOLDER, write what they give; write folders of theirs
peers.py train JOB.json     train as the job says and write the folder and the seconds (tests/benchmarks/bench_rivals.py)
"""

import contextlib
import json
import sys
import time
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def dictionary_learning():
    """The package without nnsight and zstandard, which it imports but needs only for language models and their texts."""
    import datasets  # noqa: F401 (looks zstandard up, so it comes before the stand-in)

    for name in ("nnsight", "zstandard"):
        sys.modules.setdefault(name, types.ModuleType(name)).LanguageModel = object
    import dictionary_learning.training
    import dictionary_learning.utils
    from dictionary_learning.trainers.standard import StandardTrainer

    return dictionary_learning, StandardTrainer


# --- exchange ---


@torch.no_grad()
def exchange(folder: Path) -> None:
    """For each ``ours/<format>/<name>`` write ``<name>.safetensors`` beside it; write ``theirs/<format>/<name>`` likewise."""
    x = load_file(folder / "x.safetensors")["x"]
    for path in (path for path in (folder / "ours" / "saelens").iterdir() if path.is_dir()):
        from sae_lens import SAE

        sae = SAE.load_from_disk(path)
        report(path, x, sae)
        assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post" and sae.cfg.metadata.alpha == 1e-3
    package, _ = dictionary_learning()
    for path in (path for path in (folder / "ours" / "dictionary_learning").iterdir() if path.is_dir()):
        report(path, x, package.utils.load_dictionary(path, "cpu")[0])  # calls AutoEncoder.from_pretrained
    torch.manual_seed(0)
    saelens_folders(folder / "theirs" / "saelens", x)
    with torch.enable_grad():
        dictionary_learning_folder(folder / "theirs" / "dictionary_learning", x)


def report(path: Path, x: torch.Tensor, peer, times: torch.Tensor | float = 1.0) -> None:
    """Codes, each multiplied by its entry of `times` (the length of its decoder row), and reconstructions of `peer`."""
    code = peer.encode(x)
    found = {"code": (code * times).contiguous(), "x_hat": peer.decode(code).contiguous()}
    save_file({name: value.detach() for name, value in found.items()}, path.with_suffix(".safetensors"))


def saelens_folders(folder: Path, x: torch.Tensor) -> None:
    """Standard and TopK with decoder rows of length 0.2 to 2, as training leaves them and in the form for inference."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

    shape = {"d_in": x.shape[1], "d_sae": 2 * x.shape[1]}
    made = {
        "standard": StandardTrainingSAE(StandardTrainingSAEConfig(**shape)),
        "standard_no_centre": StandardTrainingSAE(StandardTrainingSAEConfig(**shape, apply_b_dec_to_input=False)),
        "topk": TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=6)),
    }
    for name, sae in made.items():
        for parameter in sae.parameters():
            parameter.data.normal_()
        sae.W_dec.data *= torch.linspace(0.2, 2, shape["d_sae"])[:, None] / sae.W_dec.norm(dim=1, keepdim=True)
        # TopK of SAELens gives codes that are already multiplied by the length
        times = 1.0 if name == "topk" else sae.W_dec.norm(dim=1)
        sae.save_model(folder / name)
        report(folder / name, x, sae, times)
        sae.save_inference_model(folder / f"{name}_inference")
        report(folder / f"{name}_inference", x, sae, times)


def dictionary_learning_folder(folder: Path, x: torch.Tensor) -> None:
    """A few steps by its own ``trainSAE``, which saves ``trainer_0``."""
    package, trainer = dictionary_learning()
    config = standard_trainer(trainer, x.shape[1], 2 * x.shape[1], steps=20, lr=1e-2, l1_penalty=0.1)
    package.training.trainSAE(iter([x] * 20), [config], steps=20, save_dir=str(folder), device="cpu")
    auto_encoder = package.AutoEncoder(x.shape[1], 2 * x.shape[1])
    auto_encoder.load_state_dict(torch.load(folder / "trainer_0" / "ae.pt"))
    report(folder / "trainer_0", x, auto_encoder)


def standard_trainer(trainer, d: int, n_features: int, **options) -> dict:
    fixed = {
        "trainer": trainer,
        "activation_dim": d,
        "dict_size": n_features,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
    }
    return fixed | {"warmup_steps": 0, "sparsity_warmup_steps": None, "seed": 0} | options


# --- training ---


def now() -> tuple[float, float]:
    """Seconds on the wall's clock, and of this process on all cores."""
    return time.perf_counter(), time.process_time()


def batches(x: torch.Tensor, batch: int, passes: int, seed: int, clock: dict):
    """`x` in the order in which `saelib.training.train` takes it; notes when the first is asked for, and the end."""
    clock["begin"] = now()
    for epoch in range(passes):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(x), generator=generator, dtype=torch.int32)
        for first in range(0, len(x) // batch * batch, batch):
            yield x[order[first : first + batch].long()]
    clock["end"] = now()


def train(job: dict) -> None:
    """Train as `job` says, after a short training of a dictionary that is thrown away, so that all is loaded and warm."""
    torch.set_num_threads(job["threads"])
    x = load_file(job["activations"])["x"]
    how = {"saelens": train_saelens, "dictionary_learning": train_dictionary_learning}[job["peer"]]
    out = Path(job["out"])
    how(job | {"passes": 1, "warmup": 0, "l1_warmup": 0, "decay": 0}, x[: 25 * job["batch"]], out / "warm-up")
    begin, end = how(job, x, out)
    seconds = [last - first for first, last in zip(begin, end, strict=True)]
    (out / "seconds.json").write_text(json.dumps(seconds))


def train_saelens(job: dict, x: torch.Tensor, out: Path) -> tuple:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(job["seed"])
    shape = {"d_in": x.shape[1], "d_sae": job["n_features"]}
    if job["k"]:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=job["k"]))
    else:
        penalty = {"l1_coefficient": job["l1"], "l1_warm_up_steps": job["l1_warmup"]}
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, **penalty))
    n_samples = len(x) // job["batch"] * job["batch"] * job["passes"]
    options = SAETrainerConfig(
        total_training_samples=n_samples,
        train_batch_size_samples=job["batch"],
        lr=job["lr"],
        lr_end=job["lr"] / 10,  # has a say in cosine schedules only
        lr_warm_up_steps=job["warmup"],
        lr_decay_steps=job["decay"],
        adam_beta2=job["beta2"],
        autocast=job["autocast"],
        logger=LoggingConfig(log_to_wandb=False),
    )
    clock = {}
    provider = batches(x, job["batch"], job["passes"], job["seed"], clock)
    sae = SAETrainer(options, sae, provider).fit()
    end = now()
    sae.save_inference_model(out)
    return clock["begin"], end


def train_dictionary_learning(job: dict, x: torch.Tensor, out: Path) -> tuple:
    package, trainer = dictionary_learning()
    steps = len(x) // job["batch"] * job["passes"]
    options = {"steps": steps, "lr": job["lr"], "seed": job["seed"], "warmup_steps": job["warmup"]}
    options |= {"decay_start": steps - job["decay"] if job["decay"] else None}
    if job["k"]:
        from dictionary_learning.trainers.top_k import TopKTrainer

        options |= {"trainer": TopKTrainer, "k": job["k"], "activation_dim": x.shape[1], "dict_size": job["n_features"]}
        config = options | {"layer": 0, "lm_name": "none", "device": "cpu"}
    else:
        options |= {"l1_penalty": job["l1"], "sparsity_warmup_steps": job["l1_warmup"] or None}
        config = standard_trainer(trainer, x.shape[1], job["n_features"], **options)
    clock, dtype = {}, torch.float32
    if job["autocast"]:  # trainSAE has it, but puts a null context in its place on a CPU
        dtype = torch.bfloat16
        package.training.nullcontext = lambda: torch.autocast("cpu", torch.bfloat16)
    data = batches(x, job["batch"], job["passes"], job["seed"], clock)
    package.training.trainSAE(data, [config], steps=steps, save_dir=str(out), device="cpu", autocast_dtype=dtype)
    package.training.nullcontext = contextlib.nullcontext
    if job["k"]:  # its loader for this form wants the pickle; we read tensors only
        tensors = torch.load(out / "trainer_0" / "ae.pt", weights_only=True)
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, out / "trainer_0" / "tensors.safetensors"
        )
    return clock["begin"], clock["end"]


if __name__ == "__main__":
    if sys.argv[1] == "exchange":
        exchange(Path(sys.argv[2]))
    else:
        train(json.loads(Path(sys.argv[2]).read_text()))
