"""Profiles are checked against the notebooks, and every fault is explained by notebook and parameter."""

import nbformat
import pytest

from saelib import profiles

FIRST = """
profile = "laptop"  # profile; name; -
n_rows = 100  # rows of text; count; paper: many; range 1..1000
rate = 1.0e-3  # learning rate; -; paper: 1e-3; range 0..1
kind = "tied"  # form of the dictionary; one of tied | untied
"""
SECOND = """
n_rows = 100  # rows of text; count
alphas = [1.0e-3, 3.0e-3]  # weights of the L1 term; -; range 0..1
hooks = ["mlp", "resid"]  # places; one of mlp | resid | attn
centre = False  # take off the mean
"""


def write_notebook(path, *cells: tuple[str, list]) -> None:
    made = [nbformat.v4.new_code_cell(source.strip(), metadata={"tags": tags}) for source, tags in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)


@pytest.fixture
def load(tmp_path):
    """Load a profile with the given YAML for the notebooks 01_first and 02_second."""
    (tmp_path / "profiles").mkdir()
    write_notebook(tmp_path / "01_first.ipynb", ("import torch", []), (FIRST, ["parameters"]), ("print(1)", []))
    write_notebook(tmp_path / "02_second.ipynb", (SECOND, ["parameters"]))
    write_notebook(tmp_path / "scratch.ipynb", ("x = 1", []))

    def load(text: str, name: str = "tiny") -> dict:
        (tmp_path / "profiles" / "tiny.yaml").write_text(text)
        return profiles.load(name, folder=tmp_path / "profiles", notebooks=tmp_path)

    return load


def fault(load, text: str) -> str:
    with pytest.raises(profiles.ProfileError) as caught:
        load(text)
    return str(caught.value)


def test_an_empty_profile_gives_the_notebooks_defaults_and_its_own_name(load):
    assert load("") == {
        "01_first": {"profile": "tiny", "n_rows": 100, "rate": 1e-3, "kind": "tied"},
        "02_second": {"n_rows": 100, "alphas": [1e-3, 3e-3], "hooks": ["mlp", "resid"], "centre": False},
    }


def test_an_unknown_profile_lists_the_known(load):
    with pytest.raises(profiles.ProfileError, match="no profile 'huge': known profiles are tiny"):
        load("", name="huge")


def test_an_override_wins_in_its_notebook_only(load):
    made = load("01_first: {n_rows: 7, kind: untied}")
    assert (made["01_first"]["n_rows"], made["01_first"]["kind"]) == (7, "untied")
    assert made["02_second"]["n_rows"] == 100


def test_shared_applies_to_every_notebook_that_has_the_parameter(load):
    made = load("shared: {n_rows: 7, centre: true}")
    assert made["01_first"]["n_rows"] == made["02_second"]["n_rows"] == 7
    assert made["02_second"]["centre"] is True and "centre" not in made["01_first"]


def test_an_override_wins_over_shared_also_back_to_the_default(load):
    made = load("shared: {n_rows: 7}\n02_second: {n_rows: 100}")
    assert (made["01_first"]["n_rows"], made["02_second"]["n_rows"]) == (7, 100)


def test_an_unknown_parameter_is_named_with_its_notebook_and_what_that_has(load):
    message = fault(load, "01_first: {n_row: 7}")
    assert "01_first: unknown parameter 'n_row'; it has profile, n_rows, rate, kind" in message


def test_a_shared_parameter_of_no_notebook_is_named(load):
    assert "shared: no notebook has a parameter 'n_row'" in fault(load, "shared: {n_row: 7}")


def test_a_section_of_no_notebook_is_named_with_those_there_are(load):
    message = fault(load, "03_third: {n_rows: 7}")
    assert "section '03_third' is no notebook; there are shared, 01_first, 02_second" in message


@pytest.mark.parametrize("text", ["1e-3", "1e3", "2E-4"])
def test_a_number_that_yaml_reads_as_text_is_explained(load, text):
    message = fault(load, f"01_first: {{rate: {text}}}")
    assert f"01_first: parameter 'rate' = '{text}'" in message
    assert f"YAML reads {text} as text: write {float(text):.1e} with a point" in message


