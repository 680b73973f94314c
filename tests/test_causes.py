"""saelib.causes: ablation in a running model, effects on what comes next, the causal tree; on tiny models."""

import networkx as nx
import pytest
import torch
from conftest import MLP, RESIDUAL

from saelib import activations, cases, causes, dictionaries, patching, store

EARLY, LATE = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def lm(llama):
    return patching.load(llama)


@pytest.fixture(scope="module")
def levels(llama, rows, tmp_path_factory):
    """Three layers of the tiny Llama, each with a random tied dictionary of 24 features."""
    folder, hooks = tmp_path_factory.mktemp("levels"), [EARLY, RESIDUAL, LATE]
    activations.harvest(rows, hooks, folder, activations.forward_for(llama, dtype=torch.float32, device="cpu"))
    return [level(folder, hook, rows, seed) for seed, hook in enumerate(hooks)]


def level(folder, hook, rows, seed, outlier_factor=None):
    kept, whole = (store.ActivationStore(folder / hook, "held_out", outlier_factor=f) for f in (outlier_factor, None))
    dictionary = dictionaries.TiedSAE(24, kept.d, generator=torch.Generator().manual_seed(seed))
    dictionary.bias.data.fill_(-0.4)
    dictionary.scale.fill_(kept.scale)
    return causes.Level(dictionary, kept, whole, cases.read(rows, kept), rows.held_out)


def strongest(level):
    """The feature that is most often above half of its maximum in both halves."""
    code = level.dictionary.encode(level.store.rows(torch.arange(level.store.n))).detach()
    return int((code > code.amax(0) / 2).float().sum(0).argmax())


def test_the_stream_runs_on_to_what_the_whole_model_gives(lm, levels):
    rows = torch.tensor([2, 5])
    stream = causes.Stream(lm, levels[0], rows)
    with torch.no_grad():
        whole = lm.model(stream.tokens).logits
        torch.testing.assert_close(stream.run(stream.x, stream.tokens), whole, rtol=1e-3, atol=1e-3)
        later = causes.Stream(lm, levels[2], rows).x
        torch.testing.assert_close(stream.run(stream.x, stream.tokens, 2), later, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lm.model(stream.tokens).logits, whole)  # the blocks are themselves again


def test_an_ablated_feature_is_off_and_the_first_position_and_outliers_are_left_alone(lm, levels, rows):
    some = level(levels[0].store.folder.parent, EARLY, rows, 0, outlier_factor=1.02)
    assert some.store.n_left_out
    stream = causes.Stream(lm, some, torch.arange(12))
    assert (stream.code[:, 0] == 0).all()
    spared = torch.ones(some.whole.n, dtype=torch.bool).index_fill_(0, some.store.kept, False).view(12, -1)
    assert (stream.code[:, 1:][spared] == 0).all()
    feature = int(stream.code.sum((0, 1)).argmax())
    with torch.no_grad():
        changed = stream.without([feature])
        on = stream.code[..., feature] > 0
        left = some.dictionary.encode(changed)[..., feature]
        assert on.any() and left[on].abs().max() < 1e-5  # the pre-activation is 0: less than rank one
    assert torch.equal(changed[~on], stream.x[~on])


