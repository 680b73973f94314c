"""Claims: stable lines, failures with values, bounds that cannot be forgotten."""

import math

import numpy as np
import pytest
import torch

from saelib import checks

BOUNDS = """
02_first:
  error falls: {at_most: 0.25, why: a reason}
  enough features: {at_least: 10}
  near the paper: {near: 2.0, rel: 0.1}
  in the band: {between: [0.1, 0.2]}
  order of methods: {at_least: 0.8, missed: 0.7 in every seed}
  on the bound: {at_most: 0.2, missed: 0.195 to 0.205 over runs, narrow: true}
"""


@pytest.fixture
def claims(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(BOUNDS)
    monkeypatch.setattr(checks, "EXPECTED", tmp_path)
    return checks.Claims("02_first", "tiny")


def test_no_measured_value_is_printed_only_name_and_bound(claims, capsys):
    claims.expect("error falls", 0.123456)
    claims.expect("enough features", 98765)
    claims.expect("near the paper", 2.0123)
    claims.expect("in the band", 0.15432)
    claims.done()
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["ok", "error falls: at most 0.25"],
        ["ok", "enough features: at least 10"],
        ["ok", "near the paper: near 2.0, rel 0.1"],
        ["ok", "in the band: between [0.1, 0.2]"],
    ]


def test_the_line_is_the_same_for_another_measured_value(claims, capsys):
    claims.expect("error falls", 0.1)
    first = capsys.readouterr().out
    claims.expect("error falls", 0.2)
    assert capsys.readouterr().out == first


def test_failures_are_raised_together_at_the_end_with_their_values(claims, capsys):
    claims.expect("error falls", 0.54321)
    claims.expect("enough features", 12)
    claims.expect("in the band", math.nan)
    printed = capsys.readouterr().out
    assert "0.54321" not in printed and printed.count("FAILED") == 2
    with pytest.raises(checks.ClaimFailed) as caught:
        claims.done()
    assert str(caught.value) == (
        "error falls: measured 0.54321, wanted at most 0.25; in the band: measured nan, wanted between [0.1, 0.2]"
    )


def test_a_recorded_miss_is_printed_as_one_and_raises_only_once_it_holds(claims, capsys):
    claims.expect("order of methods", 0.1)
    claims.done()
    claims.expect("order of methods", 0.9)
    assert capsys.readouterr().out == 2 * "known miss  order of methods: at least 0.8\n"
    with pytest.raises(checks.ClaimFailed, match="order of methods: a known miss holds now"):
        claims.done()


def test_a_miss_on_the_bound_never_raises(claims, capsys):
    for value in (0.195, 0.205):
        claims.expect("on the bound", value)
    claims.done()
    assert capsys.readouterr().out == 2 * "known miss  on the bound: at most 0.2\n"


def test_a_claim_without_a_bound_is_refused_with_the_known(claims):
    with pytest.raises(KeyError, match="no bound for the claim 'a new one'; known are error falls, enough features"):
        claims.expect("a new one", 1)


def test_a_profile_without_bounds_judges_nothing_and_says_so(claims, capsys):
    mine = checks.Claims("02_first", "mine")
    mine.expect("error falls", 99.0)
    mine.done()
    assert capsys.readouterr().out == "not judged  error falls (no bounds for this profile)\n"


@pytest.mark.parametrize(
    "value, bound, holds",
    [
        (1.0, {"at_least": 1.0}, True),
        (0.999, {"at_least": 1.0}, False),
        (1.0, {"at_most": 1.0}, True),
        (1.001, {"at_most": 1.0}, False),
        (0.1, {"between": [0.1, 0.2]}, True),
        (0.2, {"between": [0.1, 0.2]}, True),
        (0.21, {"between": [0.1, 0.2]}, False),
        (0.09, {"between": [0.1, 0.2]}, False),
        (-1.9, {"near": -2.0, "rel": 0.1}, True),
        (-2.3, {"near": -2.0, "rel": 0.1}, False),
        (0.05, {"near": 0.0, "abs": 0.1}, True),
        (-0.2, {"near": 0.0, "abs": 0.1}, False),
        (0.0, {"at_least": 0}, True),
    ],
)
def test_bounds(value, bound, holds):
    assert checks.judge(value, **bound) is holds
    assert checks.judge(np.float32(value) if holds is False else np.float64(value), **bound) is holds


BOUND_KINDS = [{"at_least": -9}, {"at_most": 9}, {"between": [-9, 9]}, {"near": 0, "abs": 9}, {"near": 1, "rel": 9}]


@pytest.mark.parametrize("bound", BOUND_KINDS)
def test_nan_keeps_no_bound(bound):
    assert checks.judge(math.nan, **bound) is False
    assert checks.judge(1.0, **bound) is True


@pytest.mark.parametrize(
    "bound",
    [{}, {"at_least": 1, "at_most": 2}, {"near": 1}, {"near": 1, "rel": 1, "abs": 1}, {"at_least": 1, "rel": 0.1}],
)
def test_anything_but_exactly_one_bound_is_refused(bound):
    with pytest.raises(ValueError, match="exactly one"):
        checks.judge(1.0, **bound)


def test_the_shape_card_prints_shapes_and_plain_values(capsys):
    checks.shape_card(x=torch.zeros(1200, 3), rate=np.zeros(2), rows=12345, name="tiny")
    assert capsys.readouterr().out.splitlines() == [
        "x     1,200 x 3  float32",
        "rate  2  float64",
        "rows  12,345",
        "name  tiny",
    ]


def test_seed_everything_fixes_every_source_of_chance():
    def draw():
        generator = checks.seed_everything(7)
        return torch.rand(2, generator=generator).tolist(), torch.rand(2).tolist(), np.random.rand(2).tolist()

    assert draw() == draw()
