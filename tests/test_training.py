"""Training: it learns, is done once, survives any interruption to the byte, and stops where the loss is lost."""

import errno
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import RESIDUAL, folder_digests
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saelib import dictionaries, files, metrics, training
from saelib.store import ActivationStore
from saelib.training import TrainConfig, TrainingError, learning_rate, train

SHORT = TrainConfig(batch_size=32, passes=6, lr=5e-3)  # 18 steps a pass: 108 steps


def form(kind):
    """The fields of a `TrainConfig` that belong together."""
    return {"kind": kind, "alpha": 0.0, "k": 6} if kind == "topk" else {"kind": kind}


def checkpoint_head(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["head"])


@pytest.fixture(scope="module")
def stores(harvested):
    """The training and the held-out activations of the tiny Llama."""
    return ActivationStore(harvested / RESIDUAL), ActivationStore(harvested / RESIDUAL, "held_out")


@pytest.mark.parametrize("kind", dictionaries.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_hundred_steps_lower_the_error(stores, tmp_path, kind, dtype):
    config = TrainConfig(batch_size=32, passes=20, lr=3e-3, centre=True, **form(kind))
    before = metrics.evaluate(training.start(stores[0], config), stores[1].chunks(100), stores[1].mean)
    dictionary, about = train(*stores, config, tmp_path, dtype=dtype)
    errors = [row["error"] for row in about["history"]["train"]]
    assert errors[-1] < 0.3 * errors[0]
    after = metrics.evaluate(dictionary, stores[1].chunks(100), stores[1].mean)
    assert after.fvu < 0.5 * before.fvu
    assert after.fvu == pytest.approx(about["metrics"]["fvu"])


def test_a_larger_alpha_gives_a_smaller_l0(stores, tmp_path):
    rows = training.sweep(*stores, [TrainConfig(**vars(SHORT) | {"alpha": alpha}) for alpha in (0, 0.1)], tmp_path)
    assert rows[1]["l0"] < rows[0]["l0"]


def test_the_history_is_read_every_25_steps_and_evaluated_as_often_as_asked(stores, tmp_path):
    _, about = train(*stores, SHORT, tmp_path, evaluations_per_pass=2)
    history = about["history"]
    assert [row["step"] for row in history["train"]] == [25, 50, 75, 100, 108]
    assert [row["step"] for row in history["held_out"]] == [9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99, 108]
    assert history["held_out"][-1]["fvu"] < history["held_out"][0]["fvu"]


def test_a_finished_run_is_loaded_and_not_trained_again(stores, tmp_path):
    trained, about = train(*stores, SHORT, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    loaded, again = train(*stores, SHORT, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert sorted(path.name for path in before) == [f"{SHORT.name}.json", f"{SHORT.name}.safetensors"]
    assert again == about
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in trained.state_dict().items())


def test_two_runs_give_the_same_bytes_and_another_seed_others(stores, tmp_path):
    for folder in ("a", "b"):
        train(*stores, SHORT, tmp_path / folder)
    assert folder_digests(tmp_path / "a") == folder_digests(tmp_path / "b")
    other, _ = train(*stores, TrainConfig(**vars(SHORT) | {"seed": 1}), tmp_path / "a")
    assert not torch.equal(other.weight, dictionaries.load(tmp_path / "a" / f"{SHORT.name}.safetensors")[0].weight)


def test_the_mean_and_scale_of_the_store_are_in_the_dictionary_where_asked_for(stores):
    store = stores[0]
    whole = torch.cat(list(store.chunks(1000)))
    plain = training.start(store, TrainConfig(scale=False))
    assert not plain.mean.any() and plain.scale == 1
    scaled = training.start(store, TrainConfig())
    assert scaled.standardise(whole).square().mean().item() == pytest.approx(1, rel=1e-4)
    both = training.start(store, TrainConfig(centre=True))
    assert both.standardise(whole).square().mean().item() == pytest.approx(1, rel=1e-4)
    assert both.standardise(whole).mean(0).abs().max() < 1e-5
    assert both.n_features == 64


@pytest.mark.parametrize("options", [{"kind": "standard"}, {"kind": "topk", "k": 4, "alpha": 0.0}])
def test_the_forms_with_a_decoder_bias_start_at_the_data(stores, options):
    store = stores[0]
    made = training.start(store, TrainConfig(**{"ratio": 2.0} | options))
    assert torch.allclose(made.decoder_bias, store.mean / made.scale, atol=1e-5)
    assert torch.equal(made.weight, made.decoder)
    assert torch.allclose(made.weight.norm(dim=1), torch.full((64,), 0.1))
    deviations = torch.nn.functional.normalize(torch.cat(list(store.chunks(1000))).float() - store.mean, dim=1)
    nearest = (made.directions @ deviations.T).max(dim=1)
    assert nearest.values.min() > 0.9999
    assert len(nearest.indices.unique()) == 64


def test_a_store_of_fewer_activations_than_features_starts_only_as_many_rows_at_the_data(stores):
    store = stores[0]
    made = training.start(store, TrainConfig(kind="standard", ratio=(store.n + 3) / store.d))
    assert made.n_features == store.n + 3
    assert torch.allclose(made.weight.norm(dim=1), torch.full((store.n + 3,), 0.1))


class Listening(ActivationStore):
    """Notes the seed of each pass."""

    def batches(self, size, *, seed, **options):
        self.seeds = [*getattr(self, "seeds", []), seed]
        return super().batches(size, seed=seed, **options)


def test_every_pass_of_every_seed_has_its_own_order(stores, harvested, tmp_path):
    store = Listening(harvested / RESIDUAL)
    for seed in (0, 1):
        train(store, stores[1], TrainConfig(**vars(SHORT) | {"seed": seed}), tmp_path)
    assert len(store.seeds) == len(set(store.seeds)) == 2 * SHORT.passes


# --- what is stale ---


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 1e-3},
        {"passes": 2},
        {"batch_size": 64},
        {"decay": 0.5},
        {"centre": True},
        {"frozen_step": True},
        {"beta2": 0.9},
    ],
)
def test_other_settings_have_a_file_of_their_own(stores, tmp_path, changed):
    train(*stores, SHORT, tmp_path)
    before, said, config = folder_digests(tmp_path), [], TrainConfig(**vars(SHORT) | changed)
    _, about = train(*stores, config, tmp_path, announce=said.append)
    assert config.name != SHORT.name and not [line for line in said if "stale" in line]
    assert before.items() <= folder_digests(tmp_path).items()
    assert about["spec"]["config"][next(iter(changed))] == next(iter(changed.values()))


