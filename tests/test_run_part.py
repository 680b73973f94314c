"""The parts of a cluster run make what the notebooks would make: the notebooks' own cells are asked, with nothing trained."""

import importlib.util
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from saelib import paths, profiles
from saelib.training import TrainConfig

SPEC = importlib.util.spec_from_file_location("run_part", paths.ROOT / "workflow/run_part.py")
run_part = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_part)
PROFILES = sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


class Recorder:
    """Stands in for what trains and fits, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def open(self, folder, split="train", n_rows=None, **kept):
        return SimpleNamespace(hook=folder.name, n_rows=n_rows, kept=kept)

    def sweep(self, store, held_out, configs, folder, *, evaluations_per_pass, **options):
        assert (folder.parent.name, folder.name) == ("dictionaries", store.hook)
        self.asked += [
            (config, store.hook, store.n_rows, evaluations_per_pass, *store.kept.items()) for config in configs
        ]
        numbers = {"fvu": 0.5, "l0": 77.0, "alive": 1.0, "window": 1000}  # so a TopK of k = 77 depends on a result
        return [{"name": config.name, "hook": store.hook, **asdict(config), **numbers} for config in configs]

    def train(self, store, held_out, config, folder, **options):
        self.sweep(store, held_out, [config], folder, **options)
        return None, None

    def fitted(self, name, make, folder, store, **parameters):
        self.asked.append((name, folder.name, store.hook, *sorted(parameters.items())))
        return None, {"changes": [1.0]}


def run_cells(stem, names, namespace):
    """Execute the cells of a notebook that use one of `names`."""
    for cell in nbformat.read(paths.NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and any(name in cell.source for name in names):
            exec(cell.source, namespace)


@pytest.fixture
def made_by_parts(monkeypatch):
    """Function: what each part of a notebook under a profile asks for."""

    def made(profile, stem) -> dict:
        namespace = {"PARAMETERS": profiles.load(profile)}
        exec((paths.ROOT / "workflow/fan_out.smk").read_text().partition("\nfor stem")[0], namespace)
        found = {}
        for part in namespace["PARTS"][stem]:
            recorder = Recorder()
            monkeypatch.setattr(run_part.store, "ActivationStore", recorder.open)
            monkeypatch.setattr(run_part.training, "sweep", recorder.sweep)
            monkeypatch.setattr(run_part.baselines, "fitted", recorder.fitted)
            run_part.make(namespace["PARAMETERS"][stem], *part.rsplit("-", 1))
            found[part] = recorder.asked
        return found

    return made


@pytest.mark.parametrize("profile", PROFILES)
def test_the_parts_of_02_train_all_that_does_not_depend_on_a_result_and_nothing_twice(profile, made_by_parts):
    p, asked = profiles.load(profile)["02_train_dictionaries"], Recorder()
    run, kept = paths.run_dir(profile), {"outlier_factor": p["outlier_factor"]}

    def open_hook(hook, n_rows=None):
        return asked.open(run / "activations" / hook, "train", n_rows, **kept), None

    tools = {"training": SimpleNamespace(TrainConfig=TrainConfig, sweep=asked.sweep, train=asked.train)}
    tools |= {"device": "cpu", "products": None, "pd": pd, "replace": replace, "run": run, "open_hook": open_hook}
    tools["train_store"], tools["held_out"] = open_hook(p["main_hook"])
    run_cells("02_train_dictionaries", ("TrainConfig(", "trained("), p | tools)
    parts = made_by_parts(profile, "02_train_dictionaries")
    assert all(parts.values())
    together = [one for part in parts.values() for one in part]
    assert len({(config.name, hook) for config, hook, *_ in together}) == len(together)
    assert set(together) == {one for one in asked.asked if one[0].k != 77}


def test_two_parts_of_one_hook_never_train_the_same():
    """Not even where the ratio of the sweep is among the further ones."""
    p = profiles.load("laptop")["02_train_dictionaries"]
    found = run_part.groups(p | {"ratios": [0.5, p["main_ratio"], 8.0]})
    for groups in (("tied", "rivals", "sizes", "seeds"), ("tied_inner", "sizes_inner")):
        together = [config for group in groups for config in found[group]]
        assert len(set(together)) == len(together)
    assert {config.ratio for config in found["sizes_inner"]} == {0.5}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_parts_of_03_fit_every_ica_of_the_notebook(profile, made_by_parts):
    p, asked = profiles.load(profile)["03_baselines"], Recorder()
    hooks = [*p["other_hooks"], p["main_hook"], p["mlp_hook"]]
    tools = {"baselines": asked, "partial": partial, "pd": pd, "run": paths.run_dir(profile), "hooks": hooks}
    tools |= {"stores": {hook: asked.open(tools["run"] / hook) for hook in hooks}, "compared": lambda *made, with_: {}}
    run_cells("03_baselines", ("def keeper(", "def independent(", "= independent(", ": independent("), p | tools)
    together = [one for part in made_by_parts(profile, "03_baselines").values() for one in part]
    assert len(set(together)) == len(together) and set(together) == set(asked.asked)
