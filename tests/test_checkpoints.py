"""Two stand-in checkpoints: the same tokens, a dictionary each, and which features of the last exist in the first."""

import sys

import pytest
import torch
import yaml
from standin import make

from saelib import paths, profiles
from saelib.paths import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
import checkpoints


def test_the_best_correlation_is_numpys():
    import numpy as np

    codes, others = torch.rand(50, 3), torch.rand(50, 4)
    codes[:, 1] = 2 * others[:, 2] + 1
    expected = np.corrcoef(codes.T, others.T)[:3, 3:].max(1)
    found = checkpoints.best_correlation(codes, others)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5) and found[1] == pytest.approx(1, abs=1e-5)
    assert checkpoints.best_correlation(torch.zeros(50, 1), others).tolist() == [0.0]


def test_features_of_two_checkpoints_are_compared(tmp_path, monkeypatch):
    made = make(tmp_path / "standin", layers=2, n_documents=120)
    content = yaml.safe_load((profiles.PROFILES / "paper-70m.yaml").read_text())
    content["shared"]["model"] = made["model"]
    content["01_collect_activations"] |= {"text": made["text"], "n_train_rows": 32, "n_held_out_rows": 8}
    content["02_train_dictionaries"] |= {"batch_size": 64}
    (tmp_path / "paper-70m.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(paths, "DATA", tmp_path)
    monkeypatch.setattr(checkpoints.models, "as_dtype", lambda *_: torch.float32)
    arguments = {"hook": "blocks.1.hook_resid_post", "folder": tmp_path}
    table = checkpoints.compare("paper-70m", ["step1000", "143000"], **arguments)
    assert table["checkpoint"].tolist() == ["step1000", "143000", "143000"] and table["seed"].tolist() == [1, 1, 0]
    first, again, last = table.to_dict("records")
    assert last["exist"] == 1 and last["mean correlation"] == pytest.approx(1, abs=1e-4) and last["mmcs"] > 0.999
    # two models of independent random weights share less than two dictionaries of the same one
    assert first["mean correlation"] < again["mean correlation"] < 1 and first["exist"] <= again["exist"] < 1
    assert first["mmcs"] < 0.8 and first["features"] == last["features"] > 10
    assert (tmp_path / "runs/paper-70m/checkpoints/table.csv").exists()
    with pytest.raises(
        checkpoints.models.ModelError, match="no checkpoint 'step2000': the nearest are step1000, step143000"
    ):
        checkpoints.compare("paper-70m", ["step2000", "step143000"], **arguments)