def test_another_precision_is_announced_and_trained_anew(stores, tmp_path):
    train(*stores, SHORT, tmp_path)
    said = []
    _, about = train(*stores, SHORT, tmp_path, dtype=torch.bfloat16, announce=said.append)
    assert (
        said[0] == f"stale dictionary {SHORT.name}.safetensors: trained with other settings or activations, made anew"
    )
    assert about["spec"]["dtype"] == "bfloat16"


def test_other_activations_are_announced(stores, tmp_path, harvested):
    train(*stores, SHORT, tmp_path)
    said = []
    kept = ActivationStore(harvested / RESIDUAL, outlier_factor=1.1)
    assert kept.n < stores[0].n
    train(kept, stores[1], SHORT, tmp_path, announce=said.append)
    assert len([line for line in said if "stale" in line]) == 1


def test_other_held_out_activations_are_announced(stores, tmp_path, harvested):
    _, before = train(*stores, SHORT, tmp_path)
    said = []
    kept = ActivationStore(harvested / RESIDUAL, "held_out", outlier_factor=1.1)
    assert kept.n < stores[1].n
    _, after = train(stores[0], kept, SHORT, tmp_path, announce=said.append)
    assert len([line for line in said if "stale" in line]) == 1
    assert after["metrics"] != before["metrics"]


