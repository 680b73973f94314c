"""Indirect object identification (IOI): prompt pairs that differ in the indirect object only, and whether a model solves them.

The task is that of Wang et al. (2022, arXiv 2211.00593) as the paper uses it (section 4; its code:
test_datasets/ioi_counterfact.py). The sentences are our own, in the same form: two people, a place, an object, one gives.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

#: {b} is the subject S, {a} the indirect object IO; each ends where the IO must follow. This is the order BABA.
TEMPLATES = (
    "After {b} and {a} came back from the {place}, {b} gave a {object} to",
    "When {b} and {a} met at the {place}, {b} gave a {object} to",
    "Yesterday {b} and {a} walked to the {place}. {b} passed a {object} to",
    "While {b} and {a} were waiting at the {place}, {b} gave a {object} to",
    "Last week {b} and {a} drove to the {place}, and {b} gave a {object} to",
    "In the morning {b} and {a} went to the {place}, where {b} gave a {object} to",
    "Then {b} and {a} had a quiet talk at the {place}. Afterwards {b} said to",
    "The friends {b} and {a} found a {object} at the {place}. {b} gave it to",
    "At the {place}, {b} and {a} saw a {object}. {b} decided to give it to",
    "Once {b} and {a} had reached the {place}, {b} gave a {object} to",
    "On Sunday {b} and {a} were working at the {place}, and {b} gave a {object} to",
    "As soon as {b} and {a} got to the {place}, {b} decided to give a {object} to",
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "station", "library")
OBJECTS = ("ring", "book", "letter", "ticket", "basket", "drink", "map", "coat")
NAMES = (
    "Aaron", "Adam", "Alan", "Alex", "Alice", "Amy", "Andrew", "Anna", "Anthony", "Barbara", "Ben", "Brian", "Carol",
    "Charles", "Chris", "Claire", "Daniel", "David", "Diana", "Edward", "Elizabeth", "Emily", "Emma", "Eric", "Frank",
    "George", "Grace", "Helen", "Henry", "Jack", "Jacob", "James", "Jane", "Jason", "Jean", "Jennifer", "Jessica", "Jim",
    "Joe", "John", "Jonathan", "Joseph", "Julia", "Karen", "Kate", "Kevin", "Laura", "Linda", "Lisa", "Lucy", "Margaret",
    "Maria", "Mark", "Martin", "Mary", "Matthew", "Michael", "Michelle", "Mike", "Nancy", "Nick", "Nicole", "Patrick",
    "Paul", "Peter", "Rachel", "Richard", "Robert", "Rose", "Ruth", "Ryan", "Sam", "Samuel", "Sarah", "Scott", "Simon",
    "Sophie", "Stephen", "Steve", "Steven", "Susan", "Thomas", "Tim", "Tom", "Victoria", "William",
)  # fmt: skip


class IOIError(ValueError):
    """Prompts cannot be made as asked; the message says what is missing and what to change."""


@dataclass(frozen=True)
class Prompts:
    """Pairs of prompts, padded on the left so that the last column is the one that predicts the name.

    ``base`` and ``counterfactual`` [n, pos] token ids; ``start`` [n] the column of the first token of each; ``io``,
    ``subject`` and ``other`` [n] the ids of the indirect object, the subject and the name that replaces the indirect object;
    ``template`` and ``text`` one string per pair.
    """

    base: Tensor
    counterfactual: Tensor
    start: Tensor
    io: Tensor
    subject: Tensor
    other: Tensor
    template: list[str]
    text: list[str]

    def __len__(self) -> int:
        return len(self.base)

    @property
    def first(self) -> Tensor:
        """[n] the first column in which base and counterfactual differ: nothing before it can change."""
        return (self.base != self.counterfactual).int().argmax(1)


def both_orders(templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every template as it is (BABA) and with the two names of its first clause exchanged (ABBA)."""
    return [one for baba in templates for one in (baba, baba.replace("{b} and {a}", "{a} and {b}", 1))]


def single_token_names(tokenizer, names: Sequence[str] = NAMES) -> list[str]:
    """The names that are one token of `tokenizer` after a space."""
    return [name for name in names if len(_ids(tokenizer, f" {name}")) == 1]


