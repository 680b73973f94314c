"""Toy worlds: frequencies, copula, strengths; a stack of dictionaries against the same ones trained alone."""

import pytest
import torch

from saelib import dictionaries, losses, metrics, toy


def make_world(seed: int = 0, n: int = 24, d: int = 12, **options) -> toy.ToyWorld:
    frequencies = toy.decaying_frequencies(n, 3.0, 0.95)
    return toy.ToyWorld(frequencies, d, generator=torch.Generator().manual_seed(seed), **options)


def test_frequencies_by_hand():
    torch.testing.assert_close(toy.decaying_frequencies(3, 0.7, 0.5), torch.tensor([0.4, 0.2, 0.1]))
    torch.testing.assert_close(toy.decaying_frequencies(4, 2.0, 1.0), torch.full((4,), 0.5))


def test_frequencies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="above 1"):
        toy.decaying_frequencies(4, 3.0, 0.1)


def test_the_correlation_is_one():
    matrix = toy.random_correlation(50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(50))
    assert torch.linalg.eigvalsh(matrix).min() > 0
    assert matrix.min() > 0  # the authors' recipe gives features company, never avoidance


@pytest.mark.parametrize("correlated", [False, True])
def test_a_world_keeps_its_frequencies_and_strengths(correlated):
    world = make_world(correlated=correlated)
    strengths = world.strengths(40_000)
    active = strengths > 0
    torch.testing.assert_close(active.float().mean(0), world.frequencies, atol=0.01, rtol=0)
    assert strengths.min() >= 0 and strengths.max() < 1
    assert strengths[active].mean().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(world.features.norm(dim=1), torch.ones(24))


def test_features_of_a_correlated_world_meet_more_often_and_as_the_copula_says():
    world = make_world(correlated=True)
    active = (world.strengths(200_000) > 0).double()
    together = active.T @ active / len(active)
    expected = world.frequencies.double().outer(world.frequencies.double())
    off = ~torch.eye(24, dtype=bool)
    excess = (together / expected)[off]
    assert excess.mean() > 1.1
    assert torch.corrcoef(torch.stack([excess, world.correlation.double()[off]]))[0, 1] > 0.7
    alone = (make_world().strengths(200_000) > 0).double()
    assert ((alone.T @ alone / len(alone)) / expected)[off].mean().item() == pytest.approx(1, abs=0.02)


def test_both_worlds_of_a_seed_have_the_same_features_and_a_world_repeats():
    assert torch.equal(make_world().features, make_world(correlated=True).features)
    assert torch.equal(make_world(correlated=True).sample(5), make_world(correlated=True).sample(5))
    assert not torch.equal(make_world(1).features, make_world(2).features)


def test_an_observation_is_a_mixture_of_features():
    torch.testing.assert_close(make_world().sample(7), (world := make_world()).strengths(7) @ world.features)


def trained_alone(kind: str, alpha: float, place: int, steps: int) -> dictionaries.Dictionary:
    """The `place`-th dictionary of the stack below, trained by the library's loss, autograd and a plain Adam."""
    world, generator = make_world(), torch.Generator().manual_seed(1)
    made = [dictionaries.KINDS[kind](16, 12, generator=generator) for _ in range(place + 1)][place]
    optimiser = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(steps):
        x = world.sample(32)
        code = made.encode(x)
        total, _, _ = losses.sae_loss(x, made.decode(code), code, alpha)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    return made


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_stack_learns_what_each_learns_alone(kind):
    alphas, steps = [0.0, 0.003, 0.05], 25
    options = {"steps": steps, "lr": 0.01, "batch_size": 32, "generator": torch.Generator().manual_seed(1)}
    stack = toy.train_stack(make_world(), kind, 16, alphas, **options)
    assert [one.kind for one in stack] == [kind] * 3
    x = make_world(5).sample(64)
    for place, (alpha, one) in enumerate(zip(alphas, stack, strict=True)):
        alone = trained_alone(kind, alpha, place, steps)
        for expected, found in zip(alone.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(one(x), alone(x), atol=1e-4, rtol=0)
    start = dictionaries.KINDS[kind](16, 12, generator=torch.Generator().manual_seed(1))
    assert (start.weight - stack[0].weight).abs().max() > 0.05  # they did learn
    assert (stack[0].weight - stack[1].weight).abs().max() > 1e-2


def test_a_stack_finds_the_truth_of_an_easy_world():
    generator = torch.Generator().manual_seed(0)
    world = toy.ToyWorld(toy.decaying_frequencies(8, 1.0, 1.0), 16, generator=generator)
    options = {"steps": 800, "lr": 0.01, "batch_size": 128, "generator": generator}
    stack = toy.train_stack(world, "untied", 16, [0.002, 10.0], **options)
    found, crushed = (metrics.mmcs(world.features, one.directions.detach()) for one in stack)
    assert found > 0.95
    assert crushed < 0.7  # no code survives an alpha above 2 / d
    assert (stack[1].encode(world.sample(1000)) > 0).float().mean() < 0.01


def test_the_penalty_takes_alpha_d_over_two_off_a_feature_that_is_alone():
    """The optimum c = s - alpha d / 2 of mean((x_hat - x)^2) + alpha c, in a world of orthogonal features.

    Tied only: the untied form may split a feature between two directions even here.
    """
    generator, d, alphas = torch.Generator().manual_seed(0), 8, [0.0125, 0.05]
    world = toy.ToyWorld(toy.decaying_frequencies(4, 1.0, 1.0), d, generator=generator)
    world.features = torch.eye(d)[:4]
    stack = toy.train_stack(world, "tied", 8, alphas, steps=1500, lr=0.01, batch_size=128, generator=generator)
    true = world.strengths(5000)
    for alpha, one in zip(alphas, stack, strict=True):
        cosine, nearest = (world.features @ one.directions.T).max(dim=1)
        lost = (true - one.encode(true @ world.features)[:, nearest])[true > 0.6]
        assert cosine.min() > 0.97
        assert lost.mean().item() == pytest.approx(alpha * d / 2, abs=0.015)


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="topk"):
        toy.train_stack(make_world(), "topk", 4, [0.1], steps=1, lr=0.1, batch_size=2, generator=torch.Generator())


def test_jobs_side_by_side_keep_their_order_and_the_number_of_threads():
    before = torch.get_num_threads()
    found = toy.side_by_side(lambda a, b: (a * b, torch.get_num_threads()), [(1, 2), (3, 4), (5, 6)])
    assert found == [(2, 1), (12, 1), (30, 1)]
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        toy.side_by_side(lambda a: 1 / a, [(0,)])
    assert torch.get_num_threads() == before