def test_effects_equal_those_of_a_hook_by_hand(lm, levels):
    stream = causes.Stream(lm, levels[1], torch.arange(4))
    feature = int(stream.code.sum((0, 1)).argmax())
    where = (stream.code[..., feature] > 0)[None]
    change, vocabulary = causes.effects(stream, [feature], where, batch=3)
    with torch.no_grad():
        base = lm.model(stream.tokens).logits.log_softmax(-1)
        handle = lm.blocks[1].register_forward_hook(lambda m, i, out: stream.without([feature]))
        moved = base - lm.model(stream.tokens).logits.log_softmax(-1)
        handle.remove()
    right = moved[:, :-1].gather(2, stream.tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(change[0], right, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(vocabulary[0], moved[where[0]].mean(0), rtol=1e-2, atol=1e-3)
    assert change[0].abs().max() > 0.01


def test_equal_mass_draws_others_of_nearly_the_same_mass(lm, levels):
    stream = causes.Stream(lm, levels[1], torch.arange(6))
    mass = stream.code.sum((0, 1))
    feature = int(mass.argsort()[-4])
    drawn = causes.equal_mass(stream, feature, 2, torch.Generator().manual_seed(0), among=3)
    assert len(set(drawn)) == 2 and feature not in drawn
    distance = (mass.log() - mass[feature].log()).abs()
    assert max(distance[drawn]) <= distance.sort().values[3]
    stream.code[..., 0] = 0
    with pytest.raises(causes.CauseError, match=r"feature 0 .* is dead on these rows"):
        causes.equal_mass(stream, 0, 2, torch.Generator())


def contexts(lm, levels, select=True, n=5):
    return causes.Contexts(
        lm, levels[1], levels[2], strongest(levels[2]), select, n, 16, torch.Generator().manual_seed(0)
    )


def test_falls_equal_a_run_by_hand(lm, levels):
    asked = contexts(lm, levels)
    sets = [[feature] for feature in range(24)] + [[1, 2, 3]]
    falls = asked.fall(sets, batch=7)
    child, parent, worst, seen = levels[1], levels[2], 0.0, []
    listen = lm.blocks[2].register_forward_hook(lambda m, i, out: seen.append(out[0, -1]))
    for number, one in enumerate(sets):
        for i, column in enumerate(asked.column.tolist()):
            with torch.no_grad():
                x = asked.stream.x[i, : column + 1]
                code = child.dictionary.encode(x)
                code[0] = 0
                changed = (x - code[:, one] @ child.writes[one])[None]
                handle = lm.blocks[1].register_forward_hook(lambda m, i, out, y=changed: y)
                lm.model(asked.stream.tokens[i : i + 1, : column + 1])
                handle.remove()
                after = parent.dictionary.encode(seen[-1])[asked.feature]
            worst = max(worst, abs((1 - after / asked.activation[i] - falls[number, i]).item()))
    listen.remove()
    assert worst < 1e-3 and falls.abs().max() > 0.01


def test_the_gradient_guesses_small_falls(lm, levels):
    asked = contexts(lm, levels, n=8)
    guess, measured = asked.first_order(), asked.fall([[feature] for feature in range(24)]).mean(1)
    small = measured.abs() < 0.1
    assert torch.corrcoef(torch.stack([guess, measured]))[0, 1] > 0.7 and small.any()


def test_the_tree_reaches_the_first_level_and_keeps_the_strongest(lm, levels):
    root = strongest(levels[2])
    settings = {"n_contexts": 4, "n_tokens": 16, "n_candidates": 24, "n_children": 2, "least": 0.02}
    graph = causes.tree(lm, levels, root, **settings)
    assert nx.is_directed_acyclic_graph(graph) and graph.out_degree((LATE, root)) == 0
    assert {data["level"] for _, data in graph.nodes(data=True)} == {0, 1, 2}
    for child, parent, edge in graph.edges(data=True):
        assert graph.nodes[child]["level"] == graph.nodes[parent]["level"] - 1
        assert edge["weight"] >= 0.02 and edge["low"] <= edge["weight"] <= edge["high"]
    assert max(degree for _, degree in graph.in_degree()) <= 2
    node = graph.nodes[LATE, root]
    single = sum(edge["weight"] for *_, edge in graph.in_edges((LATE, root), data=True))
    assert node["single"].mean().item() == pytest.approx(single, rel=1e-5)
    again = causes.tree(lm, levels, root, **settings)
    assert list(again.edges(data="weight")) == list(graph.edges(data="weight"))
    assert not causes.tree(lm, levels, root, **settings | {"least": 1e9}).edges  # edges under the threshold are dropped


def test_bad_input(lm, levels, rows, harvested):
    root = strongest(levels[2])
    with pytest.raises(
        causes.CauseError, match=f"needs a dictionary at an earlier layer than its target's; given: {LATE}"
    ):
        causes.tree(lm, levels[2:], root)
    with pytest.raises(causes.CauseError, match=f"{LATE} does not lie before {RESIDUAL}"):
        causes.tree(lm, [levels[2], levels[1]], root)
    with pytest.raises(causes.CauseError, match="nowhere above half of its maximum in the first 1 tokens"):
        causes.tree(lm, levels, root, n_tokens=1)
    levels[2].dictionary.bias.data[0] = -1e9
    with pytest.raises(cases.CaseError, match=f"feature 0 at {LATE} is dead"):
        causes.tree(lm, levels, 0)
    with pytest.raises(causes.CauseError, match="only features of the residual stream"):
        causes.Stream(lm, level(harvested, MLP, rows, 0), torch.arange(2))
