"""Everything that takes a device gives there what it gives on the CPU: on a GPU where there is one, else on a pretended one."""

import itertools

import pretend
import pytest
import torch
from conftest import MLP, RESIDUAL
from safetensors.torch import load_file
from test_ioi import NAMES, TEMPLATES

from saelib import (
    activations,
    baselines,
    cases,
    causes,
    dictionaries,
    fragments,
    ioi,
    models,
    patching,
    reconstruction,
    selection,
    store,
    training,
)

HOOKS = ["blocks.0.hook_resid_post", RESIDUAL, "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module")
def device(harvested):
    """A real GPU, or a pretended one; what is loaded lazily is loaded before that (`harvested`)."""
    if torch.cuda.is_available():
        yield models.default_device()
    else:
        with pretend.gpu() as device:
            yield device


@pytest.fixture(scope="module")
def folders(device, llama, rows, tmp_path_factory):
    """The same harvest by the CPU and by the GPU: {device: {hook: folder}}."""
    made = {}
    for where in ("cpu", device):
        forward = activations.forward_for(llama, dtype=torch.float32, device=where)
        made[where] = activations.harvest(
            rows, [*HOOKS, MLP], tmp_path_factory.mktemp("made"), forward, rows_per_shard=16
        )
    return made


def both(device, make):
    """``make`` on the CPU and on the GPU, each back on the CPU."""
    return [made.detach().float().cpu() for made in (make("cpu"), make(device))]


def equal(one, two, tolerance=1e-3):
    torch.testing.assert_close(two, one, rtol=tolerance, atol=tolerance)


def test_the_harvest_holds_the_same_in_every_shard(folders, device):
    for hook, folder in folders["cpu"].items():
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) == 4
        for path in shards:
            one, two = (load_file(part[hook] / path.name) for part in (folders["cpu"], folders[device]))
            equal(one["activations"], two["activations"])
            equal(one["norm"], two["norm"])


def test_the_bridge_harvests_the_same(folders, device, llama, rows, tmp_path):
    bridge = models.load_model(llama, device=device)
    activations.harvest(
        rows, [RESIDUAL], tmp_path, lambda hooks: models.bridge_forward(bridge, hooks), rows_per_shard=16
    )
    one, two = (
        load_file(folder / "train-00001.safetensors") for folder in (folders["cpu"][RESIDUAL], tmp_path / RESIDUAL)
    )
    equal(one["activations"], two["activations"])


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_training_ends_at_the_same_fvu(folders, device, tmp_path, kind):
    options = {"alpha": 0.0, "k": 6} if kind == "topk" else {}
    config = training.TrainConfig(kind=kind, batch_size=32, passes=6, lr=5e-3, centre=True, **options)
    stores = [store.ActivationStore(folders["cpu"][RESIDUAL], split) for split in activations.SPLITS]
    found = [
        training.train(*stores, config, tmp_path / str(where), device=where)[1]["metrics"] for where in ("cpu", device)
    ]
    assert found[1]["fvu"] == pytest.approx(found[0]["fvu"], rel=0.02)
    assert found[1]["l0"] == pytest.approx(found[0]["l0"], rel=0.02)


def test_a_training_goes_on_from_its_checkpoint(folders, device, tmp_path, monkeypatch):
    stores = [store.ActivationStore(folders["cpu"][RESIDUAL], split) for split in activations.SPLITS]
    config = training.TrainConfig(batch_size=32, passes=6, lr=5e-3)
    whole, _ = training.train(*stores, config, tmp_path / "whole", device=device, checkpoint_every=50)
    step, count = training.steps.step, iter(range(1000))

    def broken(*arguments):
        if next(count) == 80:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training.steps, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        training.train(*stores, config, tmp_path / "cut", device=device, checkpoint_every=50)
    monkeypatch.setattr(training.steps, "step", step)
    assert list((tmp_path / "cut").glob("*.checkpoint.safetensors"))
    again, _ = training.train(*stores, config, tmp_path / "cut", device=device, checkpoint_every=50)
    equal(whole.weight.detach().cpu(), again.weight.detach().cpu())


def test_a_step_copies_its_batch_alone_and_waits_only_when_the_loss_is_read(folders, device, tmp_path, monkeypatch):
    if device.type == "cuda":
        pytest.skip("counted on the pretended device here; tests/benchmarks/bench_gpu.py counts on a real one")
    stores = [store.ActivationStore(folders["cpu"][RESIDUAL], split) for split in activations.SPLITS]
    step, seen = training.steps.step, []

    def counted(*arguments):
        seen.append(pretend.counts.copy())
        return step(*arguments)

    monkeypatch.setattr(training.steps, "step", counted)
    training.train(*stores, training.TrainConfig(batch_size=32, passes=3), tmp_path, device=device)
    moved = [after - before for before, after in itertools.pairwise(seen)]
    assert len(moved) == 53
    for number, found in enumerate(moved, start=1):
        assert found["to the device"] == 1
        if number not in (18, 36):  # the held-out evaluations at the end of a pass
            assert found["to the host"] == 0 and found["waits"] == (3 if number % training.LOG_EVERY == 0 else 0)


