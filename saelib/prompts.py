"""What language models are asked, and how replies are read: explanation, simulation, detection, fuzzing.

`show` goes from a token id to its text everywhere.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from saelib import models
from saelib.autointerp import Explainer, Malformed, Simulator, TokenRules
from saelib.fragments import N_RANDOM, Record, as_integers
from saelib.language_models import Chat, LanguageModel, Local, Reply

EXPLANATION_TOKENS = 60  # at most, as in the paper's code
DIGITS = [str(digit) for digit in range(10)]


def explanation_messages(record: Record, show: Callable[[int], str]) -> list[dict]:
    """The explainer's prompt: five fragments, a token and its integer (0 to 10) a line; where fewer than a fifth of the
    tokens are above 0, those are listed again (paper, App. A; interpret.py of its code)."""
    levels = as_integers(record.explain_activations)
    parts = []
    for tokens, level in zip(record.explain.tolist(), levels.tolist(), strict=True):
        lines = [f"{_line(show(token))}\t{value}" for token, value in zip(tokens, level, strict=True)]
        parts.append("\n".join(lines))
        active = [line for line, value in zip(lines, level, strict=True) if value > 0]
        if 0 < len(active) < len(lines) / 5:
            parts.append("Of these, above 0:\n" + "\n".join(active))
    task = (
        "A feature inside a language model reacts to something in a text. You see five fragments, a token and the feature's "
        "strength (0 to 10) on each line. Say in one short phrase what the feature reacts to. Reply with that phrase alone."
    )
    return [{"role": "system", "content": task}, {"role": "user", "content": "\n\n".join(parts)}]


def simulation_messages(explanation: str, texts: list[str]) -> list[dict]:
    """The simulator's prompt for one fragment: numbered tokens, to be answered by number and one digit a line."""
    task = (
        "A feature inside a language model reacts to what is described below. Predict its strength at each numbered token "
        "from 0 (silent) to 9 (strongest); most tokens are 0. Reply with one line per token: its number, a space, one "
        "digit. Nothing else."
    )
    listing = "\n".join(f"{number} {_line(text)}" for number, text in enumerate(texts, 1))
    return [
        {"role": "system", "content": task},
        {"role": "user", "content": f"Feature: {explanation}\n\nTokens:\n{listing}"},
    ]


def _line(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]  # a line break in a token must not break the list


def parse_digits(reply: Reply, n: int) -> list[float]:
    """Strengths of `n` tokens from the simulator's reply: the expected digit under the top log-probabilities where there
    are any, else the digit itself. Raises `Malformed` unless the reply is just the lines 1 to n."""
    found = list(re.finditer(r"^[ \t]*(\d+)[ \t]+(\d)[ \t]*$", reply.text, flags=re.M))
    if [int(match[1]) for match in found] != list(range(1, n + 1)) or len(reply.text.split()) != 2 * n:
        raise Malformed(f"wanted {n} lines of a number and a digit, got {reply.text[:80]!r}")
    if not reply.top:
        return [float(match[2]) for match in found]
    ends, end = [], 0
    for token, _ in reply.top:
        ends.append(end := end + len(token))
    values = []
    for match in found:
        candidates = reply.top[next(place for place, end in enumerate(ends) if end > match.start(2))][1]
        weights = [0.0] * 10
        for candidate, logprob in candidates.items():
            if candidate.strip() in DIGITS:
                weights[int(candidate)] += math.exp(logprob)
        values.append(sum(k * w for k, w in enumerate(weights)) / sum(weights) if sum(weights) else float(match[2]))
    return values


@dataclass(frozen=True)
class PhraseExplainer:
    """An `Explainer` by any `LanguageModel`: the explanation is a short phrase."""

    model: LanguageModel
    show: Callable[[int], str]

    def explain(self, record: Record) -> str:
        text = self.model.complete(explanation_messages(record, self.show), EXPLANATION_TOKENS).text
        if not text.strip():
            raise Malformed("the explanation is empty")
        return " ".join(text.split())


