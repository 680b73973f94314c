"""saelib.cases: halves, search for a token's feature, purity, histograms, contexts; on planted features and tiny rows."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import MARK, RESIDUAL

from saelib import cases, dictionaries, paths, store


@pytest.fixture(scope="module")
def held_out(harvested):
    return store.ActivationStore(harvested / RESIDUAL, "held_out", outlier_factor=None)


@pytest.fixture(scope="module")
def text(rows, held_out):
    return cases.read(rows, held_out)


class Planted(dictionaries.TiedSAE):
    """Features whose codes are given: row k of `codes` [n, features] belongs to the activation `x` [n, d] of row k."""

    def plant(self, x, planted):
        self.x, self.planted = x, planted
        return self

    def encode(self, x, features=dictionaries.ALL):
        return self.planted[torch.cdist(x.float(), self.x).argmin(1)][:, features]


@pytest.fixture(scope="module")
def planted(held_out, text):
    """For the commonest token: 0 above half on it alone and weak elsewhere, 1 pure on one place, 2 always on, 3 dead."""
    x = torch.cat(list(held_out.chunks(1000))).float()
    token = text.token.bincount().argmax()
    hit = (text.token == token).float()
    rare = torch.zeros(len(text))
    rare[(text.token == token).nonzero()[0]] = 5
    codes = torch.stack([4 * hit + (text.column % 2), rare, torch.ones(len(text)), torch.zeros(len(text))], 1)
    return Planted(4, held_out.d).plant(x, codes), int(token), hit.bool()


def test_read_knows_the_token_behind_every_activation(rows, held_out, text):
    assert len(text) == held_out.n == 12 * 15
    assert torch.equal(text.token, rows.held_out[text.row, text.column].long())
    assert (text.column >= 1).all() and torch.equal(text.document, rows.held_out_doc[text.row, text.column].long())
    for document in text.document.unique():
        assert len(text.select[text.document == document].unique()) == 1


def test_read_follows_what_a_store_leaves_out(rows, harvested):
    some = store.ActivationStore(harvested / RESIDUAL, "held_out", outlier_factor=1.02)
    assert some.n_left_out > 0
    text = cases.read(rows, some)
    assert torch.equal(text.token, rows.held_out[:, 1:].reshape(-1).long()[some.kept])


def test_read_refuses_rows_of_another_harvest(rows, held_out):
    with pytest.raises(cases.CaseError, match="are not those of"):
        cases.read(dataclasses.replace(rows, held_out=rows.held_out[:-1]), held_out)


def test_halves_share_no_document_and_hold_every_register():
    names = [f"{source}/{number}" for source in "ab" for number in range(8)]
    document = torch.repeat_interleave(torch.arange(16), torch.arange(16) % 8 + 1)
    select = cases.halves(document, names)
    sizes = torch.bincount(document)
    for source in (slice(0, 8), slice(8, 16)):
        assert sizes[source][select[source]].sum() == sizes[source][~select[source]].sum() == 18


def test_token_ids_and_a_target_that_is_not_one_token(tokenizer):
    assert cases.token_ids(tokenizer, ["."]) == {".": tokenizer.convert_tokens_to_ids(".")}
    with pytest.raises(cases.CaseError, match=r"'~~' is not one token of this model but 2 \('~', '~'\)"):
        cases.token_ids(tokenizer, [".", "~~"])
    with pytest.raises(cases.CaseError, match=r"but 0 \(nothing\)"):
        cases.token_ids(tokenizer, [""])


def test_search_takes_the_surely_purest_feature_with_the_recall(planted, held_out, text):
    dictionary, token, hit = planted
    found = cases.search(dictionary, held_out, text, {"it": token}, recall=0.5).iloc[0]
    mine = hit & text.select
    assert found["feature"] == 0  # not 1, which is pure but misses the recall, nor 2, which is always on
    assert found["occurrences"] == mine.sum() and found["recall"] == 1
    assert found["maximum"] == 5 and found["purity_above"] == 1
    on = (text.column % 2).bool() | hit
    assert found["purity"] == pytest.approx((mine.sum() / (on & text.select).sum()).item())
    assert (
        cases.search(dictionary, held_out, text, {"it": token}, recall=0.0).iloc[0]["feature"] == 0
    )  # one place proves little


def test_search_refuses_a_token_that_does_not_occur_and_a_recall_that_none_has(planted, held_out, text, tokenizer):
    dictionary, token, _ = planted
    absent = tokenizer.convert_tokens_to_ids(MARK) + 310
    assert absent not in text.token
    with pytest.raises(cases.CaseError, match="'absent' does not occur in the select half"):
        cases.search(dictionary, held_out, text, {"it": token, "absent": absent}, recall=0.5)
    quiet = Planted(4, held_out.d).plant(dictionary.x, dictionary.planted * torch.tensor([0.0, 1.0, 0.0, 0.0]))
    with pytest.raises(cases.CaseError, match=r"no feature at .* is active on 50% of 'it'"):
        cases.search(quiet, held_out, text, {"it": token}, recall=0.5)


def test_codes_refuse_a_dead_feature_and_another_width(planted, held_out):
    dictionary, _, hit = planted
    assert torch.equal(cases.codes(dictionary, held_out, [0])[:, 0] >= 4, hit)
    with pytest.raises(cases.CaseError, match=f"feature 3 at {RESIDUAL} is dead"):
        cases.codes(dictionary, held_out, [0, 3])
    with pytest.raises(cases.CaseError, match="width 8"):
        cases.codes(dictionaries.TiedSAE(4, 8), held_out, [0])


def test_a_layer_without_a_dictionary_is_named(tmp_path):
    with pytest.raises(
        paths.MissingArtefact, match=r"no dictionary in .*blocks.4.hook_resid_post.*02_train_dictionaries"
    ):
        dictionaries.find(tmp_path / "blocks.4.hook_resid_post", kind="tied", alpha=0.001)


def test_wilson_by_hand():
    low = cases.wilson(torch.tensor([8.0, 0.0, 80.0]), torch.tensor([10.0, 0.0, 100.0]))
    assert low.tolist() == pytest.approx([0.4902, 0.0, 0.7112], abs=1e-3)


def test_report_counts_the_other_half_alone(planted, text):
    dictionary, _, hit = planted
    found = cases.report(dictionary.planted[:, 0], text, hit, 5.0)
    mine, on = ~text.select, (text.column % 2).bool() | hit
    assert found["purity_above"] == 1 and found["n_purity_above"] == (hit & mine).sum()
    assert found["purity"] == pytest.approx(((hit & mine).sum() / (on & mine).sum()).item())
    assert found["purity_low"] <= found["purity"] <= found["purity_high"] and found["recall"] == 1
    nothing = cases.report(torch.zeros(len(text)), text, hit, 5.0)
    assert nothing["n_purity"] == 0 and np.isnan(nothing["purity_above"]) and nothing["recall"] == 0


def test_histogram_by_hand():
    value, token = torch.tensor([0.0, 1.0, 9.0, 9.5, 10.0, 10.0]), torch.tensor([3, 4, 5, 5, 5, 3])
    table = cases.histogram(value, token, bins=2, top=2)
    counts = table.pivot(index="bin", columns="token", values="count")
    assert counts[5].tolist() == [0, 3] and counts[3].tolist() == [1, 1] and counts[-1].tolist() == [1, 0]
    lone = torch.tensor([0.0, 9.0, 9.0, 9.0, 9.0]), torch.tensor([3, 4, 4, 5, 5])
    shown = [set(cases.histogram(*lone, bins=2, top=2, by_count=way)["token"]) for way in (False, True)]
    assert 3 in shown[0] and shown[1] == {4, 5, -1}  # alone in its bin, or commonest of all
    assert table["count"].sum() == 6 and table["low"].min() == 0 and table["high"].max() == 10


def test_contexts_are_of_the_report_half_one_a_document(planted, rows, text):
    dictionary, token, _ = planted
    found = cases.contexts(dictionary.planted[:, 0], text, rows.held_out, n=3, width=4)
    middle = found[found["offset"] == 0]
    for line in middle["context"]:
        tokens = found[found["context"] == line]["token"].tolist()
        row = next(
            r for r in range(12) if any(rows.held_out[r, i : i + len(tokens)].tolist() == tokens for i in range(16))
        )
        assert not text.select[text.row == row].all()
    assert len(middle) == 3 and (middle["token"] == token).all() and (middle["activation"] >= 4).all()
    for _, part in found.groupby("context"):
        assert part["offset"].is_monotonic_increasing and part["offset"].abs().max() <= 4
    assert cases.commonest(torch.tensor([5, 5, 7]), type("T", (), {"decode": lambda self, ids: str(ids[0])})()) == [
        "5",
        "7",
    ]
