"""Losses under replaced activations agree with TransformerLens' own hooks, at every site of two architectures."""

import numpy as np
import pytest
import torch
from conftest import MLP, RESIDUAL

from saelib import models, reconstruction
from saelib.dictionaries import TiedSAE
from saelib.reconstruction import constant, losses_under, recovered

SITES = ["hook_resid_post", "hook_mlp_out", "mlp.hook_post", "attn.hook_z"]


@pytest.fixture(scope="module", params=["llama", "neox"])
def folder(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def bridge(folder):
    return models.load_model(folder)


@pytest.fixture(scope="module")
def tokens(rows):
    return rows.held_out[:5]


def fold(x):
    """An edit that no norm undoes and that leaves something of what it edits, so that a wrong place would show."""
    return x.abs()


def perfect(d: int) -> TiedSAE:
    """A dictionary that loses nothing: each axis in both directions."""
    made = TiedSAE(2 * d, d)
    with torch.no_grad():
        made.weight.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
    return made


def reference(bridge, tokens, hook, edit, first_position=1, limit=float("inf")) -> np.ndarray:
    """The same losses from ``run_with_hooks`` of a whole forward pass."""

    def replace(value, hook):
        value = value.clone()
        flat = value.view(*value.shape[:2], -1)
        short = flat[:, first_position:].norm(dim=2) <= limit
        flat[:, first_position:][short] = edit(flat[:, first_position:][short])
        return value

    with torch.inference_mode():
        logits = bridge.run_with_hooks(tokens.long(), fwd_hooks=[(hook, replace)] if edit else [])
    chances = logits[:, first_position:-1].log_softmax(-1)
    right = tokens[:, first_position + 1 :, None].long()
    return -chances.gather(2, right)[..., 0].mean(1).numpy()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 1])
def test_every_edit_gives_what_transformer_lens_hooks_give(folder, bridge, tokens, site, layer):
    hook = f"blocks.{layer}.{site}"
    edits = {"clean": None, "zero": torch.zeros_like, "fold": fold, "same": lambda x: x}
    found = losses_under(folder, tokens, hook, edits, batch=2)
    for label in ("clean", "zero", "fold"):
        expected = reference(bridge, tokens, hook, edits[label])
        np.testing.assert_allclose(found.rows[label], expected, rtol=1e-5, atol=1e-5)
    assert np.array_equal(found.rows["same"], found.rows["clean"])
    for label in ("zero", "fold"):
        assert np.abs(found.rows[label] - found.rows["clean"]).mean() > 1e-3
    assert found.spared == 0


def test_positions_before_the_first_are_neither_replaced_nor_scored(folder, bridge, tokens):
    seen = []
    edits = {"fold": lambda x: seen.append(x) or fold(x)}
    found = losses_under(folder, tokens, "blocks.0.hook_resid_post", edits, first_position=6, batch=5)
    expected = reference(bridge, tokens, "blocks.0.hook_resid_post", fold, first_position=6)
    np.testing.assert_allclose(found.rows["fold"], expected, rtol=1e-5, atol=1e-5)
    assert [x.shape for x in seen] == [(5 * 10, 32)]


def test_long_activations_are_spared_and_counted(folder, bridge, tokens):
    hook = "blocks.0.hook_resid_post"
    norms = models.bare_forward(folder, [hook])(tokens)[hook][:, 1:].norm(dim=2)
    limit = norms.median().item() + 1e-4
    found = losses_under(folder, tokens, hook, {"clean": None, "fold": fold}, limit=limit)
    assert found.spared == int((norms > limit).sum()) == 37  # of 75
    expected = reference(bridge, tokens, hook, fold, limit=limit)
    np.testing.assert_allclose(found.rows["fold"], expected, rtol=1e-5, atol=1e-5)


def test_under_a_limit_below_all_norms_every_edit_gives_the_clean_loss(llama, tokens):
    found = losses_under(llama, tokens, RESIDUAL, {"zero": torch.zeros_like, "clean": None}, limit=0.0)
    assert np.array_equal(found.rows["zero"], found.rows["clean"])
    assert found.spared == 75


def test_neither_the_order_of_the_edits_nor_their_number_changes_a_loss(llama, tokens):
    edits = {"clean": None, "mean": constant(torch.ones(32)), "fold": fold}
    there = losses_under(llama, tokens, RESIDUAL, edits).rows
    back = losses_under(llama, tokens, RESIDUAL, dict(reversed(edits.items()))).rows
    alone = losses_under(llama, tokens, RESIDUAL, {"fold": fold}).rows
    assert list(back) == ["fold", "mean", "clean"]
    assert all(np.array_equal(there[label], back[label]) for label in edits)
    assert np.array_equal(alone["fold"], there["fold"])


def test_rows_are_independent_of_how_they_are_batched(llama, tokens):
    whole, single = (losses_under(llama, tokens, RESIDUAL, {"fold": fold}, batch=size).rows for size in (5, 1))
    np.testing.assert_allclose(whole["fold"], single["fold"], rtol=1e-5)


