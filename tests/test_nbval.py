"""nbval over the committed notebooks, and proof that it fails when a claim's code is altered."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from saelib.paths import NOTEBOOKS, RAW, ROOT


def nbval(data: Path, *notebooks: Path) -> subprocess.CompletedProcess:
    """Run the notebooks in the order given, with data and figures in `data`, so that the checkout stays clean."""
    if not (data / "raw").exists():
        (data / "raw").symlink_to(RAW)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "1800"]
    command += ["--nbval-sanitize-with", ROOT / "tests/nbval_sanitize.cfg", "-p", "no:cacheprovider"]
    command += ["--rootdir", data, "-c", os.devnull, *notebooks]
    environment = os.environ | {"SAELIB_DATA": str(data), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.notebooks
def test_the_committed_notebooks_run_and_their_checked_cells_agree(tmp_path):
    left_out = os.environ.get("NBVAL_LEAVES_OUT", "").split()  # .ci/run says when and why
    paths = [path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if path.stem[:2] not in left_out]
    assert len(paths) >= 6
    done = nbval(tmp_path, *paths)
    assert done.returncode == 0, done.stdout[-6000:]


def altered(tmp_path, *changes):
    """A copy of notebook 00 with the `changes` (old, new) made in its code, for one seed."""
    notebook = nbformat.read(NOTEBOOKS / "00_overview.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for old, new in [("seeds = [0, 1, 2]", "seeds = [0]"), *changes]:
                cell.source = cell.source.replace(old, new)
    path = tmp_path / "00_overview.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.pipeline
def test_nbval_fails_when_a_claims_code_is_altered_and_when_a_checked_output_changes(tmp_path):
    """One run for both, a minute each: different cells fail, and nbval goes on after the first. That the notebook passes when
    nothing is altered is the test above."""
    claim = 'results["autoencoder"].min()', 'results["pca"].min()'
    output = "true_features=world.features", "true_features=world.features[:-1]"
    done = nbval(tmp_path, altered(tmp_path, claim, output))
    assert done.returncode == 1
    assert "ClaimFailed" in done.stdout and "MMCS of the sparse autoencoder, worst seed: measured" in done.stdout
    assert "127 x 64" in done.stdout
