"""Names with checkpoints, and what is said when the Hub does not give a model or a data set."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from standin import STEPS, make_tokenizer, save_model

from saelib import hub, models


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> str:
    """A model folder with the checkpoints step1000 and step143000 as subfolders."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    for number, part in enumerate(("", *(f"step{step}" for step in STEPS))):
        save_model(folder / part, tokenizer, layers=2, seed=number)
    return str(folder)


def test_a_name_is_read_into_its_parts():
    parts = hub.parse("centred:EleutherAI/pythia-70m-deduped@step3000")
    assert parts == hub.ModelName("EleutherAI/pythia-70m-deduped", "step3000", True)
    assert hub.parse("EleutherAI/pythia-70m@512").revision == "step512"
    assert hub.parse("owner/name@a-branch") == hub.ModelName("owner/name", "a-branch")
    assert hub.parse("owner/name@main") == hub.parse("owner/name") == hub.ModelName("owner/name")
    assert hub.parse("owner/name@one", "two").revision == "two"


def test_pythias_154_checkpoints():
    assert len(hub.PYTHIA_STEPS) == 154 and {0, 1, 512, 1000, 143_000} < {*hub.PYTHIA_STEPS}


@pytest.mark.parametrize(
    "revision, near",
    [
        ("step3", "step0, step1, step2, step4"),
        ("700", "step128, step256, step512, step1000"),
        ("step1499", "step256, step512, step1000, step2000"),
        ("step200000", "step140000, step141000, step142000, step143000"),
    ],
)
def test_a_pythia_step_that_does_not_exist_lists_near_ones(revision, near):
    with pytest.raises(models.ModelError, match=f"no checkpoint 'step.*the nearest are {near}, the last is step143000"):
        models.load_tokenizer(f"EleutherAI/pythia-70m-deduped@{revision}")


def test_a_checkpoint_that_a_folder_lacks_lists_what_it_has(checkpoints):
    with pytest.raises(models.ModelError, match="'step7': the nearest are step1000, step143000"):
        models.bare_forward(checkpoints, ["blocks.0.hook_resid_post"], revision="step7")
    with pytest.raises(models.ModelError, match="'last': there are step1000, step143000"):
        models.load_model(f"{checkpoints}@last")


def test_a_checkpoint_of_a_folder_is_its_subfolder_by_name_or_by_argument(checkpoints):
    hook, tokens = "blocks.1.hook_resid_post", torch.arange(1, 17)[None]
    by_name, other, last = (
        models.bare_forward(f"{checkpoints}{at}", [hook])(tokens)[hook] for at in ("@1000", "@step143000", "")
    )
    assert torch.equal(by_name, models.bare_forward(checkpoints, [hook], revision="step1000")(tokens)[hook])
    assert torch.equal(by_name, models.bare_forward(str(Path(checkpoints) / "step1000"), [hook])(tokens)[hook])
    assert not torch.allclose(by_name, other) and not torch.allclose(by_name, last)
    bridge = models.bridge_forward(models.load_model(f"{checkpoints}@1000"), [hook])(tokens)[hook]
    torch.testing.assert_close(bridge, by_name, rtol=1e-5, atol=1e-5)


def raised(error: Exception, cause: Exception) -> Exception:
    """`error` as it looks when it was raised from `cause`."""
    error.__cause__ = cause
    return error


class Response:
    """What huggingface_hub wants of a response to make an error of it."""

    headers, request, status_code, url = {}, None, 404, ""


def behind(cause: Exception) -> Exception:
    return raised(OSError("no"), cause)


ANSWER = Response()
TOLD = [
    (behind(errors.OfflineModeIsEnabled("off")), "model", r"HF_HUB_OFFLINE=0.*HF_HOME.*copy its folder here"),
    (behind(errors.LocalEntryNotFoundError("none")), "model", r"HF_HUB_OFFLINE=0"),
    (ConnectionError("Couldn't reach 'a/b' (LocalEntryNotFoundError)"), "data set", r"JSON lines with a 'text' field"),
    (behind(errors.GatedRepoError("no", response=ANSWER)), "model", r"gated: accept its terms.*HF_TOKEN"),
    (behind(errors.RepositoryNotFoundError("no", response=ANSWER)), "model", r"no model of this name.*spelling"),
    (behind(errors.RevisionNotFoundError("no", response=ANSWER)), "model", r"this revision does not"),
    (OSError("no weights"), "model", r"cannot load 'a/b' at revision 'r' \(OSError: no weights\).*whole model"),
]


@pytest.mark.parametrize("error, what, told", TOLD)
def test_an_error_of_the_hub_says_what_to_do(error, what, told):
    assert re.search(told, hub.explain(error, "a/b", "r", what))


def test_a_missing_and_a_gated_data_set_are_told_apart():
    from datasets.exceptions import DatasetNotFoundError

    missing = DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")
    assert "no data set of this name" in hub.explain(missing, "a/b", what="data set")
    gated = DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.")
    assert "accept its terms" in hub.explain(gated, "a/b", what="data set")


def test_an_unreachable_model_is_explained_from_the_error_that_transformers_raises():
    with pytest.raises(
        models.ModelError, match=r"'EleutherAI/pythia-70m-deduped' at revision 'step1000'.*HF_HUB_OFFLINE=0"
    ):
        models.load_tokenizer("EleutherAI/pythia-70m-deduped@1000")
