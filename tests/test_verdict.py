"""Verdicts: the rules on parts, the table, the README's block, and that the README is not behind."""

import json
import math
import re

import nbformat
import pandas as pd
import pytest

from saelib import paths, profiles, verdict
from saelib.verdict import MARK, Part, Statement, VerdictError


def row(value, low, high, **more):
    return {"value": value, "low": low, "high": high} | more


@pytest.mark.parametrize(
    ("rows", "outcome"),
    [
        ([row(0.2, 0.1, 0.3)], "yes"),
        ([row(0.2, 0.1, 0.3), row(0.1, -0.1, 0.3)], "undecided"),
        ([row(0.2, 0.1, 0.3), row(-0.2, -0.3, -0.1)], "no"),
        ([row(0.2, 0.0, 0.3)], "undecided"),  # an interval that ends at the bound does not exclude it
        ([row(0.2, None, None)], "undecided"),
        ([row(0.2, 0.1, 0.3), row(0.2, math.nan, math.nan)], "undecided"),
        ([], "absent"),
    ],
)
def test_an_interval_part_asks_every_row(rows, outcome):
    assert verdict.interval("part", rows, above=0).outcome == outcome
    mirrored = [{name: value and -value for name, value in each.items()} for each in rows]
    mirrored = [row(each["value"], each["high"], each["low"]) for each in mirrored]
    assert verdict.interval("part", mirrored, below=0).outcome == outcome


def test_an_interval_part_shows_the_row_nearest_to_failing():
    rows = [row(0.5, 0.4, 0.6), row(0.2, 0.1, 0.3), row(0.4, 0.3, 0.5)]
    assert verdict.interval("part", rows, above=0).shown == "0.20 [0.10, 0.30], worst of 3"
    assert verdict.interval("part", rows, below=1).shown == "0.50 [0.40, 0.60], worst of 3"
    assert verdict.interval("part", [row(0.2, None, None)], above=0).shown == "0.20, no interval"


def test_an_interval_part_wants_exactly_one_bound():
    with pytest.raises(VerdictError, match="exactly one of above and below"):
        verdict.interval("part", [], above=0, below=1)
    with pytest.raises(VerdictError, match="exactly one of above and below"):
        verdict.interval("part", [])


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [((-0.05, 0.08), "yes"), ((-0.05, 0.2), "undecided"), ((0.11, 0.3), "no"), ((-0.3, -0.2), "no")],
)
def test_within_wants_the_whole_interval_inside(ends, outcome):
    assert verdict.within("flat", row(0, *ends), low=-0.1, high=0.1).outcome == outcome
    assert verdict.within("flat", None, low=-0.1, high=0.1).outcome == "absent"


def test_an_order_counts_where_it_held():
    held = {(True, True): "yes", (True, False): "undecided", (False, False): "no", (): "absent"}
    assert {flags: verdict.order("order", flags).outcome for flags in held} == held
    assert verdict.order("order", pd.Series([True, False]), "0.97", of="layers").shown == "0.97, 1 of 2 layers"
    assert verdict.order("order", [True], "0.97").shown == "0.97"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ("yes", "replicated"),
        ("yes yes note", "replicated"),
        ("yes no", "partly"),
        ("yes undecided", "partly"),
        ("yes absent", "partly"),
        ("no no", "not replicated"),
        ("undecided", "not replicated"),
        ("undecided absent", "not replicated"),
        ("absent absent", "not testable"),
        ("note", "not testable"),
        ("", "not testable"),
    ],
)
def test_the_verdict_follows_from_the_parts(outcomes, expected):
    parts = [Part(f"part {place}", outcome) for place, outcome in enumerate(outcomes.split())]
    found, reason = verdict.judge(parts)
    assert found == expected and found in verdict.VERDICTS and reason
    assert verdict.judge(parts, judged=False) == ("not testable", "this profile is too small for a verdict")


def test_the_reason_names_the_parts():
    parts = [Part("a", "yes"), Part("b", "no"), Part("c", "undecided"), Part("d", "absent", "no such layer")]
    assert verdict.judge(parts)[1] == "holds: a; fails: b; undecided: c; not measured: d"
    stop = "the model does not solve the task"
    assert verdict.judge([Part("a", "absent", stop), Part("b", "absent", stop)])[1] == stop


def test_an_unknown_outcome_is_refused():
    with pytest.raises(VerdictError, match="'maybe' is none of yes, no"):
        Part("size", "maybe")


def test_pick_takes_the_rows_that_fit_and_leaves_out_what_was_not_measured():
    rows = [{"against": "pca", "ratio": 2.0}, {"against": "ica", "ratio": 3.0}, {"against": "pca", "ratio": None}]
    assert verdict.pick(rows, "ratio", against="pca") == [{"against": "pca", "ratio": 2.0, "value": 2.0}]
    assert verdict.pick([{}], "ratio") == []


