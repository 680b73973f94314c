"""Three features with a known rule on made-up fragments: what the tests and the recorded replies of the server share."""

import torch

from saelib.fragments import Record

TEXTS = [" the", " sea", " old", " rain", " trees", " hills", ",", ".", "\n", "3", "7", " sing"]
COMMA, DIGITS = TEXTS.index(","), (TEXTS.index("3"), TEXTS.index("7"))
RULES = ("digits", "after a comma", "the word sea")


def show(token: int) -> str:
    return TEXTS[token]


def record(number: int, length: int = 12) -> Record:
    """Feature `number` of RULES on 15 random fragments, each of which has it at least once; 5 fragments without it."""
    generator = torch.Generator().manual_seed(number)
    loud, quiet = [], []
    while len(loud) < 15 or len(quiet) < 5:
        tokens = torch.randint(len(TEXTS), (length,), generator=generator)
        before = torch.cat([torch.tensor([-1]), tokens[:-1]])
        fires = (torch.isin(tokens, torch.tensor(DIGITS)), before == COMMA, tokens == 1)[number].float()
        (loud if fires.any() else quiet).append((tokens, fires))
    tokens, fires = (torch.stack(part) for part in zip(*loud[:15], strict=True))
    silent = torch.stack([tokens for tokens, _ in quiet[:5]])
    return Record(number, tokens[:5], fires[:5], tokens[5:], fires[5:], silent)
