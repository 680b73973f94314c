"""Lint of the notebooks: form, order, metadata, links to figures. No kernel is started."""

import ast
import re
import statistics

import nbformat
import pytest

from saelib import profiles
from saelib.paths import FIGURES, NOTEBOOKS, ROOT

PATHS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
ALL = [*PATHS, NOTEBOOKS / "_template.ipynb"]
HEADINGS = ["Question", "Parameters", "Set-up", "The idea", "From scratch", "Checks", "What we found", "Exercises",
            "Where this came from"]  # fmt: skip
READ = {path: nbformat.read(path, as_version=4) for path in ALL}


def code_cells(path):
    return [cell for cell in READ[path].cells if cell.cell_type == "code"]


def tagged(path, tag):
    return [cell for cell in READ[path].cells if tag in cell.metadata.get("tags", [])]


every = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
executed = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert [path.stem[:2] for path in PATHS] == [f"{number:02d}" for number in range(len(PATHS))]
    assert len(PATHS) >= 3


@every
def test_the_parameters_cell_is_one_and_holds_commented_literals(path):
    source = profiles.parameters_cell(path)
    assert profiles.defaults(path)
    assert all(re.fullmatch(r"\w+ = .+  # .+", line) for line in source.splitlines())
    profiles.schema(path)()  # the defaults fit their own ranges


@executed
def test_title_and_headings_are_those_of_the_template_in_order(path):
    text = "\n".join(cell.source for cell in READ[path].cells if cell.cell_type == "markdown")
    assert text.startswith(f"# {path.stem[:2]} · ")
    found = [heading for line in re.findall(r"^## (.+)$", text, flags=re.M)
             for heading in HEADINGS if line.startswith(heading)]  # fmt: skip
    assert found == HEADINGS


@every
def test_cells_are_short(path):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert max(lengths) <= 25
    assert statistics.median(lengths) <= 7


@every
def test_prose_carries_the_notebook(path):
    words = sum(len(cell.source.split()) for cell in READ[path].cells if cell.cell_type == "markdown")
    assert words / len(code_cells(path)) >= 40


@executed
def test_executed_once_from_top_to_bottom(path):
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))


@executed
def test_no_stored_error_and_no_injected_parameters(path):
    assert not [o for cell in code_cells(path) for o in cell.outputs if o.output_type == "error"]
    assert not tagged(path, "injected-parameters")


@executed
def test_checked_cells_have_output_and_no_stderr(path):
    checked = tagged(path, "nbval-check-output")
    assert 3 <= len(checked) <= 8
    for cell in checked:
        assert cell.outputs
        assert not [o for o in cell.outputs if o.get("name") == "stderr" or "image/svg+xml" in o.get("data", {})]


@every
def test_nothing_machine_specific_in_the_code(path):
    for cell in code_cells(path):
        ast.parse(cell.source)
        assert not re.search(r"^\s*[!%]|sys\.path|[\"']/(home|root|tmp|work|Users)/", cell.source, flags=re.M)
        assert not re.search(r"^\s*#\s*nbval|^\s*#\s*NBVAL", cell.source, flags=re.M)


@executed
def test_no_machine_path_in_the_outputs(path):
    text = "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for c in code_cells(path)
                   for o in c.outputs)  # fmt: skip
    assert str(ROOT) not in text
    assert not re.search(r"/(home|root|Users)/", text)


@every
def test_metadata_is_clean_and_the_file_small(path):
    assert set(READ[path].metadata) == {"kernelspec"}
    assert READ[path].metadata.kernelspec.name == "python3"
    assert all(set(cell.metadata) <= {"tags"} for cell in READ[path].cells)
    assert path.stat().st_size < 1_000_000


def saved_stems(path):
    return re.findall(r'plotting\.save\(\s*\w+,\s*"(\w+)"', "\n".join(cell.source for cell in code_cells(path)))


def test_every_saved_figure_is_listed_and_committed_with_its_numbers():
    listed = (FIGURES / "README.md").read_text()
    for path in PATHS:
        for stem in saved_stems(path):
            assert re.search(
                rf"^\| `{stem}` \|.*\| {path.stem[:2]} \| `plotting(_\w+)?\.{stem}` \|", listed, flags=re.M
            ), stem
            assert all((FIGURES / "laptop" / f"{stem}{ending}").exists() for ending in (".png", ".svg", ".csv")), stem


def test_every_listed_figure_is_still_made():
    made = {stem for path in PATHS for stem in saved_stems(path)}
    assert set(re.findall(r"^\| `(\w+)` \|", (FIGURES / "README.md").read_text(), flags=re.M)) == made


@pytest.mark.parametrize("profile", sorted(path.stem for path in profiles.PROFILES.glob("*.yaml")))
def test_every_profile_fits_the_notebooks(profile):
    assert set(profiles.load(profile)) == {path.stem for path in PATHS}