def test_the_same_trap_inside_a_list_is_explained(load):
    message = fault(load, "02_second: {alphas: [1.0e-3, 1e-2]}")
    assert "parameter 'alphas.1' = '1e-2'" in message and "YAML reads 1e-2 as text" in message


@pytest.mark.parametrize(
    "section, parameter, value",
    [
        ("01_first", "n_rows", "0"),
        ("01_first", "n_rows", "1001"),
        ("01_first", "rate", "-0.1"),
        ("02_second", "alphas", "[0.1, 1.5]"),
    ],
)
def test_a_value_out_of_range_is_named(load, section, parameter, value):
    message = fault(load, f"{section}: {{{parameter}: {value}}}")
    assert f"{section}: parameter '{parameter}" in message and "should be" in message


@pytest.mark.parametrize("value", ["1", "1000"])
def test_the_ends_of_a_range_are_inside(load, value):
    assert load(f"01_first: {{n_rows: {value}}}")["01_first"]["n_rows"] == int(value)


@pytest.mark.parametrize(
    "section, parameter, value",
    [
        ("01_first", "n_rows", "1.5"),
        ("01_first", "n_rows", "many"),
        ("01_first", "n_rows", "true"),
        ("01_first", "n_rows", "[5]"),
        ("01_first", "rate", "null"),
        ("01_first", "kind", "3"),
        ("02_second", "alphas", "0.1"),
        ("02_second", "alphas", "[]"),
        ("02_second", "alphas", "[a]"),
        ("02_second", "centre", "0"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(load, section, parameter, value):
    assert f"{section}: parameter '{parameter}" in fault(load, f"{section}: {{{parameter}: {value}}}")


def test_a_whole_number_does_for_a_float(load):
    assert load("01_first: {rate: 1}")["01_first"]["rate"] == 1.0


def test_a_string_that_is_no_choice_is_refused_with_the_choices(load):
    message = fault(load, "01_first: {kind: topk}")
    assert "01_first: parameter 'kind' = 'topk'" in message and "'tied' or 'untied'" in message
    message = fault(load, "02_second: {hooks: [mlp, nose]}")
    assert "parameter 'hooks.1' = 'nose'" in message and "'attn'" in message


def test_an_override_that_repeats_the_default_is_refused(load):
    assert "02_second: 'n_rows' repeats the notebook's default" in fault(load, "02_second: {n_rows: 100}")


def test_all_faults_are_told_at_once(load):
    message = fault(load, "shared: {nose: 1}\n01_first: {n_rows: 0, ear: 1}\n09_none: {}")
    for part in ("'nose'", "'n_rows'", "'ear'", "'09_none'"):
        assert part in message


@pytest.mark.parametrize("n_tagged", [0, 2])
def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path, n_tagged):
    write_notebook(tmp_path / "01_a.ipynb", *[("x = 1", ["parameters"])] * n_tagged, ("y = 2", []))
    with pytest.raises(profiles.ProfileError, match=rf"01_a.ipynb: {n_tagged} cells are tagged"):
        profiles.parameters_cell(tmp_path / "01_a.ipynb")


def test_a_parameters_cell_may_hold_only_assignments(tmp_path):
    write_notebook(tmp_path / "01_a.ipynb", ("import os\nx = 1", ["parameters"]))
    with pytest.raises(profiles.ProfileError, match=r"01_a.ipynb: .*only assignments"):
        profiles.defaults(tmp_path / "01_a.ipynb")


def test_a_parameter_that_is_no_literal_is_refused_by_name(tmp_path):
    write_notebook(tmp_path / "01_a.ipynb", ("x = max(1, 2)", ["parameters"]))
    with pytest.raises(profiles.ProfileError, match=r"01_a.ipynb: parameter 'x' is not a literal"):
        profiles.defaults(tmp_path / "01_a.ipynb")
