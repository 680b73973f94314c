"""Fragments are cut where the activations are, carry the right codes, and features that cannot be tested are counted."""

import pytest
import torch
from conftest import RESIDUAL

from saelib import dictionaries, fragments
from saelib.store import ActivationStore


@pytest.fixture(scope="module")
def held_out(harvested):
    return ActivationStore(harvested / RESIDUAL, "held_out", outlier_factor=None)


@pytest.fixture
def tied(held_out):
    return dictionaries.TiedSAE(24, held_out.d, generator=torch.Generator().manual_seed(0))


def test_the_code_at_a_token_is_that_of_the_model_at_that_token(rows, held_out, tied, llama_forward):
    cut = fragments.cut(rows.held_out, held_out, seed=0, length=5)
    code = fragments.codes(tied, held_out, cut, torch.tensor([3, 0]), size=16)
    inside = llama_forward(rows.held_out.long())[RESIDUAL]
    for fragment, place, got in zip(cut.tokens, cut.place, code, strict=True):
        row, position = place // 15, place % 15 + 1  # the first of 16 positions was not harvested
        assert torch.equal(rows.held_out[row, position].long(), fragment)
        wanted = tied.encode(inside[row, position].float())[:, [3, 0]]
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-5)


def test_cuts_are_whole_distinct_and_the_same_for_the_same_seed(rows, held_out):
    first, again, other = (fragments.cut(rows.held_out, held_out, seed=seed, length=4) for seed in (0, 0, 1))
    assert len(first) == 12 * 3 and torch.equal(first.place, again.place) and not torch.equal(first.place, other.place)
    assert len(first.place.flatten().unique()) == first.place.numel()
    assert len(first[:5]) == 5 and torch.equal(first[:5].tokens, first.tokens[:5])
    assert torch.equal(first[3:5].place, first.place[3:5])


def test_a_fragment_with_a_separator_is_dropped(rows, held_out):
    whole = fragments.cut(rows.held_out, held_out, seed=0, length=4)
    mark = int(whole.tokens[2, 1])
    kept = fragments.cut(rows.held_out, held_out, seed=0, length=4, separator=mark)
    assert len(kept) == int((whole.tokens != mark).all(1).sum()) < len(whole)


def test_the_code_of_a_left_out_activation_is_not_known(rows, harvested, tied):
    store = ActivationStore(harvested / RESIDUAL, "held_out", outlier_factor=1.2)
    assert store.n_left_out > 0
    cut = fragments.cut(rows.held_out, store, seed=0, length=15)
    code = fragments.codes(tied, store, cut, torch.arange(4))
    assert int(code[..., 0].isnan().sum()) == store.n_left_out
    everything = ActivationStore(harvested / RESIDUAL, "held_out", outlier_factor=None)
    same = fragments.codes(
        tied, everything, fragments.cut(rows.held_out, everything, seed=0, length=15), torch.arange(4)
    )
    known = ~code.isnan()
    assert torch.equal(code[known], same[known])


def test_rows_of_another_run_and_too_long_fragments_are_refused(rows, held_out, tied):
    with pytest.raises(fragments.FragmentError, match="are not those of"):
        fragments.cut(rows.held_out[:5], held_out, seed=0)
    with pytest.raises(fragments.FragmentError, match="hold no fragment of 64"):
        fragments.cut(rows.held_out, held_out, seed=0)
    with pytest.raises(fragments.FragmentError, match="is for width 7"):
        cut = fragments.cut(rows.held_out, held_out, seed=0, length=4)
        fragments.codes(dictionaries.TiedSAE(9, 7), held_out, cut, torch.arange(2))


def made(columns):
    """60 fragments of 4 tokens, one feature per column of maxima; the maximum stands at a random place."""
    code = torch.zeros(60, 4, len(columns))
    for number, maxima in enumerate(columns):
        code[torch.arange(60), torch.arange(60) % 4, number] = torch.as_tensor(maxima, dtype=torch.float32)
    tokens = torch.arange(240).view(60, 4)
    return fragments.Fragments(tokens, tokens), code


def test_ranks_explain_score_and_no_fragment_twice():
    cut, code = made([torch.arange(60, 0, -1)])
    found, skipped = fragments.records(cut, code, torch.tensor([7]), generator=torch.Generator().manual_seed(0))
    (record,) = found
    assert record.feature == 7 and not skipped
    assert (record.explain[:, 0] // 4).tolist() == [0, 4, 8, 12, 16]
    assert (record.scored[:5, 0] // 4).tolist() == [2, 6, 10, 14, 18]
    used = torch.cat([record.explain, record.scored])[:, 0]
    assert len(used.unique()) == 15 and len(record.silent) == 0
    assert torch.equal(record.scored_activations.amax(1), 60.0 - record.scored[:, 0] // 4)


def test_random_fragments_are_active_and_silent_ones_are_not():
    cut, code = made([[1.0] * 25 + [0.0] * 35])
    for seed in range(5):
        (record,), _ = fragments.records(cut, code, torch.tensor([0]), generator=torch.Generator().manual_seed(seed))
        assert (record.scored_activations.amax(1) > 0).all()
        assert (record.silent // 4 >= 25).all() and len(record.silent) == 5


def test_features_that_cannot_be_tested_are_counted_by_reason():
    cut, code = made([[0.0] * 60, [1.0] * 19 + [0.0] * 41, [1.0] * 20 + [0.0] * 40, [0.0] * 60])
    code[..., 3] = 2.5  # the same at every token
    found, skipped = fragments.records(cut, code, torch.arange(4), generator=torch.Generator().manual_seed(0))
    assert [record.feature for record in found] == [2]
    assert skipped == {"dead": 1, "constant": 1, "fewer than 20 fragments": 1}


def test_integers_shown_to_the_explainer():
    shown = fragments.as_integers(torch.tensor([[-3.0, 0.0, 0.39], [2.0, 4.0, float("nan")]]))
    assert shown.tolist() == [[0, 0, 0], [5, 10, 0]]
    assert fragments.as_integers(torch.full((2, 2), -1.0)).tolist() == [[0, 0], [0, 0]]