@pytest.mark.parametrize(("hook", "d"), [(RESIDUAL, 32), (MLP, 48)])
def test_a_perfect_dictionary_recovers_the_whole_loss(llama, tokens, hook, d):
    edits = {"clean": None, "perfect": perfect(d), "mean": constant(torch.full((d,), 0.3))}
    found = losses_under(llama, tokens, hook, edits).rows
    np.testing.assert_allclose(found["perfect"], found["clean"], rtol=1e-5)
    share, (low, high) = recovered(found["perfect"], found["clean"], found["mean"])
    assert (share, low, high) == pytest.approx((1, 1, 1), abs=1e-4)


def test_constant_puts_one_vector_everywhere(folder, bridge, tokens):
    value = torch.linspace(-1, 1, 32, dtype=torch.float64)
    found = losses_under(folder, tokens, "blocks.1.hook_mlp_out", {"mean": constant(value)})
    expected = reference(bridge, tokens, "blocks.1.hook_mlp_out", lambda x: value.float().expand_as(x))
    np.testing.assert_allclose(found.rows["mean"], expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close(llama, tokens):
    hook, edits = RESIDUAL, {"clean": None, "fold": fold}
    wide, narrow = (
        losses_under(llama, tokens, hook, edits, dtype=kind).rows for kind in (torch.float32, torch.bfloat16)
    )
    for label in edits:
        assert not np.array_equal(wide[label], narrow[label])
        np.testing.assert_allclose(wide[label], narrow[label], rtol=0.02)


def test_soft_caps_behind_the_unembedding_are_kept(tokenizer, tokens, tmp_path):
    """Gemma 2 bends its logits and norms what its MLP adds: both come from the model's own forward."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=len(tokenizer), **sizes, **heads, attn_implementation="eager")
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = losses_under(str(tmp_path), tokens, "blocks.0.hook_mlp_out", {"clean": None, "fold": fold})
    bridge = models.load_model(str(tmp_path))
    for label, edit in (("clean", None), ("fold", fold)):
        expected = reference(bridge, tokens, "blocks.0.hook_mlp_out", edit)
        np.testing.assert_allclose(found.rows[label], expected, rtol=1e-4)


def test_the_first_blocks_compute_once_until_the_memory_is_cleared():
    calls = []

    class Block(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, x, *, factor):
            calls.append(self.number)
            return factor * x + self.number

    blocks = [Block(number) for number in range(3)]

    def run(x):
        for block in blocks:
            x = block(x, factor=10)
        return x

    memory = reconstruction._run_once(blocks[:2])
    assert [run(1), run(1), run(1)] == [1012, 1012, 1012]
    assert calls == [0, 1, 2, 2, 2]
    memory.clear()
    assert run(2) == 2012
    assert calls == [0, 1, 2, 2, 2, 0, 1, 2]


def test_recovered_by_hand():
    clean, ablated = np.array([1.0, 1.0]), np.array([5.0, 3.0])
    share, (low, high) = recovered(np.array([2.0, 2.0]), clean, ablated)  # (3 + 1) / (4 + 2); row by row 3/4 and 1/2
    assert share == pytest.approx(2 / 3)
    assert (low, high) == pytest.approx((1 / 2, 3 / 4))
    assert recovered(clean, clean, ablated) == (1, (1, 1))
    assert recovered(ablated, clean, ablated) == (0, (0, 0))
    assert recovered(ablated + 1, clean, ablated)[0] == pytest.approx(-1 / 3)  # worse than the ablation


@pytest.mark.parametrize(
    ("hook", "edit", "message"),
    [
        (RESIDUAL, TiedSAE(8, 48), rf"edit 'mine' does not fit {RESIDUAL} of .*, which has width 32"),
        (MLP, TiedSAE(8, 32), rf"edit 'mine' does not fit {MLP} of .*, which has width 48"),
        (RESIDUAL, constant(torch.zeros(7)), "edit 'mine' does not fit .* width 32"),
        (RESIDUAL, lambda x: x[:, :5], "edit 'mine' does not fit .* width 32"),
    ],
)
def test_an_edit_of_another_width_is_refused(llama, tokens, hook, edit, message):
    with pytest.raises(models.ModelError, match=message):
        losses_under(llama, tokens, hook, {"clean": None, "mine": edit})


def test_a_hook_that_the_model_lacks_is_refused(llama, tokens):
    with pytest.raises(models.ModelError, match=r"blocks\.3\.hook_resid_post.*layers 0 to 2"):
        losses_under(llama, tokens, "blocks.3.hook_resid_post", {"clean": None})
    with pytest.raises(models.ModelError, match=r"no hook 'blocks\.0\.nonsense'"):
        losses_under(llama, tokens, "blocks.0.nonsense", {"clean": None})


def test_rows_without_a_prediction_are_refused(llama, tokens):
    with pytest.raises(models.ModelError, match="rows of 4 tokens leave nothing to predict from 3 on"):
        losses_under(llama, tokens[:, :4], RESIDUAL, {"clean": None}, first_position=3)
    assert len(losses_under(llama, tokens[:, :5], RESIDUAL, {"clean": None}, first_position=3).rows["clean"]) == 5
