"""Two ways to an activation agree, in two architectures; and what does not exist is refused with what does."""

import pytest
import torch
from conftest import MLP, RESIDUAL

from saelib import models

ALL_KINDS = [
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.mlp.hook_post",
    "blocks.1.attn.hook_z",
]


@pytest.fixture(params=["llama", "neox"])
def folder(request) -> str:
    return request.getfixturevalue(request.param)


def test_the_bare_and_the_bridge_forward_give_the_same_activations(folder, rows):
    tokens = rows.train[:6]
    bare = models.bare_forward(folder, ALL_KINDS)(tokens)
    bridge = models.bridge_forward(models.load_model(folder), ALL_KINDS)(tokens)
    assert set(bare) == set(bridge) == set(ALL_KINDS)
    for hook in ALL_KINDS:
        assert bare[hook].shape == bridge[hook].shape == (6, 16, bare[hook].shape[2])
        assert bare[hook].abs().mean() > 1e-3
        torch.testing.assert_close(bare[hook], bridge[hook], rtol=1e-5, atol=1e-5)


def test_hooks_have_the_widths_of_the_model(llama, rows):
    found = models.bare_forward(llama, ALL_KINDS)(rows.train[:1])
    assert [found[hook].shape[-1] for hook in ALL_KINDS] == [32, 32, 32, 48, 32]


def test_a_hook_has_the_same_values_alone_and_among_others(folder, rows):
    alone = models.bare_forward(folder, ALL_KINDS[:1])(rows.train[:2])
    assert torch.equal(alone[ALL_KINDS[0]], models.bare_forward(folder, ALL_KINDS)(rows.train[:2])[ALL_KINDS[0]])