STATEMENTS = [
    Statement("Figure 2 (A)", "04_autointerp", "Features score higher", [Part("random", "yes", "0.20 [0.10, 0.30]")]),
    Statement(
        "Table 2",
        "04_autointerp",
        "A weak correlation",
        [Part("skew", "no", "0.1"), Part("hint", "note", "0.1")],
        "small",
    ),
]


def test_the_table_has_a_row_per_statement_and_says_what_differs():
    table = verdict.table(STATEMENTS)
    assert table["verdict"].tolist() == ["replicated", "not replicated"]
    assert table["here"].tolist() == ["random: 0.20 [0.10, 0.30]", "skew: 0.1"]
    assert table["beside"].tolist() == ["", "hint: 0.1"]
    assert table["reason"].tolist() == ["its one part holds", "fails: skew; small"]
    assert table["parts"].tolist() == ["yes", "no"]
    assert set(verdict.table(STATEMENTS, judged=False)["verdict"]) == {"not testable"}
    stopped = Statement("Figure 3", "05_ioi", "Fewer", [Part(what, "absent", "the model fails") for what in "ab"])
    row = verdict.table([stopped]).iloc[0]
    assert (row["verdict"], row["here"], row["reason"]) == ("not testable", "the model fails", "the model fails")


def test_the_block_counts_links_and_stands_between_the_marks():
    block = verdict.readme_block(verdict.table(STATEMENTS))
    assert block.splitlines()[0] == "1 replicated, 0 partly, 1 not replicated, 0 not testable."
    link = "[Figure 2 (A)](notebooks/04_autointerp.ipynb)"
    assert f"| {link}: Features score higher | replicated | random: 0.20 [0.10, 0.30] |" in block
    text = verdict.with_block(f"before\n{MARK}\nold\n{MARK}\nafter\n", block)
    assert text == f"before\n{MARK}\n{block}\n{MARK}\nafter\n" == verdict.with_block(text, block)
    with pytest.raises(VerdictError, match="has 1 marks"):
        verdict.with_block(f"before {MARK} after", block)


def test_text_of_a_model_neither_breaks_the_table_nor_becomes_markup(tmp_path):
    odd = Statement("Figure 4", "06_case_studies", "A feature", [Part('"#" or <|end|>: strong', "yes", "0.9")])
    path = tmp_path / "x_verdict.csv"
    path.write_text("# profile: laptop\n# notebook: 07_verdict\n" + verdict.table([odd]).to_csv(index=False))
    read = verdict.read_table(path)
    assert read.to_dict("records") == verdict.table([odd]).to_dict("records")
    last = verdict.readme_block(read).splitlines()[-1]
    assert last.endswith(r'| replicated | "#" or &lt;\|end\|>: strong: 0.9 |')


def test_missing_metrics_name_their_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    folder = tmp_path / "runs/tiny/metrics"
    folder.mkdir(parents=True)
    stems = [stem for stem in profiles.stems() if stem < "07_verdict"]
    for stem in stems:
        with pytest.raises(paths.MissingArtefact, match=f"Notebook {stem} makes it"):
            verdict.read_metrics("tiny", "07_verdict")
        (folder / f"{stem}.json").write_text(json.dumps({"profile": "tiny", "stem": stem}))
    read = verdict.read_metrics("tiny", "07_verdict")
    assert {two: one["stem"] for two, one in read.items()} == {stem[:2]: stem for stem in stems}


def test_the_readme_is_not_behind_the_committed_verdicts():
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    assert text == verdict.with_block(text, verdict.readme_block(verdict.read_table())), "run `make verdict`"


def test_a_readme_that_is_behind_is_not_the_same():
    table = verdict.table(STATEMENTS)
    text = verdict.with_block(f"{MARK}{MARK}", verdict.readme_block(table))
    for column, value in (
        ("verdict", "partly"),
        ("here", "0.19"),
        ("statement", "Another"),
        ("notebook", "03_baselines"),
    ):
        changed = table.assign(**{column: [value, table[column][1]]})
        assert text != verdict.with_block(text, verdict.readme_block(changed)), column


def test_the_committed_verdicts_are_those_of_the_committed_notebook():
    """Statements as in its source, counts as in its output: neither figure nor notebook is of another run."""
    cells = nbformat.read(paths.NOTEBOOKS / "07_verdict.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    source = "\n".join(cell.source for cell in code)
    outputs = "".join(str(output.get("text", "")) for cell in code for output in cell.outputs)
    table = verdict.read_table()
    assert len(table) >= 20
    assert re.search(r"\d+ replicated, .*", outputs)[0] == verdict.readme_block(table).splitlines()[0].removesuffix(".")
    assert [text for text in table["statement"] if text not in source] == []