# --- interruptions ---


class Interrupted(ActivationStore):
    """Ctrl-C after `left` batches. None: no interruption, the batches given are counted in `given`."""

    left: int | None = None
    given = 0

    def batches(self, *arguments, **options):
        for batch in super().batches(*arguments, **options):
            if self.given == self.left:
                raise KeyboardInterrupt
            self.given += 1
            yield batch


@pytest.fixture
def interrupted(stores, harvested, tmp_path):
    """A folder with the checkpoint at step 50 of a run that was broken off after 60 of 108 steps."""
    store = Interrupted(harvested / RESIDUAL)
    store.left = 60
    with pytest.raises(KeyboardInterrupt):
        train(store, stores[1], SHORT, tmp_path / "broken", checkpoint_every=25)
    return tmp_path / "broken"


def finish(stores, harvested, folder, config=SHORT) -> int:
    """Train on into `folder` and return the number of steps that took."""
    store = Interrupted(harvested / RESIDUAL)
    train(store, stores[1], config, folder, checkpoint_every=25)
    return store.given


def test_an_interrupted_run_goes_on_at_its_checkpoint_and_ends_with_the_same_bytes(
    stores, harvested, tmp_path, interrupted
):
    assert checkpoint_head(interrupted / f"{SHORT.name}.checkpoint.safetensors")["step"] == 50
    assert not (interrupted / f"{SHORT.name}.json").exists()
    assert finish(stores, harvested, interrupted) == 58
    train(*stores, SHORT, tmp_path / "undisturbed")
    assert folder_digests(interrupted) == folder_digests(tmp_path / "undisturbed")


def test_a_damaged_checkpoint_is_not_used(stores, harvested, tmp_path, interrupted):
    checkpoint = interrupted / f"{SHORT.name}.checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-8])
    assert finish(stores, harvested, interrupted) == 108
    train(*stores, SHORT, tmp_path / "undisturbed")
    assert folder_digests(interrupted) == folder_digests(tmp_path / "undisturbed")


def test_a_checkpoint_of_other_settings_is_not_used(stores, harvested, interrupted):
    assert finish(stores, harvested, interrupted, TrainConfig(**vars(SHORT) | {"lr": 1e-3})) == 108


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(2)
from saelib import training
from saelib.store import ActivationStore