def test_the_last_blocks_output_is_what_the_models_own_code_gives(folder, rows):
    """Only the blocks up to the hook are loaded; transformers' hidden states of the whole model are the reference."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        expected = whole(rows.train[:2], output_hidden_states=True).hidden_states[1]  # after block 0
    found = models.bare_forward(folder, ["blocks.0.hook_resid_post"])(rows.train[:2])["blocks.0.hook_resid_post"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_compatibility_mode_centres_the_residual_stream(neox, rows):
    hook = "blocks.1.hook_resid_post"
    raw = models.bridge_forward(models.load_model(neox), [hook])(rows.train[:4])[hook]
    paper = models.bridge_forward(models.load_model(neox, compatibility=True), [hook])(rows.train[:4])[hook]
    assert raw.mean(-1).abs().max() > 1e-2
    assert paper.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(paper, raw - raw.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_activations_come_in_the_dtype_asked_for(llama, rows):
    hook = "blocks.0.hook_resid_post"
    assert models.bare_forward(llama, [hook], dtype=torch.bfloat16)(rows.train[:1])[hook].dtype == torch.bfloat16


def test_the_tokenizer_of_a_folder_is_loaded(llama, tokenizer):
    assert models.load_tokenizer(llama).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("load", [models.load_model, models.load_tokenizer, models.locate])
def test_a_missing_model_folder_is_named_with_what_a_model_is(tmp_path, load):
    with pytest.raises(models.ModelError, match=r"no model at '.*nowhere'.*config\.json.*owner/name.*smollm2"):
        load(str(tmp_path / "nowhere"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(models.ModelError, match=r"holds config\.json"):
        models.locate(str(tmp_path))


def test_a_folder_without_weights_is_refused_by_name(llama, tmp_path):
    (tmp_path / "config.json").write_text((models.Path(llama) / "config.json").read_text())
    with pytest.raises(models.ModelError, match=f"cannot load '{tmp_path}'"):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize("load", [models.load_model, models.load_tokenizer, lambda name: models.bare_forward(name, [])])
def test_a_hub_name_without_network_says_what_to_do(load):
    with pytest.raises(models.ModelError, match=r"cannot load 'nobody/no-such-model'.*copy its folder here"):
        load("nobody/no-such-model")


def test_a_layer_that_does_not_exist_lists_what_exists(llama):
    with pytest.raises(models.ModelError, match=r"blocks\.3\.hook_resid_post.*layers 0 to 2"):
        models.bare_forward(llama, ["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"])
    with pytest.raises(models.ModelError, match="layers 0 to 2"):
        models.bridge_forward(models.load_model(llama), ["blocks.3.hook_resid_post"])


@pytest.mark.parametrize(
    "hook", ["blocks.0.nonsense", "blocks.0", "blocks", "", "hook_embed", "blocks.-1.hook_mlp_out"]
)
def test_an_unknown_site_lists_the_sites(hook):
    with pytest.raises(models.ModelError) as caught:
        models.parse_hook(hook, 2)
    for part in (f"'{hook}'", *models.HOOKS):
        assert part in str(caught.value)


def test_a_hook_is_parsed_into_layer_and_site():
    assert models.parse_hook("blocks.11.mlp.hook_post", 12) == (11, "mlp.hook_post")


def test_dtypes_by_name():
    assert models.as_dtype("float32") is torch.float32
    assert models.as_dtype("bfloat16") is torch.bfloat16
    assert models.as_dtype("float16") is torch.float16
    assert models.as_dtype("auto") is models.fast_dtype("cpu")
    assert models.fast_dtype("cpu") in (torch.float32, torch.bfloat16)


def test_alter_changes_the_weights_before_anything_runs(llama, rows, llama_forward):
    def silence(model):
        for block in model.model.layers:
            block.mlp.down_proj.weight.data.zero_()

    altered = models.bare_forward(llama, [MLP], alter=silence)(rows.held_out[:2].long())[MLP]
    same = models.bare_forward(llama, [MLP], alter=lambda model: None)(rows.held_out[:2].long())[MLP]
    assert torch.equal(same, llama_forward(rows.held_out[:2].long())[MLP])
    assert torch.equal(altered, same)  # block 0 comes before what was silenced
    deeper = models.bare_forward(llama, [RESIDUAL], alter=silence)(rows.held_out[:2].long())[RESIDUAL]
    assert not torch.allclose(deeper, llama_forward(rows.held_out[:2].long())[RESIDUAL])


def whole_logits(folder: str, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return models.read_pretrained(AutoModelForCausalLM, folder, models.RAW).eval()(tokens.long()).logits


def test_compatibility_mode_changes_the_logits_by_a_constant_per_position_at_most(neox, rows):
    tokens = rows.train[:4].long()
    with torch.inference_mode():
        paper = models.load_model(neox, compatibility=True)(tokens)
    difference = paper - whole_logits(neox, tokens)
    assert (difference - difference.mean(-1, keepdim=True)).abs().max() < 1e-4 * paper.std()


def test_centred_writes_give_the_coordinates_of_compatibility_mode_on_every_path(neox, rows):
    """What the paper profiles use: the bridge in 01, the plain model of transformers in 02, 04 and 05."""
    centred, tokens = f"centred:{neox}", rows.train[:4]
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    plain = models.bare_forward(centred, hooks)(tokens)
    bridge = models.bridge_forward(models.load_model(centred, compatibility=True), hooks)(tokens)
    paper = models.bridge_forward(models.load_model(neox, compatibility=True), hooks)(tokens)
    for hook in hooks:
        assert plain[hook].mean(-1).abs().max() < 1e-5 < plain[hook].std()
        torch.testing.assert_close(plain[hook], paper[hook], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bridge[hook], paper[hook], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole_logits(centred, tokens), whole_logits(neox, tokens), rtol=1e-4, atol=1e-4)


def test_writes_of_a_model_without_layer_norm_are_not_centred(llama):
    with pytest.raises(models.ModelError, match=r"cannot be centred: '.*norm' is no layer norm; leave out 'centred:'"):
        models.bare_forward(f"centred:{llama}", [RESIDUAL])
