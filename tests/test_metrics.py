"""FVU, L0, alive features, MMCS and the bootstrap, by hand."""

import numpy as np
import pytest
import torch

from saelib import metrics
from saelib.dictionaries import TiedSAE


def identity(d: int = 4) -> TiedSAE:
    """The dictionary of the axes: perfect for activations that are not negative."""
    made = TiedSAE(d, d)
    with torch.no_grad():
        made.weight.copy_(torch.eye(d))
    return made


@pytest.fixture
def x():
    """600 non-negative activations: three groups of the bootstrap."""
    return torch.rand(600, 4, generator=torch.Generator().manual_seed(0))


def test_a_perfect_dictionary_has_fvu_0(x):
    found = metrics.evaluate(identity(), [x], x.mean(0))
    assert found.fvu == pytest.approx(0, abs=1e-12)
    assert found.fvu_interval == pytest.approx((0, 0), abs=1e-12)


def test_a_dictionary_that_returns_the_mean_has_fvu_1(x):
    made = identity()
    made.mean.copy_(x.mean(0))
    with torch.no_grad():
        made.bias.fill_(-100)
    found = metrics.evaluate(made, [x], x.mean(0))
    assert found.fvu == pytest.approx(1, rel=1e-6)
    assert (found.l0, found.alive) == (0, 0)


def test_fvu_by_hand():
    made = identity(2)
    x = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [2.0, 4.0]])  # only the -3 is lost
    found = metrics.evaluate(made, [x], torch.zeros(2))
    assert found.fvu == pytest.approx(9 / (1 + 9 + 4 + 16))


def test_l0_and_alive_by_hand():
    x = torch.zeros(40, 4)
    x[:, 0] = 1  # feature 0: 40 times
    x[:11, 1] = 1  # feature 1: 11 times, just alive
    x[:10, 2] = 1  # feature 2: 10 times, just not; feature 3: never
    found = metrics.evaluate(identity(), [x], x.mean(0))
    assert found.l0 == pytest.approx(61 / 40)
    assert found.alive == 0.5
    assert found.window == 40
    assert metrics.evaluate(identity(), [x], x.mean(0), alive_above=9).alive == 0.75


def test_the_cutting_into_chunks_changes_nothing(x):
    whole = metrics.evaluate(identity(), [x - 0.3], x.mean(0))
    parts = metrics.evaluate(identity(), (x - 0.3).split(77), x.mean(0))
    assert whole == parts


def test_the_intervals_of_an_evaluation_hold_its_figures(x):
    found = metrics.evaluate(identity(), [(x - 0.3).repeat(5, 1)], x.mean(0))
    assert found.fvu_interval[0] < found.fvu < found.fvu_interval[1]
    assert found.l0_interval[0] < found.l0 < found.l0_interval[1]


def test_the_bootstrap_interval_contains_the_estimate_and_shrinks_with_n():
    widths = []
    for n in (20, 200, 2000):
        random = np.random.default_rng(0)
        numerator, denominator = random.random(n), 1 + random.random(n)
        low, high = metrics.bootstrap_ratio(numerator, denominator)
        assert low < numerator.sum() / denominator.sum() < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_the_bootstrap_covers_the_truth_about_95_times_in_100():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        numerator = random.exponential(0.5, 100)
        low, high = metrics.bootstrap_ratio(numerator, np.ones(100), resamples=300)
        hits += low < 0.5 < high
    assert 178 <= hits <= 198


def test_the_bootstrap_is_the_same_each_time():
    values = np.arange(1.0, 50)
    assert metrics.bootstrap_ratio(values, values**2) == metrics.bootstrap_ratio(values, values**2)


def test_mmcs_by_hand():
    a = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    b = torch.tensor([[0.6, 0.8], [-5.0, 0.0]])
    # row (1, 0): cosines 0.6 and -1; row (0, -1): cosines -0.8 and 0
    torch.testing.assert_close(metrics.max_cosine(a, b), torch.tensor([0.6, 0.0]))
    assert metrics.mmcs(a, b) == pytest.approx(0.3)


def test_mmcs_of_a_dictionary_with_itself_and_with_itself_shuffled_is_1():
    a = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.mmcs(a, a) == pytest.approx(1, rel=1e-6)
    assert metrics.mmcs(a, 7 * a.flip(0)) == pytest.approx(1, rel=1e-6)


def test_mmcs_is_not_symmetric():
    a = torch.tensor([[1.0, 0.0]])
    b = torch.eye(2)
    assert metrics.mmcs(a, b) == pytest.approx(1)
    assert metrics.mmcs(b, a) == pytest.approx(0.5)


def test_one_to_one_by_hand():
    a = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[0.8, 0.6], [0.0, 2.0]])
    # cosines: (1, 0) with b: 0.8 and 0; (0.6, 0.8) with b: 0.96 and 0.8. Both rows prefer the first of b
    torch.testing.assert_close(metrics.max_cosine(a, b), torch.tensor([0.8, 0.96]))
    # 0.8 + 0.8 beats 0 + 0.96, which is what the closest pair first would give
    torch.testing.assert_close(metrics.one_to_one(a, b), torch.tensor([0.8, 0.8]))


def test_one_to_one_finds_a_shuffled_and_scaled_copy():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 8, generator=generator)
    b = torch.cat([torch.randn(20, 8, generator=generator), 5 * a])[torch.randperm(50, generator=generator)]
    torch.testing.assert_close(metrics.one_to_one(a, b), torch.ones(30))
    assert metrics.one_to_one(b, a).shape == (30,)
    assert metrics.one_to_one(b, a).sum() == pytest.approx(30, rel=1e-6)


def test_a_direction_that_occurs_twice_is_matched_once():
    a = torch.eye(2)[[0, 0]]
    found = metrics.one_to_one(a, torch.eye(2))
    assert sorted(found.tolist()) == [0, 1]
    assert (found > 0.9).float().mean() == 0.5
    assert metrics.mmcs(a, torch.eye(2)) == pytest.approx(1)


def test_one_to_one_is_never_above_the_maximum():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 6, generator=generator), torch.randn(60, 6, generator=generator)
    assert (metrics.one_to_one(a, b) <= metrics.max_cosine(a, b) + 1e-6).all()


def test_one_to_one_takes_weights_that_want_a_gradient():
    made = identity()
    assert metrics.one_to_one(made.weight, made.directions).tolist() == pytest.approx([1, 1, 1, 1])