@dataclass(frozen=True)
class ChatSimulator:
    """A `Simulator` by a chat model: one request per fragment, answered token by token with a digit (see `parse_digits`)."""

    model: Chat
    show: Callable[[int], str]

    def simulate(self, explanation: str, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        prompts = [simulation_messages(explanation, [self.show(token) for token in row]) for row in tokens.tolist()]
        return torch.tensor([parse_digits(self.model.complete(prompt, 8 * n), n) for prompt in prompts])


@dataclass(frozen=True)
class LocalSimulator:
    """A `Simulator` by a model in process, all tokens of a fragment in one forward pass (the paper's all-at-once method).

    Behind the explanation each token stands on a line of its own with "unknown" for its strength. The prediction is the
    expected value over the ten digits, sum_k k p_k / sum_k p_k, of the model's distribution at that place.
    """

    model: Local
    show: Callable[[int], str]

    @torch.inference_mode()
    def simulate(self, explanation: str, tokens: Tensor) -> Tensor:
        tokenizer = self.model.tokenizer
        task = "Below, each token of a text stands before a tab and the strength (0 to 9) of a feature that reacts to: "
        ids = self.model.prompt([{"role": "user", "content": f"{task}{explanation}"}])
        encode = partial(tokenizer.encode, add_special_tokens=False)
        unknown, digits = encode("unknown\n"), [encode(digit)[-1] for digit in DIGITS]
        result = torch.zeros(tokens.shape)
        for row, values in zip(tokens.tolist(), result, strict=True):
            whole, places = list(ids), []
            for token in row:
                whole += encode(f"{_line(self.show(token))}\t")
                places.append(len(whole) - 1)
                whole += unknown
            where = torch.tensor(places, device=self.model.model.device)
            batch = torch.tensor([whole], device=where.device)
            logits = self.model.model(batch, use_cache=False, logits_to_keep=where).logits[0, :, digits].float()
            values.copy_(logits.softmax(1).cpu() @ torch.arange(10.0))
        return result


def choose(
    kind: str, show: Callable[[int], str], *, length: int, model: str, replies: Path, cap: int, device="cpu"
) -> tuple[Explainer, Simulator]:
    """Explainer and simulator by name: ``"tokens"`` with rules of at most `length` patterns, ``"local"`` with `model` in
    process, ``"chat"`` with the endpoint of the environment, its replies kept in the folder `replies` and capped by `cap`."""
    if kind == "tokens":
        rules = TokenRules(length=length, show=lambda token: repr(show(token)))
        return rules, rules
    if kind == "local":
        local = Local(model, device=device, dtype=models.fast_dtype(device))
        return PhraseExplainer(local, show), LocalSimulator(local, show)
    if kind == "chat":
        chat = Chat(replies, cap=cap)
        return PhraseExplainer(chat, show), ChatSimulator(chat, show)
    raise ValueError(f"no explainer '{kind}': use tokens, chat or local")


def estimate(records: list[Record], show: Callable[[int], str]) -> dict[str, int]:
    """What `PhraseExplainer` and `ChatSimulator` will ask for `records`: requests, and tokens at four bytes each (a few
    tokens a line in a reply). Print it before the first request."""
    prompts, replies, requests = 0, 0, 0
    for record in records:
        asked = [explanation_messages(record, show)]
        asked += [simulation_messages("x" * 200, [show(token) for token in row]) for row in record.scored.tolist()]
        prompts += sum(len(message["content"].encode()) for messages in asked for message in messages) // 4
        replies += EXPLANATION_TOKENS + 5 * record.scored.numel()
        requests += len(asked)
    return {"requests": requests, "prompt tokens": prompts, "reply tokens": replies}


# Detection and fuzzing: does the explanation tell fragments, and tokens, apart? (delphi, scorers/classifier)


def detection(model: LanguageModel, explanation: str, record: Record, show, *, generator: torch.Generator) -> float:
    """Balanced accuracy of the model at telling the random activating fragments from silent ones by the explanation."""
    texts = [["".join(map(show, row)) for row in part.tolist()] for part in (record.scored[N_RANDOM:], record.silent)]
    return _judge(model, f"Feature: {explanation}\n\nIn which of these fragments is it active?", *texts, generator)


def fuzzing(model: LanguageModel, explanation: str, record: Record, show, *, generator: torch.Generator) -> float:
    """Balanced accuracy at telling right marks from wrong ones: the random activating fragments with << >> around the tokens
    above 0, and silent fragments with marks in the same places."""
    levels = record.scored_activations[N_RANDOM:].nan_to_num(0.0) > 0
    right = [list(_marked(row, level, show)) for row, level in zip(record.scored[N_RANDOM:], levels, strict=True)]
    wrong = [list(_marked(row, level, show)) for row, level in zip(record.silent, levels, strict=False)]
    texts = [["".join(text) for text in part] for part in (right, wrong)]
    return _judge(model, f"Feature: {explanation}\n\nIn which fragments are the marks << >> right?", *texts, generator)


def _marked(row: Tensor, level: Tensor, show) -> Iterator[str]:
    for token, marked in zip(row.tolist(), level.tolist(), strict=True):
        yield f"<<{show(token)}>>" if marked else show(token)


def _judge(model: LanguageModel, question: str, yes: list[str], no: list[str], generator: torch.Generator) -> float:
    """Balanced accuracy over `yes` and `no` in random order; NaN if a feature is nowhere silent. Raises `Malformed`."""
    if not yes or not no:
        return float("nan")
    order = torch.randperm(len(yes) + len(no), generator=generator).tolist()
    listing = "\n\n".join(f"{number}. {(yes + no)[place]}" for number, place in enumerate(order, 1))
    ask = f"{question}\n\n{listing}\n\nReply with {len(order)} digits, 1 for yes and 0 for no, separated by commas."
    text = model.complete([{"role": "user", "content": ask}], 4 * len(order)).text
    if not re.fullmatch(rf"\s*[01](\s*,\s*[01]){{{len(order) - 1}}}\s*\.?\s*", text):
        raise Malformed(f"wanted {len(order)} digits 0 or 1, got {text[:80]!r}")
    said = dict(zip(order, re.findall(r"[01]", text), strict=True))
    hits = [said[place] == "1" for place in range(len(yes))]
    rejections = [said[len(yes) + place] == "0" for place in range(len(no))]
    return (sum(hits) / len(hits) + sum(rejections) / len(rejections)) / 2
