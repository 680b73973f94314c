"""Both paper profiles end to end on a stand-in for Pythia and the Pile, with nothing but sizes overridden."""

import json

import pytest
import yaml
from safetensors.torch import load_file
from standin import make
from test_pipeline import snakemake

from saelib import files, paths, profiles, store

pytestmark = pytest.mark.pipeline
#: Sizes of both profiles, and of each, and what stands for the model and the text. Everything else is the profile's own.
BOTH = {
    "00_overview": {"steps": 100, "map_steps": 20},
    "03_baselines": {"n_activations": 6000, "n_evaluate": 2048, "ica_iterations": 5, "other_iterations": [2]},
    "04_autointerp": {"n_features": 12, "n_control_rows": 8},
    "05_ioi": {
        "k": 8,
        "fewer_rows": [2000, 4000],
        "n_layer_rows": 8,
        "n_select": 2,
        "n_report": 2,
        "sizes": [1, 8],
        "few_sizes": [8],
        "reselect": 2,
        "start": 8,
        "thresholds": [0.001, 0.1],
    },
    "06_case_studies": {
        "k": 8,
        "n_rows": 32,
        "n_effect_rows": 4,
        "n_other_rows": 2,
        "n_contexts": 4,
        "n_candidates": 4,
        "least_occurrences": 2,
    },
}
SIZES = {
    "paper-70m": {
        "01_collect_activations": {"n_train_rows": 96, "n_held_out_rows": 32},
        "02_train_dictionaries": {
            "alphas": [0.0001, 0.000857696, 0.00292864, 0.01],
            "ratios": [0.5, 1.0],
            "mlp_ratios": [1.0, 2.0],
            "mlp_rows": 8000,
            "mlp_alphas": [0.0, 0.000316228],
            "ks": [4, 8],
            "n_loss_rows": 2,
        },
        "04_autointerp": {"ratios": [0.5, 1.0, 2.0]},
        "05_ioi": {"more_ratios": [0.5, 1.0]},
    },
    "paper-410m": {
        "01_collect_activations": {"n_train_rows": 32, "n_held_out_rows": 32},
        "02_train_dictionaries": {"ratios": [1.0, 2.0], "mlp_rows": 4000, "ks": [4, 8], "n_loss_rows": 2},
        "04_autointerp": {"ratios": [1.0, 2.0, 4.0]},
        "05_ioi": {"more_ratios": [1.0, 2.0]},
    },
}
LINE = 400  # of the stand-in's text, from which on documents are held out


def run(data, profile: str, layers: int) -> dict:
    """Run all of `profile` on a stand-in with as many layers as the model; returns the profile's own parameters."""
    made = make(data / "standin", layers=layers, n_documents=1200)
    content = yaml.safe_load((profiles.PROFILES / f"{profile}.yaml").read_text())
    content["shared"]["model"] = f"centred:{made['model']}"
    line = f"#L{LINE}" if "#L" in content["01_collect_activations"]["text"] else ""
    content["01_collect_activations"]["text"] = made["text"] + line
    for stem, sizes in [*BOTH.items(), *SIZES[profile].items()]:
        assert all(type(value) in (int, list) for value in sizes.values())
        content[stem] = content.get(stem, {}) | sizes
    (data / "profiles").mkdir()
    (data / "profiles" / f"{profile}.yaml").write_text(yaml.safe_dump(content))
    (data / "runs").mkdir()
    log = snakemake(data, f"profiles={data / 'profiles'}", profile=profile)
    assert log.startswith("exit 0"), log[-4000:]
    made = {path.stem for path in (data / "runs" / profile / "metrics").glob("*.json")}
    assert made == {path.stem for path in paths.NOTEBOOKS.glob("0*.ipynb")}
    return profiles.load(profile)


def test_paper_70m_runs_on_the_stand_in(tmp_path):
    parameters = run(tmp_path, "paper-70m", 6)
    activations = tmp_path / "runs/paper-70m/activations"
    hook = parameters["02_train_dictionaries"]["main_hook"]
    spec = files.read_json(activations / hook / "manifest.json")["spec"]
    assert (spec["coordinates"], spec["dtype"], spec["first_position"]) == ("processed", "float16", 0)
    x = store.ActivationStore(activations / hook, outlier_factor=None).rows(store.torch.arange(1000)).float()
    assert x.mean(1).abs().max() < 2e-3 * x.std()  # zero mean over the coordinates, in fp16
    tokens, head = load_file(activations / "tokens.safetensors"), files.read_json(activations / "tokens.json")
    assert (tokens["train"][:, 0] == 0).float().mean() < 0.5  # rows do not begin with end-of-text
    lines = {split: {int(head["documents"][one].split("/")[1]) for one in tokens[f"{split}_doc"].unique()}
             for split in ("train", "held_out")}  # fmt: skip
    assert max(lines["train"]) < LINE <= min(lines["held_out"])
    trained = json.loads(next((tmp_path / "runs/paper-70m/dictionaries" / hook).glob("tied*.json")).read_text())
    config = trained["spec"]["config"]
    wanted = {"lr": 0.001, "batch_size": 1024, "passes": 1, "decay": 0.0, "centre": False, "scale": False}
    assert {name: config[name] for name in wanted} == wanted and trained["spec"]["dtype"] == "float32"


def test_paper_410m_runs_on_the_stand_in(tmp_path):
    run(tmp_path, "paper-410m", 24)
    record = files.read_json(tmp_path / "runs/paper-410m/metrics/05_ioi.json")
    assert record["hook"] == "blocks.11.hook_resid_post" and record["stop"]  # random weights do not solve the task