def test_losses_under_reconstruction(device, llama, rows):
    def make(where):
        edits = {"unchanged": None, "zero": torch.zeros_like, "mean": reconstruction.constant(torch.ones(32))}
        edits["tied"] = dictionaries.TiedSAE(64, 32, generator=torch.Generator().manual_seed(0)).to(where)
        found = reconstruction.losses_under(llama, rows.held_out[:4], RESIDUAL, edits, device=where, limit=20.0)
        return torch.tensor([found.rows[label].tolist() for label in edits])

    equal(*both(device, make))


def test_patching_and_attribution(device, llama, tokenizer):
    prompts = ioi.make_prompts(tokenizer, (6, 5), names=NAMES, templates=TEMPLATES)[0]

    def make(where):
        tail = patching.Tail(patching.load(llama, device=where), HOOKS[0], prompts)
        made = dictionaries.TiedSAE(64, 32, generator=torch.Generator().manual_seed(0)).to(where)
        patch = patching.patch(tail, made)
        order = patch.candidates.sort().values
        kl, edit = patch.measure([[], order[:5], order])
        fall = selection.attribution(patch, points=(0.0, 0.5))
        table = selection.curve(patch, [order[:5], selection.ranked(fall, patch)])
        assert len(selection.needed_again(fall, patch, patch, [2, 4], reselect=2, resamples=5)) == 5
        assert selection.prune_orders(patch.mean_kls, order[:6], [0.01], {0: None})[0][0]["evaluations"] > 1
        numbers = torch.tensor(table[["kl", "edit"]].to_numpy().ravel())
        return torch.cat([kl.flatten(), edit.flatten(), fall.flatten().cpu(), numbers])

    equal(*both(device, make))


def level(folder, rows, where, seed):
    kept, whole = (store.ActivationStore(folder, "held_out", outlier_factor=f) for f in (3.0, None))
    made = dictionaries.TiedSAE(24, kept.d, generator=torch.Generator().manual_seed(seed))
    made.bias.data.fill_(-0.4)
    made.scale.fill_(kept.scale)
    return causes.Level(made.to(where), kept, whole, cases.read(rows, kept), rows.held_out)


def test_effects_and_the_causal_tree(folders, device, llama, rows):
    def make(where):
        lm = patching.load(llama, device=where)
        levels = [level(folders["cpu"][hook], rows, where, seed) for seed, hook in enumerate(HOOKS)]
        code = levels[-1].dictionary.encode(levels[-1].store.rows(torch.arange(levels[-1].store.n)).to(where)).detach()
        feature = int((code > code.amax(0) / 2).float().sum(0).argmax())
        stream = causes.Stream(lm, levels[1], torch.arange(4))
        mass = stream.code.sum((0, 1))
        one = int(mass.argmax())
        others = causes.equal_mass(stream, one, 2, torch.Generator().manual_seed(0))
        where_on = (stream.code[..., [one, *others]].movedim(-1, 0) > 0).cpu()
        change, vocabulary = causes.effects(stream, [one, *others], where_on)
        graph = causes.tree(lm, levels, feature, n_contexts=4, n_tokens=12, n_candidates=4, least=-10.0)
        weights = torch.tensor(
            [edge["weight"] for *_, edge in sorted(graph.edges(data=True), key=lambda e: str(e[:2]))]
        )
        return torch.cat([change.flatten(), vocabulary.flatten(), weights])

    equal(*both(device, make), tolerance=5e-3)


def test_codes_of_fragments_and_moments(folders, device, rows):
    held_out = store.ActivationStore(folders["cpu"][RESIDUAL], "held_out")
    pieces = fragments.cut(rows.held_out, held_out, seed=0, length=5)

    def make(where):
        made = dictionaries.TiedSAE(24, 32, generator=torch.Generator().manual_seed(0)).to(where)
        code = fragments.codes(made, held_out, pieces, torch.arange(4))
        moments = baselines.moments(made, held_out.chunks(64))
        basis = baselines.top_k(baselines.both_signs(baselines.pca(held_out.rows(torch.arange(100)).float())), 4).to(
            where
        )
        shape = baselines.moments(basis, held_out.chunks(64)).skew.nan_to_num()
        return torch.cat(
            [code.flatten(), moments.skew.flatten().nan_to_num(), shape, cases.codes(made, held_out, [1, 2])[0]]
        )

    equal(*both(device, make))
