"""IOI prompts: pairs that differ in one token, sides that share nothing, and the task check by hand."""

import pytest
import torch
from conftest import TALE

from saelib import ioi

NAMES = [
    "sea",
    "green",
    "cat",
    "sleeps",
    "under",
    "old",
    "trees",
    "seven",
    "small",
    "birds",
    "sing",
    "rain",
    "warm",
    "hills",
]
TEMPLATES = [
    "when {b} and {a} go, {b} goes to",
    "as {b} and {a} are two, {b} is seen by",
    "a {object}: {b} and {a}; {b} to",
    "it is as it is: {b} and {a} are at one and {b} is to",
]


@pytest.fixture(scope="module")
def sides(tokenizer):
    return ioi.make_prompts(tokenizer, (10, 8), names=NAMES, templates=TEMPLATES)


def test_base_and_counterfactual_differ_in_the_indirect_object_only(sides):
    for side, n in zip(sides, (10, 8), strict=True):
        assert len(side) == n
        different = side.base != side.counterfactual
        assert (different.sum(1) == 1).all()
        rows = torch.arange(n)
        assert torch.equal(side.base[rows, side.first], side.io)
        assert torch.equal(side.counterfactual[rows, side.first], side.other)
        assert all(len({*three}) == 3 for three in torch.stack([side.io, side.subject, side.other], 1).tolist())


def test_prompts_begin_with_the_separator_and_end_in_the_last_column(sides, tokenizer):
    for side in sides:
        for row, start, text in zip(side.base.tolist(), side.start.tolist(), side.text, strict=True):
            assert row[start] == tokenizer.bos_token_id
            assert tokenizer.decode(row[start + 1 :]) == text
            assert not any(row[:start])
        assert (side.start == 0).any()
        assert (side.start > 0).any()


def test_the_subject_stands_twice_and_the_indirect_object_once(sides):
    for side in sides:
        real = torch.arange(side.base.shape[1]) >= side.start[:, None]
        assert (((side.base == side.subject[:, None]) & real).sum(1) == 2).all()
        assert (((side.base == side.io[:, None]) & real).sum(1) == 1).all()


def test_the_two_sides_share_no_name_template_or_prompt(sides):
    select, report = sides
    people = [{*side.io.tolist(), *side.subject.tolist(), *side.other.tolist()} for side in sides]
    assert not people[0] & people[1]
    unordered = [{t.replace("{a} and {b}", "{b} and {a}") for t in side.template} for side in sides]
    assert not unordered[0] & unordered[1]
    assert not {*select.text} & {*report.text}


def test_both_orders_are_there_equally_often(tokenizer):
    select, _ = ioi.make_prompts(tokenizer, (12, 1), names=NAMES, templates=TEMPLATES)
    assert sum("{b} and {a}" in template for template in select.template) == 6
    assert ioi.both_orders(["x {b} and {a}, {b} to"]) == ["x {b} and {a}, {b} to", "x {a} and {b}, {b} to"]


def test_a_seed_gives_the_same_prompts_again_and_another_seed_others(tokenizer, sides):
    again, other = (ioi.make_prompts(tokenizer, (10, 8), names=NAMES, templates=TEMPLATES, seed=s)[0] for s in (0, 1))
    assert again.text == sides[0].text
    assert other.text != again.text


def test_our_own_templates_have_the_form_that_they_must_have():
    for template in ioi.both_orders():
        clause = template.split("{place}")[0]
        assert template.count("{a}") == 1
        assert template.count("{b}") == 2
        assert ("{a}" in clause) != template.startswith("At the {place}")
        assert not template.startswith(("{a}", "{b}"))
    assert len({*ioi.NAMES}) == len(ioi.NAMES)


def test_names_are_filtered_to_single_tokens(tokenizer):
    assert ioi.single_token_names(tokenizer, ["sea", "Bartholomew", "cat"]) == ["sea", "cat"]
    assert "sea" in TALE


def test_a_tokenizer_without_such_names_is_refused(tokenizer):
    with pytest.raises(ioi.IOIError, match=r"only 1 of 3 names are one token of this model \(sea\)"):
        ioi.make_prompts(tokenizer, (2, 2), names=["sea", "Bartholomew", "Wilhelmina"], templates=TEMPLATES)
    with pytest.raises(ioi.IOIError, match=r"only 0 of 1 names .*\(none\)"):
        ioi.make_prompts(tokenizer, (2, 2), names=["Bartholomew"])


def test_too_few_templates_or_prompts_are_refused(tokenizer):
    with pytest.raises(ioi.IOIError, match="1 templates cannot be split"):
        ioi.make_prompts(tokenizer, (2, 2), names=NAMES, templates=TEMPLATES[:1])
    with pytest.raises(ioi.IOIError, match="0 prompts asked for"):
        ioi.make_prompts(tokenizer, (2, 0), names=NAMES, templates=TEMPLATES)
    with pytest.raises(ioi.IOIError, match="3 names and 2 templates give fewer than 500 different prompts"):
        ioi.make_prompts(tokenizer, (2, 500), names=NAMES[:6], templates=TEMPLATES[:2])


def test_pairs_of_unequal_length_or_equal_prompts_are_refused():
    with pytest.raises(ioi.IOIError, match="pair 1: 3 and 2 tokens"):
        ioi.paired([[1, 2], [1, 2, 3]], [[1, 3], [1, 2]])
    with pytest.raises(ioi.IOIError, match="pair 0: base and counterfactual are the same"):
        ioi.paired([[1, 2]], [[1, 2]])


def test_the_task_check_by_hand(sides):
    prompts = sides[0]
    logits = torch.zeros(len(prompts), 320)
    logits[torch.arange(10), prompts.io] = 3.0
    logits[torch.arange(10), prompts.subject] = 1.0
    table = ioi.solves(logits, prompts)
    assert table[["accuracy", "prefers"]].to_numpy().min() == 1
    assert (table["difference"] == 2).all()
    assert table["n"].sum() == 10
    assert ioi.failing(table, 0.9) == ""
    logits[0, prompts.subject[0]] = 7.0
    table = ioi.solves(logits, prompts)
    first = table.loc[prompts.template[0]]
    n = prompts.template.count(prompts.template[0])
    assert first["accuracy"] == pytest.approx(1 - 1 / n)
    assert first["difference"] == pytest.approx(2 - 6 / n)
    assert ioi.failing(table, 0.9) == ""
    assert "in 90% of the prompts, not in 95%" in ioi.failing(table, 0.95)
