"""SAELens and dictionary_learning give our codes and reconstructions, and we give theirs: ``make interop``."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelib import dictionaries, export

from . import environment

pytestmark = pytest.mark.interop
D, N, K = 48, 96, 6
WHERE = {"model": "some-model", "hook": "blocks.3.hook_resid_post", "context": 256}
LOAD = {"saelens": export.load_saelens, "dictionary_learning": export.load_dictionary_learning}
OURS = [("saelens", kind) for kind in dictionaries.KINDS]
OURS += [("dictionary_learning", kind) for kind in dictionaries.KINDS if kind != "topk"]
SAELENS = ("standard", "standard_no_centre", "topk")
THEIRS = [("saelens", name + suffix) for name in SAELENS for suffix in ("", "_inference")]
THEIRS += [("dictionary_learning", "trainer_0")]


def ours(kind: str):
    """Every parameter and statistic drawn at random, so that one that is left out or misplaced shows."""
    generator = torch.Generator().manual_seed(0)
    made = dictionaries.KINDS[kind](N, D, generator=generator, **({"k": K} if kind == "topk" else {}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
        made.mean.normal_(mean=2, generator=generator)
        made.scale.fill_(3.0)
    return made


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Folder in which the peers have read ours and left theirs; skips with pip's last line where they do not install."""
    try:
        environment.python()
    except environment.Unavailable as reason:
        pytest.skip(f"the peers' environment cannot be installed: {reason}")
    folder = tmp_path_factory.mktemp("exchange")
    save_file({"x": 2 + 3 * torch.randn(200, D, generator=torch.Generator().manual_seed(1))}, folder / "x.safetensors")
    for form, kind in OURS:
        save = {"saelens": export.save_saelens, "dictionary_learning": export.save_dictionary_learning}[form]
        save(ours(kind), folder / "ours" / form / kind, **WHERE, alpha=1e-3)
    environment.run("exchange", folder)
    return folder


def close(found, expected):
    assert found.shape == expected.shape and expected.abs().max() > 0
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("form, kind", OURS)
def test_what_we_save_gives_our_codes_and_reconstructions_there(exchanged, form, kind):
    x, made = load_file(exchanged / "x.safetensors")["x"], ours(kind)
    theirs = load_file(exchanged / "ours" / form / f"{kind}.safetensors")
    close(theirs["code"], made.scale * made.encode(x))
    close(theirs["x_hat"], made(x))


@pytest.mark.parametrize("form, name", THEIRS)
def test_what_they_save_gives_their_codes_and_reconstructions_here(exchanged, form, name):
    x, loaded = load_file(exchanged / "x.safetensors")["x"], LOAD[form](exchanged / "theirs" / form / name)
    theirs = load_file(exchanged / "theirs" / form / f"{name}.safetensors")
    assert 0.01 < (theirs["code"] > 0).float().mean() < 0.9
    close(loaded.encode(x), theirs["code"])
    close(loaded(x), theirs["x_hat"])
