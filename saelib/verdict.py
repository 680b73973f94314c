"""From measured parts to a verdict on each statement of the paper, and to the README's table (``make verdict``).

A statement has parts, each of which is measured by itself. The rules stand here and know nothing of the results: what a
part may be is in `OUTCOMES`, what follows from the parts in `judge`. Statements and parts are in notebook 07.
"""

import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from saelib import files, paths, profiles

#: yes, no: the interval lies on one side, or the order held everywhere (nowhere); note: shown, not judged.
OUTCOMES = ("yes", "no", "undecided", "absent", "note")
VERDICTS = ("replicated", "partly", "not replicated", "not testable")
MARK = "<!-- verdict -->"
TABLE = paths.ROOT / "figures" / "laptop" / "x_verdict.csv"  # committed; what notebook 07 made


class VerdictError(ValueError):
    """The table of verdicts or the README is not as it must be; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """One measured part: `what` was asked, its `outcome` (of OUTCOMES), and what is `shown` of the numbers."""

    what: str
    outcome: str
    shown: str = ""

    def __post_init__(self):
        if self.outcome not in OUTCOMES:
            raise VerdictError(f"part '{self.what}': outcome '{self.outcome}' is none of {', '.join(OUTCOMES)}")


@dataclass(frozen=True)
class Statement:
    """What the paper says (`text`) and where (`place`), the notebook that tests it, its parts, and what `differs` here."""

    place: str
    notebook: str
    text: str
    parts: Sequence[Part] = field(repr=False)
    differs: str = ""


def interval(what: str, rows: Sequence[dict], *, above: float | None = None, below: float | None = None) -> Part:
    """Whether a value lies on one side of a bound in every row: yes if all 95% intervals do, no if one lies wholly on the
    other side, undecided otherwise. Shown is the row nearest to failing.

    A row has ``value``, ``low`` and ``high``; one without an interval (None, NaN) makes the part undecided, no row makes it
    absent. Give exactly one of `above` and `below`.
    """
    if (above is None) == (below is None):
        raise VerdictError(f"part '{what}': give exactly one of above and below")
    if not rows:
        return Part(what, "absent", "not measured in this profile")
    sign, bound = (1, above) if below is None else (-1, below)
    ends = [sorted((_margin(row["low"], bound, sign), _margin(row["high"], bound, sign))) for row in rows]
    worst = rows[min(range(len(rows)), key=lambda place: ends[place][0])]
    outcome = "no" if any(high < 0 for _, high in ends) else "yes" if all(low > 0 for low, _ in ends) else "undecided"
    return Part(what, outcome, number(worst) + (f", worst of {len(rows)}" if len(rows) > 1 else ""))


def within(what: str, row: dict | None, *, low: float, high: float) -> Part:
    """Whether the interval of `row` lies in `low` to `high` (yes), wholly outside (no), or neither (undecided)."""
    if row is None:
        return Part(what, "absent", "not measured in this profile")
    inside, outside = low <= row["low"] and row["high"] <= high, row["high"] < low or row["low"] > high
    return Part(what, "yes" if inside else "no" if outside else "undecided", number(row))


def order(what: str, held: Sequence[bool], shown: str = "", *, of: str = "seeds") -> Part:
    """Whether an order held everywhere (yes), nowhere (no) or in some `of` the cases (undecided); absent without a case."""
    held = [bool(each) for each in held]
    if not held:
        return Part(what, "absent", "not measured in this profile")
    count = f"{sum(held)} of {len(held)} {of}" if len(held) > 1 else ""
    outcome = "yes" if all(held) else "undecided" if any(held) else "no"
    return Part(what, outcome, ", ".join(filter(None, (shown, count))))


def judge(parts: Sequence[Part], *, judged: bool = True) -> tuple[str, str]:
    """Verdict and reason: every part yes is replicated, some are partly, none is not replicated; nothing measured, or a
    profile whose size allows no verdict (`judged` false), is not testable. A part that is absent bars "replicated"."""
    if not judged:
        return "not testable", "this profile is too small for a verdict"
    groups = {outcome: [part for part in parts if part.outcome == outcome] for outcome in OUTCOMES}
    measured = sum(len(groups[outcome]) for outcome in ("yes", "no", "undecided"))
    if not measured:
        return "not testable", "; ".join(dict.fromkeys(part.shown for part in groups["absent"])) or "it has no part"
    verdict = "partly" if groups["yes"] else "not replicated"
    if len(groups["yes"]) == measured and not groups["absent"]:
        return "replicated", f"all {measured} parts hold" if measured > 1 else "its one part holds"
    said = {"yes": "holds", "no": "fails", "undecided": "undecided", "absent": "not measured"}
    listed = [f"{word}: {', '.join(part.what for part in groups[name])}" for name, word in said.items() if groups[name]]
    return verdict, "; ".join(listed)


def table(statements: Sequence[Statement], *, judged: bool = True) -> pd.DataFrame:
    """A row per statement: place, notebook, statement, verdict, here (what was measured), reason, beside (the notes), parts
    (the outcomes, for the figure)."""
    rows = []
    for one in statements:
        verdict, reason = judge(one.parts, judged=judged)
        asked, notes = ([p for p in one.parts if (p.outcome == "note") == note] for note in (False, True))
        here, beside = ("; ".join(f"{part.what}: {part.shown}" for part in parts) for parts in (asked, notes))
        if all(part.outcome == "absent" for part in asked):
            here = "; ".join(dict.fromkeys(part.shown for part in asked))  # the same reason once
        reason = "; ".join(filter(None, (reason, one.differs)))
        rows.append(
            [one.place, one.notebook, one.text, verdict, here, reason, beside, " ".join(p.outcome for p in asked)]
        )
    return pd.DataFrame(
        rows, columns=["place", "notebook", "statement", "verdict", "here", "reason", "beside", "parts"]
    )


def read_metrics(profile: str, last: str) -> dict[str, dict]:
    """``metrics/<stem>.json`` of every notebook before `last`, by the two digits of its stem.

    Raises `paths.MissingArtefact` naming the notebook whose file is missing.
    """
    folder = paths.run_dir(profile) / "metrics"
    stems = [stem for stem in profiles.stems() if stem < last]
    return {stem[:2]: files.read_json(paths.require(folder / f"{stem}.json", stem)) for stem in stems}


def pick(rows: Sequence[dict], value: str = "value", /, **wanted) -> list[dict]:
    """The rows whose entries equal `wanted`, each with its entry `value` under the name "value" too; for `interval`."""
    found = [row for row in rows if all(row.get(name) == each for name, each in wanted.items())]
    return [row | {"value": row[value]} for row in found if row.get(value) is not None]


def number(row: dict) -> str:
    """``0.18 [0.12, 0.24]``: the value with its interval, where there is one."""
    value, ends = row["value"], [row.get("low"), row.get("high")]
    if any(end is None or math.isnan(end) for end in ends):
        return f"{value:.2f}, no interval"
    return f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def _margin(end: float | None, bound: float, sign: int) -> float:
    """How far `end` lies on the wanted side of `bound`; 0 (undecided) where there is no interval."""
    return 0.0 if end is None or math.isnan(end) else sign * (end - bound)


def readme_block(verdicts: pd.DataFrame) -> str:
    """The README's lines between the marks, from the columns of `table`."""
    lines = [", ".join(f"{(verdicts['verdict'] == name).sum()} {name}" for name in VERDICTS) + ".", ""]
    lines += ["| the paper says | verdict | here |", "|---|---|---|"]
    for row in verdicts.itertuples():
        here = row.here.replace("<", "&lt;").replace("|", r"\|").replace("\n", " ")  # tokens of the model may be in it
        place = f"[{row.place}](notebooks/{row.notebook}.ipynb)"
        lines.append(f"| {place}: {row.statement} | {row.verdict} | {here} |")
    return "\n".join(lines)


def with_block(text: str, block: str) -> str:
    """`text` with `block` between the two marks. Raises `VerdictError` unless there are exactly two."""
    parts = text.split(MARK)
    if len(parts) != 3:
        raise VerdictError(
            f"README.md has {len(parts) - 1} marks '{MARK}': it must have two, and the table is put between"
        )
    return f"{parts[0]}{MARK}\n{block}\n{MARK}{parts[2]}"


def read_table(path: Path = TABLE) -> pd.DataFrame:
    """The committed table of the laptop run, as notebook 07 wrote it beside its figure."""
    text = paths.require(path, "07_verdict").read_text(encoding="utf-8")
    return pd.read_csv(io.StringIO(re.sub(r"\A(#.*\n)*", "", text)), keep_default_na=False)


def main() -> None:
    """Write the README's table from the committed one."""
    readme = paths.ROOT / "README.md"
    text = with_block(readme.read_text(encoding="utf-8"), readme_block(read_table()))
    with files.atomic(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (VerdictError, paths.MissingArtefact) as error:
        sys.exit(f"error: {error}")
