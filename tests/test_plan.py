"""The plan on paper: the page is what the script prints, and its arithmetic is right where a hand can check it."""

import sys

import pytest

from saelib.paths import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
import plan


def test_the_page_is_what_the_script_prints():
    assert (ROOT / "docs/plan.md").read_text() == plan.page(), "run `python workflow/plan.py > docs/plan.md`"


def test_bytes_and_hours_by_hand():
    found = plan.costs(plan.MODELS[0], 50e6)
    assert found["layer"] == 50e6 * 512 * 2 == 51.2e9 and found["all"] == 6 * 51.2e9
    assert found["training"] == pytest.approx(
        96 * 50e6 / 1024 * 0.6e-3 / 3600
    )  # steps so small that launching them is all
    assert found["reading"] == pytest.approx(51.2 / 3 / 3600 * 96)
    flops = 50e6 * 16 * 36 * 10 * 2 * 5120**2  # activations, alphas, layers, five products of two operations, R, d^2
    assert plan.costs(plan.MODELS[-1], 50e6)["training"] == pytest.approx(flops / (989e12 * 0.25) / 3600)


def test_the_parameters_of_the_blocks_are_pythias():
    """Non-embedding parameters as EleutherAI states them: 18.9M, 302.3M, 2.52B, 11.3B."""
    stated = (18_915_328, 302_311_424, 2_517_652_480, 11_327_027_200)
    assert [model.parameters for model in plan.MODELS] == pytest.approx(stated, rel=0.01)


def test_every_size_gets_a_row_and_what_breaks_grows_with_it():
    table = plan.table()
    assert len(table) == len(plan.MODELS) * len(plan.ACTIVATIONS) == 8
    assert plan.breaks(plan.costs(plan.Model("tiny", 2, 64), 1e6)).startswith("nothing")
    assert plan.breaks(plan.costs(plan.MODELS[-1], 1e9)).startswith("the token table")