steps, step = [], training.steps.step
training.steps.step = lambda *arguments: steps.append(1) or step(*arguments)
source, folder, passes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = training.TrainConfig(batch_size=32, passes=passes, lr=3e-3, warmup_steps=10, decay=0.5)
stores = ActivationStore(source), ActivationStore(source, "held_out")
training.train(*stores, config, folder, checkpoint_every=50)
print(len(steps))
"""


def test_killed_in_mid_training_it_resumes_and_ends_with_the_same_bytes(stores, harvested, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    killed, undisturbed, passes = tmp_path / "killed", tmp_path / "undisturbed", 30
    config = TrainConfig(batch_size=32, passes=passes, lr=3e-3, warmup_steps=10, decay=0.5)
    command = [sys.executable, tmp_path / "script.py", harvested / RESIDUAL, killed, str(passes)]

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    head = killed / f"{config.name}.checkpoint.safetensors"
    deadline = time.monotonic() + 60
    while not head.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = checkpoint_head(head)["step"]
    assert 50 <= step < 540
    assert not (killed / f"{config.name}.json").exists()

    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) == 540 - step
    train(*stores, config, undisturbed)
    assert sorted(folder_digests(undisturbed)) == [f"{config.name}.json", f"{config.name}.safetensors"]
    assert folder_digests(killed) == folder_digests(undisturbed)


# --- a loss that is no longer finite ---


@pytest.fixture
def poisoned(harvested_copy):
    """Make stores whose training split holds one odd activation, in the batch of `step` (batches of 4, seed 0)."""

    def poison(step: int, value: float):
        folder = harvested_copy / RESIDUAL
        order = torch.randperm(600, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        place = order[(step - 1) * 4].item()
        path = folder / f"train-{place // 240:05d}.safetensors"
        tensors = load_file(path)
        tensors["activations"][place % 240, 3] = value
        save_file(tensors, path)
        manifest = files.read_json(folder / "manifest.json")
        manifest["shards"][path.name]["sha256"] = files.sha256(path)
        files.write_json(folder / "manifest.json", manifest)
        return ActivationStore(folder, outlier_factor=None), ActivationStore(folder, "held_out")

    return poison


PLAIN = TrainConfig(batch_size=4, scale=False, passes=1)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_activation_that_is_not_finite_stops_training_by_its_step_and_keeps_a_good_checkpoint(
    poisoned, tmp_path, value
):
    stores = poisoned(41, value)
    checkpoint = tmp_path / "run" / f"{PLAIN.name}.checkpoint.safetensors"
    for _ in range(2):  # the second call begins at the checkpoint and says the same
        with pytest.raises(TrainingError, match=rf"not finite at step 41 of {PLAIN.name}; the checkpoint") as caught:
            train(*stores, PLAIN, tmp_path / "run", checkpoint_every=25)
        assert f"{checkpoint} is kept" in str(caught.value)
        assert checkpoint_head(checkpoint)["step"] == 25
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint).values())
        assert not (tmp_path / "run" / f"{PLAIN.name}.json").exists()


def test_before_the_first_checkpoint_the_message_says_that_there_is_none(poisoned, tmp_path):
    with pytest.raises(TrainingError, match=r"step 41 .*no checkpoint was written yet"):
        train(*poisoned(41, float("inf")), PLAIN, tmp_path / "run", checkpoint_every=50)


def test_a_gradient_that_overflows_in_the_step_of_a_checkpoint_makes_no_bad_checkpoint(poisoned, tmp_path):
    """The loss is read before the step that it leads to: at 25 it is finite, and the weights after it are not."""
    with pytest.raises(TrainingError, match="no longer finite at step 25"):
        train(*poisoned(25, 3e4), PLAIN, tmp_path / "run", dtype=torch.float16, checkpoint_every=25)
    for path in (tmp_path / "run").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path.name


def test_a_gradient_that_overflows_in_the_last_step_makes_no_finished_dictionary(poisoned, tmp_path):
    with pytest.raises(TrainingError, match=r"no longer finite at step 150 of"):
        train(*poisoned(150, 3e4), PLAIN, tmp_path / "run", dtype=torch.float16)
    assert not (tmp_path / "run" / f"{PLAIN.name}.json").exists()


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_a_huge_learning_rate_stops_training_by_its_step(stores, tmp_path, kind):
    config = TrainConfig(**vars(SHORT) | form(kind) | {"lr": 1e38})
    with pytest.raises(TrainingError, match=rf"not finite at step 2 of {config.name}; .*Lower the learning rate"):
        train(*stores, config, tmp_path)


# --- settings ---


def test_a_full_disk_leaves_no_half_dictionary_and_the_next_call_ends_with_the_same_bytes(
    stores, tmp_path, monkeypatch
):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dictionaries, "save_file", full)
        with pytest.raises(
            files.DiskFull, match=rf"{SHORT.name}\.safetensors: free some space and run the same command"
        ):
            train(*stores, SHORT, tmp_path / "full", checkpoint_every=50)
    (kept,) = (tmp_path / "full").iterdir()
    assert kept.name == f"{SHORT.name}.checkpoint.safetensors" and checkpoint_head(kept)["step"] == 100
    for name in ("full", "undisturbed"):
        train(*stores, SHORT, tmp_path / name, checkpoint_every=50)
    assert folder_digests(tmp_path / "full") == folder_digests(tmp_path / "undisturbed")


def test_a_batch_larger_than_the_store_is_refused_with_both_numbers(stores, tmp_path):
    with pytest.raises(TrainingError, match="batch_size 601 is more than the 600 activations") as caught:
        train(*stores, TrainConfig(batch_size=601), tmp_path)
    assert RESIDUAL in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "gated"},
        {"ratio": 0},
        {"ratio": -1.0},
        {"lr": 0.0},
        {"batch_size": 0},
        {"passes": 0},
        {"alpha": -1e-3},
        {"warmup_steps": -1},
        {"decay": -0.1},
        {"decay": 1.1},
        {"beta2": 1.0},
        {"alpha": float("nan")},
        {"lr": float("nan")},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_with_the_value_given(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=name) as caught:
        TrainConfig(**wrong)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("wrong", [{"k": 4}, {"kind": "topk", "alpha": 0.0}, {"kind": "topk", "alpha": 1e-3, "k": 4}])
def test_k_and_alpha_exclude_each_other(wrong):
    with pytest.raises(ValueError, match="the kind 'topk', which wants k from 1 and alpha 0"):
        TrainConfig(**wrong)


def test_the_name_tells_kind_ratio_alpha_and_seed():
    assert TrainConfig(ratio=0.5, alpha=3e-3, seed=2).name == "tied_r0.5_a0.003_s2"


def test_a_step_counter_that_is_not_frozen_leaves_no_trace_so_that_older_dictionaries_stay_current(stores, tmp_path):
    assert TrainConfig(lr=2e-3).name == "tied_r2_a0.001_s0_242f0b"  # as version 0.2.0 named it
    assert "frozen_step" not in train(*stores, SHORT, tmp_path)[1]["spec"]["config"]


def test_the_learning_rate_is_constant_by_default():
    assert [learning_rate(step, 10, TrainConfig(lr=0.5)) for step in range(10)] == [0.5] * 10


def test_warm_up_and_decay_by_hand():
    config = TrainConfig(lr=1.0, warmup_steps=4, decay=0.5)
    found = [learning_rate(step, 10, config) for step in range(10)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_where_warm_up_and_decay_meet_the_smaller_holds():
    config = TrainConfig(lr=2.0, warmup_steps=4, decay=1.0)
    assert [learning_rate(step, 4, config) for step in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.5])


# --- the sweep ---


def test_a_sweep_gives_one_row_per_dictionary_and_a_second_one_trains_nothing(stores, tmp_path):
    configs = [TrainConfig(**vars(SHORT) | {"ratio": ratio}) for ratio in (1.0, 2.0)]
    rows = training.sweep(*stores, configs, tmp_path)
    assert [row["name"] for row in rows] == [config.name for config in configs]
    assert all({"hook", "ratio", "alpha", "fvu", "l0", "alive"} <= set(row) for row in rows)
    assert rows[0]["hook"] == RESIDUAL
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert training.sweep(*stores, configs, tmp_path) == rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


# --- an alpha on another scale ---


@pytest.mark.parametrize(("alpha", "active"), [(1e-6, "2[0-9]|3[0-9]"), (100.0, "0")])
def test_an_alpha_on_the_wrong_scale_is_announced_with_the_factor(stores, tmp_path, alpha, active):
    said = []
    train(
        *stores,
        TrainConfig(**vars(SHORT) | {"alpha": alpha, "lr": 0.5 if alpha > 1 else 5e-3}),
        tmp_path,
        announce=said.append,
    )
    assert len(said) == 1
    assert re.search(rf"({active}) of 64 features are active.*divide that alpha by d = 32", said[0])


def test_an_alpha_that_fits_and_an_alpha_of_zero_are_not_announced(stores, tmp_path):
    said = []
    for alpha in (0.0, 0.02):
        _, about = train(*stores, TrainConfig(**vars(SHORT) | {"alpha": alpha}), tmp_path, announce=said.append)
    assert 0 < about["metrics"]["l0"] <= 16
    assert said == []
