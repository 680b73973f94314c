"""The smoke profile end to end in a temporary data folder, as `make replicate PROFILE=smoke` runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from saelib.paths import RAW, ROOT

pytestmark = pytest.mark.pipeline
STEMS = ["00_overview", "01_collect_activations", "02_train_dictionaries", "03_baselines", "04_autointerp", "05_ioi"]
STEMS += ["06_case_studies", "07_verdict"]


def command_line(data: Path, profile: str, *extra: str) -> dict:
    """Arguments of subprocess for what `make replicate` runs, with data and figures in `data`."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        ROOT / "workflow/Snakefile",
        "--directory",
        data / "runs",
    ]
    command += [
        "--nolock",
        "--rerun-incomplete",
        "--cores",
        str(os.cpu_count()),
        "--config",
        f"profile={profile}",
        *extra,
    ]
    environment = os.environ | {"SAELIB_DATA": str(data), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return {"args": command, "env": environment, "cwd": ROOT}


def snakemake(data: Path, *extra: str, profile: str = "smoke") -> str:
    done = subprocess.run(**command_line(data, profile, *extra), capture_output=True, text=True)
    return f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The data folder of a smoke run that was killed with SIGKILL while it harvested, and then run again."""
    data = tmp_path_factory.mktemp("data")
    (data / "raw").symlink_to(RAW)
    (data / "runs").mkdir()
    started = subprocess.Popen(
        **command_line(data, "smoke"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not list((data / "runs").glob("smoke/activations/*/manifest.json")):
        assert started.poll() is None and time.monotonic() < deadline, "the smoke run did not get as far as the harvest"
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (data / "runs/smoke/metrics/02_train_dictionaries.json").exists()
    log = snakemake(data)
    assert log.startswith("exit 0"), log[-4000:]
    return data


def modified(data):
    return {stem: (data / "runs/smoke/metrics" / f"{stem}.json").stat().st_mtime_ns for stem in STEMS}


def test_smoke_makes_executed_notebooks_metrics_and_figures(smoke):
    for stem in STEMS:
        cells = nbformat.read(smoke / "runs/smoke/notebooks" / f"{stem}.ipynb", as_version=4).cells
        counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
        assert json.loads((smoke / "runs/smoke/metrics" / f"{stem}.json").read_text())["profile"] == "smoke"
    assert (smoke / "figures/smoke/fig6_tradeoff.png").stat().st_size > 10_000
    # the notebooks of the repository and its figures are not touched by a moved data folder
    assert not (smoke / "runs/smoke/notebooks/02_train_dictionaries.failed.ipynb").exists()


def test_a_model_that_fails_the_task_gets_no_verdict(smoke):
    """Of the two selecting prompts of the smoke profile the model solves one, below the floor."""
    record = json.loads((smoke / "runs/smoke/metrics/05_ioi.json").read_text())
    assert record["stop"].startswith("the model names the indirect object in 50% of the prompts, not in 70%")
    assert {row["verdict"] for row in record["found"]} | {row["rule"] for row in record["ratios"]} == {record["stop"]}
    cells = nbformat.read(smoke / "runs/smoke/notebooks/05_ioi.ipynb", as_version=4).cells
    (claims,) = (cell for cell in cells if cell.cell_type == "code" and "claims.done()" in cell.source)
    printed = claims.outputs[0]["text"]
    assert record["stop"] in printed and "G:" not in printed


def test_a_second_run_does_nothing(smoke):
    before = modified(smoke)
    log = snakemake(smoke)
    assert log.startswith("exit 0") and "Nothing to be done" in log
    assert modified(smoke) == before


def test_a_changed_parameter_reruns_what_depends_on_it_and_nothing_else(smoke, tmp_path):
    before = modified(smoke)
    text, section = (ROOT / "notebooks/profiles/smoke.yaml").read_text(), "06_case_studies:\n"
    (tmp_path / "smoke.yaml").write_text(text.replace(section, f"{section}  seed: 1\n"))
    log = snakemake(smoke, f"profiles={tmp_path}")
    assert log.startswith("exit 0"), log[-4000:]
    after = modified(smoke)
    assert {stem for stem in STEMS if after[stem] != before[stem]} == {"06_case_studies", "07_verdict"}  # it reads 06


def test_an_unknown_profile_stops_before_anything_runs(smoke):
    log = snakemake(smoke, profile="laptob")
    assert not log.startswith("exit 0")
    assert "no profile 'laptob': known profiles are" in log and "laptop" in log
    assert not (smoke / "runs/laptob").exists()
