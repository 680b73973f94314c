"""The token rules find planted rules and nothing in noise; the score is Pearson's; the intervals cover."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from toy_features import COMMA, DIGITS, record, show

from saelib import autointerp
from saelib.autointerp import Malformed, Rule, TokenRules


@pytest.fixture
def rules():
    return TokenRules(show=show)


@pytest.mark.parametrize("number", range(3))
def test_planted_rules_score_near_one(rules, number):
    row = autointerp.score(record(number), rules, rules)
    assert min(row["both"], row["top"], row["random"]) > 0.9


def test_the_rule_names_the_planted_pattern(rules):
    assert rules.explain(record(1)).patterns[0] == (COMMA, None)
    assert {token for _, token in rules.explain(record(0)).patterns[:2]} == set(DIGITS)
    assert str(rules.explain(record(2))).startswith(" sea: ")


def test_shuffled_activations_score_near_zero(rules):
    generator = torch.Generator().manual_seed(0)
    mixed = [autointerp.shuffled(record(number % 3), generator) for number in range(30)]
    scores = [row["both"] for row in autointerp.score_all(mixed, rules, rules)[0]]
    assert abs(np.mean(scores)) < 0.1


def test_shuffling_keeps_tokens_and_values():
    one = record(0)
    mixed = autointerp.shuffled(one, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.scored, one.scored) and not torch.equal(mixed.scored_activations, one.scored_activations)
    assert torch.equal(mixed.scored_activations.flatten().sort().values, one.scored_activations.flatten().sort().values)


def test_the_explainer_reads_the_explainer_fragments_alone(rules):
    one = record(1)
    blind = dataclasses.replace(
        one, scored=one.scored * 0, scored_activations=one.scored_activations * 0, silent=one.silent * 0
    )
    assert rules.explain(one) == rules.explain(blind)


def test_the_first_pattern_that_fits_decides():
    rule = Rule(((1, 2), (None, 2), (1, None)), (9.0, 5.0, 2.0), 0.5)
    simulated = TokenRules().simulate(rule, torch.tensor([[1, 2, 2, 1, 7]]))
    assert simulated.tolist() == [[0.5, 9.0, 5.0, 0.5, 2.0]]


def test_what_stands_before_a_fragment_is_in_no_rule(rules):
    one = record(0)
    fires = torch.zeros_like(one.explain_activations)
    fires[:, 0] = 1.0
    rule = rules.explain(dataclasses.replace(one, explain_activations=fires))
    assert all(before is None or before >= 0 for before, _ in rule.patterns)


def test_a_feature_that_is_silent_where_it_is_explained_gives_an_empty_rule(rules):
    one = record(0)
    rule = rules.explain(dataclasses.replace(one, explain_activations=one.explain_activations * 0 - 1))
    assert rule.patterns == () and rule.otherwise == 0


def test_correlation_is_that_of_numpy_and_leaves_out_what_is_not_known():
    x, y = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    assert autointerp.correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    hidden = y.clone()
    hidden[:10] = torch.nan
    assert autointerp.correlation(x, hidden) == pytest.approx(np.corrcoef(x[10:], y[10:])[0, 1])
    assert autointerp.correlation(torch.ones(50), y) == 0.0
    assert np.isnan(autointerp.correlation(x, torch.ones(50)))


def test_malformed_replies_are_counted_and_skipped(rules):
    class Babbles:
        def simulate(self, explanation, tokens):
            if "sea" in explanation:
                raise Malformed("no digits")
            return tokens

    class Says:
        def explain(self, record):
            return ["a", "sea", "a"][record.feature]

    rows, malformed = autointerp.score_all([record(number) for number in range(3)], Says(), Babbles())
    assert [row["feature"] for row in rows] == [0, 2] and malformed == 1


def test_intervals_cover_and_leave_nan_out():
    values = np.random.default_rng(0).normal(0.3, 0.2, 400)
    mean, low, high = autointerp.mean_interval([*values, np.nan])
    assert mean == pytest.approx(values.mean()) and low < mean < high
    half = 1.96 * values.std(ddof=1) / 20
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert np.isnan(autointerp.mean_interval([np.nan])).all()


def test_the_interval_of_a_difference():
    draw = np.random.default_rng(0)
    a, b = draw.normal(0.5, 0.1, 200), draw.normal(0.4, 0.1, 100)
    mean, low, high = autointerp.difference_interval(a, b)
    assert mean == pytest.approx(a.mean() - b.mean()) and 0 < low < 0.1 < high < 0.2
    shared = draw.normal(0, 1, 100)
    _, low, high = autointerp.difference_interval(shared + 0.1, shared, paired=True)
    assert high - low < 1e-6


def test_summaries_group_and_keep_the_intervals():
    scores = pd.DataFrame(
        {"method": ["a", "a", "b"], "both": [0.1, 0.3, 0.5], "top": [0.2, 0.2, np.nan], "random": 0.0}
    )
    wide = autointerp.summary(scores, ["method"]).set_index("method")
    assert wide.loc["a", "both"] == pytest.approx(0.2) and wide.loc["a", "features"] == 2
    assert wide.loc["a", "both_low"] == pytest.approx(0.1) and np.isnan(wide.loc["b", "top"])
    long = autointerp.by_part(scores, ["method"])
    assert len(long) == 6 and set(long["part"]) == set(autointerp.PARTS)
    assert long[(long["part"] == "both") & (long["method"] == "b")]["mean"].item() == 0.5


def test_the_interval_of_a_correlation():
    draw = np.random.default_rng(0)
    x = draw.normal(size=400)
    value, low, high = autointerp.correlation_interval(x, x + draw.normal(size=400))
    assert value == pytest.approx(0.71, abs=0.06) and low < value < high and 0.05 < high - low < 0.2