def make_prompts(
    tokenizer,
    sizes: tuple[int, int],
    *,
    seed: int = 0,
    separator: str = "<|endoftext|>",
    names: Sequence[str] = NAMES,
    templates: Sequence[str] = TEMPLATES,
) -> tuple[Prompts, Prompts]:
    """Prompts to select features with and prompts to report on, `sizes` of each.

    Each side has half of the usable names and half of the templates (each in both orders), none of which the other has, so
    that no prompt, name or sentence is shared. Templates take turns; names, places and objects are drawn from `seed`.
    Every prompt begins with `separator`, as the rows of notebook 01 do.

    Raises `IOIError` when fewer than six names are single tokens of this tokenizer or there are fewer than two templates.
    """
    usable = single_token_names(tokenizer, names)
    if len(usable) < 6:
        raise IOIError(
            f"only {len(usable)} of {len(names)} names are one token of this model ({', '.join(usable) or 'none'}); three for "
            "each side are needed: give `names` that its tokenizer knows"
        )
    if len(templates) < 2:
        raise IOIError(f"{len(templates)} templates cannot be split into two sides: give two or more")
    draw = random.Random(seed)
    usable, templates = draw.sample(usable, len(usable)), draw.sample(list(templates), len(templates))
    return tuple(
        _fill(tokenizer, n, both_orders(templates[side::2]), usable[side::2], separator, draw)
        for side, n in enumerate(sizes)
    )


def _fill(tokenizer, n: int, templates: list[str], names: list[str], separator: str, draw: random.Random) -> Prompts:
    if n < 1:
        raise IOIError(f"{n} prompts asked for: ask for one or more")
    pairs, people, seen = [], [], set()
    for _ in range(100 * n):
        if len(pairs) == n:
            break
        template, (a, b, c) = templates[len(pairs) % len(templates)], draw.sample(names, 3)
        things = {"place": draw.choice(PLACES), "object": draw.choice(OBJECTS)}
        text, other = (template.format(a=who, b=b, **things) for who in (a, c))
        if text not in seen:
            seen.add(text)
            pairs.append((template, text, other))
            people.append([_ids(tokenizer, f" {name}")[0] for name in (a, b, c)])
    if len(pairs) < n:
        raise IOIError(
            f"{len(names)} names and {len(templates)} templates give fewer than {n} different prompts: ask for fewer"
        )
    chosen, base, counterfactual = zip(*pairs, strict=True)
    ids = ([_ids(tokenizer, separator + text) for text in side] for side in (base, counterfactual))
    return Prompts(*paired(*ids), *torch.tensor(people).T, list(chosen), list(base))


def paired(base: Sequence[list[int]], counterfactual: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of both sides padded on the left, [n, pos], and the column of each pair's first token, [n].

    Raises `IOIError` for a pair of unequal length, or one that does not differ.
    """
    for number, (one, two) in enumerate(zip(base, counterfactual, strict=True)):
        if len(one) != len(two):
            raise IOIError(
                f"pair {number}: {len(one)} and {len(two)} tokens; positions can only be compared at equal length: use names "
                "that are one token each"
            )
        if one == two:
            raise IOIError(f"pair {number}: base and counterfactual are the same prompt, so there is nothing to patch")
    longest = max(map(len, base))
    left, right = (
        torch.tensor([[0] * (longest - len(row)) + list(row) for row in side]) for side in (base, counterfactual)
    )
    return left, right, torch.tensor([longest - len(row) for row in base])


def solves(logits: Tensor, prompts: Prompts) -> pd.DataFrame:
    """How a model with `logits` [n, vocab] at the last position of the base prompts does, by template.

    ``accuracy``: share of prompts whose most likely next token is the indirect object; ``prefers``: share in which it is more
    likely than the subject; ``difference``: mean logit of the indirect object minus that of the subject; ``n`` prompts.
    """
    rows = torch.arange(len(prompts))
    logits = logits.float().cpu()
    difference = logits[rows, prompts.io] - logits[rows, prompts.subject]
    table = pd.DataFrame({
        "template": prompts.template,
        "accuracy": (logits.argmax(1) == prompts.io).double().numpy(),
        "prefers": (difference > 0).double().numpy(),
        "difference": difference.numpy(),
        "n": 1,
    })  # fmt: skip
    return table.groupby("template", sort=False).agg(
        {"accuracy": "mean", "prefers": "mean", "difference": "mean", "n": "sum"}
    )


def failing(table: pd.DataFrame, floor: float) -> str:
    """ "" if the model is right on at least `floor` of the prompts of `table` (from `solves`); else a sentence that says so.

    Which features carry an answer that the model does not give is no question: a notebook must stop short of conclusions.
    """
    accuracy = (table["accuracy"] * table["n"]).sum() / table["n"].sum()
    if accuracy >= floor:
        return ""
    return f"the model names the indirect object in {accuracy:.0%} of the prompts, not in {floor:.0%}: no conclusion is drawn"


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
