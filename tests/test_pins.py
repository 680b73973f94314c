"""environment.yml, pyproject.toml and requirements.lock name the same versions."""

import re
import tomllib

import yaml

from saelib.paths import ROOT


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines):
    return {canonical(line.split("==")[0]): line.strip().split("==")[1] for line in lines if "==" in line}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = pins(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
LOCK = pins(line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#"))
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def test_every_direct_dependency_is_pinned_exactly():
    assert len(DIRECT) == len(PROJECT["dependencies"]) + len(PROJECT["optional-dependencies"]["dev"])


def test_the_extra_for_slurm_is_pinned_exactly():
    assert list(pins(PROJECT["optional-dependencies"]["slurm"])) == ["snakemake-executor-plugin-slurm"]


def test_the_lock_holds_every_direct_pin():
    assert {name: LOCK.get(name) for name in DIRECT} == DIRECT


def test_environment_yml_holds_the_same_pins():
    assert pins(next(part["pip"] for part in CONDA["dependencies"] if isinstance(part, dict))) == DIRECT


def test_environment_yml_python_is_allowed_by_pyproject():
    python = next(part for part in CONDA["dependencies"] if str(part).startswith("python="))
    assert PROJECT["requires-python"] == ">=3.11"
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= (3, 11)


def test_torch_is_the_pinned_release():
    assert DIRECT["torch"] == "2.13.0"
