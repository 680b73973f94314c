"""Patching against whole forward passes with hooks and against identities, on two architectures; pruning too."""

import copy
import dataclasses
import itertools
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_ioi import NAMES, TEMPLATES

from saelib import baselines, dictionaries, files, ioi, models, patching, paths, selection
from saelib.dictionaries import StandardSAE, TiedSAE, TopKSAE

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return ioi.make_prompts(tokenizer, (6, 5), names=NAMES, templates=TEMPLATES)[0]


@pytest.fixture(scope="module", params=["llama", "neox"])
def folder(request, tokenizer, tmp_path_factory) -> str:
    """A tiny model with large weights, so that one name changes the answer by more than rounding."""
    made = patching.load(request.getfixturevalue(request.param)).model
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2:
            parameter.mul_(1 if "embed_in" in name or "embed_tokens" in name else 8)
    folder = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tail(folder, prompts):
    return patching.Tail(patching.load(folder), HOOK, prompts)


@pytest.fixture(scope="module")
def rotation(tail):
    """PCA of the stream around the prompts with all components, signed: a complete orthogonal basis."""
    x = tail.x.reshape(-1, 32)
    return baselines.pca(x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def learned():
    generator = torch.Generator().manual_seed(0)
    made = TiedSAE(64, 32, generator=generator)
    made.scale.fill_(2.5)
    return made


def by_hooks(folder, prompts, dictionary, chosen):
    """Last logits of each prompt alone, whole, unpadded, patched at every position by a hook of TransformerLens."""
    bridge, logits, edits = models.load_model(folder), [], []
    for base, other, start in zip(prompts.base, prompts.counterfactual, prompts.start, strict=True):
        base, other = base[None, start:], other[None, start:]
        with torch.inference_mode():
            _, there = bridge.run_with_cache(other, names_filter=HOOK)

        def replace(x, hook, there=there):
            change = (dictionary.encode(there[HOOK]) - dictionary.encode(x))[..., chosen]
            new = x + dictionary.scale * change @ dictionary.directions[chosen]
            edits.append((new - x).norm(dim=-1).sum())
            return new

        with torch.inference_mode():
            logits.append(bridge.run_with_hooks(base, fwd_hooks=[(HOOK, replace)])[0, -1])
    return torch.stack(logits), torch.stack(edits)


@pytest.mark.parametrize("kind", ["tied", "standard", "topk", "pca"])
def test_a_patch_is_what_hooks_on_whole_prompts_give(folder, tail, prompts, rotation, learned, kind):
    generator = torch.Generator().manual_seed(1)
    dictionary = {
        "tied": learned,
        "pca": rotation,
        "standard": StandardSAE(64, 32, generator=generator),
        "topk": TopKSAE(64, 32, k=5, generator=generator),
    }[kind]
    chosen = patching.patch(tail, dictionary).candidates[::2]
    logits, edits = by_hooks(folder, prompts, dictionary, chosen)
    x = patching.patch(tail, dictionary).apply(chosen)
    torch.testing.assert_close(tail.run(x[None])[0], logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tail.edit(x), edits, rtol=1e-3, atol=1e-3)
    assert (tail.run(x[None])[0] - tail.logits).abs().max() > 0.01


def test_base_and_counterfactual_are_those_of_the_whole_model(folder, tail, prompts):
    model = patching.load(folder).model
    for number in range(len(prompts)):
        for tokens, found in ((prompts.base, tail.logits), (prompts.counterfactual, tail.logits_counterfactual)):
            whole = model(tokens[number : number + 1, prompts.start[number] :]).logits[0, -1]
            torch.testing.assert_close(found[number], whole, rtol=1e-3, atol=1e-3)


def test_nothing_patched_leaves_the_base(tail, learned):
    patch = patching.patch(tail, learned)
    assert torch.equal(patch.apply([]), tail.x)
    kl, edit = patch.measure([[]])
    torch.testing.assert_close(kl[0], tail.kl_base)
    assert (edit == 0).all()
    assert tail.kl_base.mean() > 0.005


def test_a_complete_orthogonal_basis_reaches_a_kl_of_zero(tail, rotation):
    patch = patching.patch(tail, rotation)
    kl, edit = patch.measure([patch.candidates, range(32)])
    assert kl.abs().max() < 1e-3 * tail.kl_base.mean()
    whole = (tail.x_counterfactual - tail.x).norm(dim=-1).sum(1)
    torch.testing.assert_close(edit[0], whole, rtol=1e-3, atol=1e-4)


def test_both_signs_and_the_signed_form_of_a_basis_agree_when_all_is_patched(tail, rotation):
    patch = patching.patch(tail, baselines.both_signs(rotation))
    assert patch.measure([patch.candidates])[0].abs().max() < 1e-3 * tail.kl_base.mean()


def test_order_and_company_do_not_matter(tail, learned):
    patch = patching.patch(tail, learned)
    chosen = patch.candidates[:9].tolist()
    shuffled = random.Random(0).sample(chosen, 9)
    kl, edit = patch.measure([chosen, shuffled, chosen[:2], []], together=4)
    alone, alone_edit = patch.measure([chosen, shuffled, chosen[:2], []], together=1)
    torch.testing.assert_close(kl[0], kl[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kl, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(edit, alone_edit)


def test_a_patch_adds_up_feature_by_feature(tail, learned):
    patch = patching.patch(tail, learned)
    one, two, both = (patch.apply(chosen) - tail.x for chosen in ([3], [7], [3, 7]))
    torch.testing.assert_close(one + two, both, rtol=1e-4, atol=1e-5)


def test_only_features_whose_code_differs_are_candidates(tail, learned):
    patch = patching.patch(tail, learned)
    others = sorted({*range(64)} - {*patch.candidates.tolist()})
    assert torch.equal(patch.apply(others), tail.x)
    assert all(not torch.equal(patch.apply([one]), tail.x) for one in patch.candidates.tolist())
    assert not patch.steps[~tail.change].any()


def test_attribution_is_the_slope_of_the_kl(tail, learned):
    patch = patching.patch(tail, learned)
    fall = selection.attribution(patch)
    assert fall.shape == (6, 64)
    for feature in patch.candidates[:5].tolist():
        little = tail.x + 1e-2 * (patch.apply([feature]) - tail.x)
        opposite = tail.x - 1e-2 * (patch.apply([feature]) - tail.x)
        with torch.no_grad():
            slope = (tail.kl(little[None])[0] - tail.kl(opposite[None])[0]) / 2e-2
        torch.testing.assert_close(-fall[:, feature], slope, rtol=0.05, atol=2e-3)


def test_attribution_along_the_way_adds_up_to_the_whole_fall(tail, rotation):
    patch = patching.patch(tail, rotation)
    fall = selection.attribution(patch, [(point + 0.5) / 40 for point in range(40)])
    torch.testing.assert_close(fall.sum(1), tail.kl_base, rtol=0.02, atol=2e-3)
    order = selection.ranked(fall, patch)
    assert sorted(order.tolist()) == patch.candidates.tolist()
    assert (fall.mean(0)[order].diff() <= 0).all()


def plain_pruning(evaluate, start, thresholds, seed):
    """The loop of the paper's code with the random orders of `prune`."""
    kept, running, found = list(start), evaluate(start), []
    for number, threshold in enumerate(thresholds):
        generator = torch.Generator().manual_seed(seed * len(thresholds) + number)
        for one in [kept[i] for i in torch.randperm(len(kept), generator=generator).tolist()]:
            without = [other for other in kept if other != one]
            if evaluate(without) - running < threshold:
                kept, running = without, evaluate(without)
        found.append((threshold, kept, running))
    return found


THRESHOLDS = [1e-4, 1e-2, 0.1, 1.0]


def prune(evaluate, start, thresholds, *, seed=0, path=None, **rule):
    """`selection.prune_orders` for one visit order, with a function of one set."""
    return selection.prune_orders(lambda sets: [*map(evaluate, sets)], start, thresholds, {seed: path}, **rule)[seed]


def mean_kl(patch):
    return lambda chosen: patch.mean_kls([chosen])[0]


def test_pruning_is_the_plain_loop(tail, learned):
    patch = patching.patch(tail, learned)
    start = patch.candidates[:20].tolist()
    found = prune(mean_kl(patch), start, THRESHOLDS, seed=3)
    plain = plain_pruning(mean_kl(patch), start, THRESHOLDS, 3)
    assert [(one["threshold"], one["features"], one["kl"]) for one in found] == plain
    assert found[-1]["features"] != found[0]["features"]


def test_visit_orders_side_by_side_are_those_one_by_one_and_end_the_same_after_a_kill(tail, learned, tmp_path):
    patch = patching.patch(tail, learned)
    start, paths = patch.candidates[:20].tolist(), {seed: tmp_path / f"{seed}.json" for seed in (3, 4, 5)}
    settings = {"thresholds": THRESHOLDS, "orders": paths, "spec": patch.spec}
    together = selection.prune_orders(patch.mean_kls, start, **settings)
    for seed in paths:
        alone = prune(mean_kl(patch), start, THRESHOLDS, seed=seed)
        assert [one["features"] for one in together[seed]] == [one["features"] for one in alone]
        assert [one["kl"] for one in together[seed]] == pytest.approx([one["kl"] for one in alone], rel=1e-4, abs=1e-6)
    assert together[3] != together[4]
    whole = {seed: path.read_bytes() for seed, path in paths.items()}
    paths[4].unlink()
    files.write_json(paths[5], (stored := files.read_json(paths[5])) | {"found": stored["found"][:2]})
    selection.prune_orders(patch.mean_kls, start, **settings)
    assert whole == {seed: path.read_bytes() for seed, path in paths.items()}
    assert selection.prune_orders(None, start, **settings) == together


def additive(weights):
    """A KL to which every feature that is not patched adds its own weight."""
    return lambda chosen: sum(value for one, value in weights.items() if one not in chosen)


@pytest.mark.parametrize("block", [1, 4, 64])
def test_pruning_keeps_what_weighs_more_than_the_threshold(block):
    weights = {number: 1e-6 if number % 10 else 0.01 * (number + 1) for number in range(100)}
    calls = []

    def evaluate(chosen):
        calls.append(1)
        return additive(weights)(chosen)

    found = prune(evaluate, range(100), [1e-3, 0.3, 2], block=block)
    assert found[0]["features"] == list(range(0, 100, 10))
    assert found[-1]["features"] == []
    assert all({*b["features"]} <= {*a["features"]} for a, b in itertools.pairwise(found))
    assert len(calls) == sum(one["evaluations"] for one in found)
    if block == 1:
        assert found[0]["evaluations"] == 101
        assert found[1]["features"] == [30, 40, 50, 60, 70, 80, 90]


def test_blocks_save_evaluations():
    weights = {number: 1e-6 if number != 50 else 1.0 for number in range(128)}
    counts = [prune(additive(weights), range(128), [1e-3], block=block)[0]["evaluations"] for block in (1, 32)]
    assert counts[0] == 129
    assert counts[1] <= 1 + 4 + 2 * 5


def test_patience_saves_evaluations_and_loses_nothing_where_rises_do_not_change():
    weights = {number: 10.0 ** (-number / 10) for number in range(40)}
    thresholds = [1e-3 * 2**power for power in range(10)]
    every, few = (prune(additive(weights), range(40), thresholds, patience=p) for p in (float("inf"), 2.0))
    assert [one["features"] for one in every] == [one["features"] for one in few]
    spent = [sum(one["evaluations"] for one in found) for found in (every, few)]
    assert spent[1] < spent[0] / 2


PRUNING = """
import sys, time
from pathlib import Path
from saelib import selection

def evaluate(sets):
    time.sleep(float(sys.argv[2]))
    return [sum((number * 37 % 101 / 101) ** 4 for number in range(40) if number not in one) for one in sets]

orders, spec = {5: Path(sys.argv[1])}, {"dictionary": sys.argv[3]}
selection.prune_orders(evaluate, range(40), [1e-4, 1e-2, 0.1, 1.0], orders, patience=20, spec=spec)
"""


def test_a_killed_pruning_goes_on_and_ends_with_the_same_bytes(tmp_path):
    def command(stem, pause):
        return [sys.executable, "-c", PRUNING, tmp_path / f"{stem}.json", pause, "mine"]

    process = subprocess.Popen(command("killed", "0.02"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    half = files.read_json(tmp_path / "killed.json")["found"]
    assert 1 <= len(half) < 4
    for stem in ("killed", "undisturbed"):
        subprocess.run(command(stem, "0"), check=True, stderr=subprocess.DEVNULL)
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "undisturbed.json").read_bytes()
    assert files.read_json(tmp_path / "killed.json")["found"][: len(half)] == half


def test_stored_sets_of_another_dictionary_prompt_or_hook_are_not_used(tmp_path, folder, tail, learned, prompts):
    patch, settings = patching.patch(tail, learned, "mine"), {"path": tmp_path / "sets.json"}
    found = prune(mean_kl(patch), patch.candidates[:6], THRESHOLDS, spec=patch.spec, **settings)
    assert prune(None, patch.candidates[:6], THRESHOLDS, spec=patch.spec, **settings) == found
    altered = copy.deepcopy(learned)
    altered.bias.data += 1e-3
    few = dataclasses.replace(prompts, base=prompts.base.clone())
    few.base[0, -1] += 1
    others = [patching.patch(tail, altered, "mine"), patching.patch(tail, learned, "other")]
    others.append(patching.patch(patching.Tail(tail.lm, HOOK, few), learned, "mine"))
    others.append(patching.patch(patching.Tail(tail.lm, "blocks.1.hook_resid_post", prompts), learned, "mine"))
    for other in others:
        with pytest.raises(TypeError):  # it asks again, and there is nothing to ask
            prune(None, patch.candidates[:6], THRESHOLDS, spec=other.spec, **settings)
    with pytest.raises(ValueError, match="give `spec`"):
        prune(None, [1], THRESHOLDS, **settings)


def test_curves_hold_the_mean_inside_of_their_interval(tail, learned):
    patch = patching.patch(tail, learned)
    table = selection.curve(patch, [[], patch.candidates[:9], patch.candidates], name="mine")
    assert table["features"].tolist() == [0, 9, len(patch.candidates)]
    assert ((table["low"] <= table["kl"]) & (table["kl"] <= table["high"])).all()
    assert ((table["edit_low"] <= table["edit"]) & (table["edit"] <= table["edit_high"])).all()
    assert table["kl"][0] == pytest.approx(tail.kl_base.mean().item())
    assert table["edit"][0] == 0
    _, edit = patch.measure([patch.candidates])
    assert table["edit"][2] == pytest.approx((edit.sum() / tail.n_positions.sum()).item())


def test_drawing_all_prompts_again_surrounds_what_all_prompts_give(tail, rotation):
    patch = patching.patch(tail, rotation)
    fall, sizes = selection.attribution(patch), [1, 2, 4, 8, 16]
    order = selection.ranked(fall, patch)
    table = selection.curve(patch, [[], *(order[:size] for size in sizes), order])
    once = [selection.needed(table["kl"], table[column], table["kl"][0] / 2) for column in ("features", "edit")]
    again = selection.needed_again(fall, patch, patch, sizes, reselect=6, resamples=200)
    assert again.shape == (200, 2)
    low, high = np.quantile(again, [0.0, 1.0], axis=0)
    assert (low <= once).all() and (once <= high).all() and (low < high).all()
    assert np.array_equal(again, selection.needed_again(fall, patch, patch, sizes, reselect=6, resamples=200))


def test_needed_by_hand():
    assert selection.needed([4, 3, 1, 0.5], [0, 1, 2, 3], 2) == 1.5
    assert selection.needed([4, 3], [0, 1], 2) == float("inf")
    assert selection.needed([1, 0], [0, 1], 2) == 0


def test_a_model_that_fails_the_task_is_named(tail, prompts):
    said = ioi.failing(ioi.solves(tail.logits, prompts), 0.7)  # a random model
    assert "the model names the indirect object in" in said and "not in 70%: no conclusion is drawn" in said


def test_a_dictionary_of_another_width_is_refused(tail):
    with pytest.raises(patching.PatchError, match=r"'mine' has width 48, but blocks\.0\.hook_resid_post .* has 32"):
        patching.patch(tail, TiedSAE(8, 48), "mine")


def test_a_dictionary_without_a_code_that_differs_is_refused(tail):
    dead = TiedSAE(8, 32)
    torch.nn.init.constant_(dead.bias, -1e9)
    with pytest.raises(patching.PatchError, match="no code of 'dead' differs between base and counterfactual"):
        patching.patch(tail, dead, "dead")


def test_a_layer_without_a_dictionary_is_named(tmp_path):
    with pytest.raises(
        paths.MissingArtefact, match=r"no dictionary in .*blocks\.9\.hook_resid_post.*'alpha': 0\.5.*02_train"
    ):
        dictionaries.find(tmp_path / "blocks.9.hook_resid_post", kind="tied", alpha=0.5)


def test_a_hook_that_is_missing_or_no_stream_is_refused(folder, prompts):
    lm = patching.load(folder)
    with pytest.raises(models.ModelError, match=r"blocks\.9\.hook_resid_post"):
        patching.Tail(lm, "blocks.9.hook_resid_post", prompts)
    with pytest.raises(models.ModelError, match="patched in the residual stream"):
        patching.Tail(lm, "blocks.0.hook_mlp_out", prompts)


def test_the_last_block_can_be_patched_too(folder, prompts):
    lm = patching.load(folder)
    tail = patching.Tail(lm, f"blocks.{len(lm.blocks) - 1}.hook_resid_post", prompts)
    patch = patching.patch(tail, baselines.default_basis(32))
    assert tail.kl_base.mean() > 1e-3
    assert patch.measure([patch.candidates])[0].abs().max() < 1e-3 * tail.kl_base.mean()
