"""Dictionaries: the formulas by hand, the model's units, and files that are what they say."""

import pytest
import torch

from saelib import dictionaries, files
from saelib.paths import MissingArtefact

KINDS = list(dictionaries.KINDS.values())


def by_hand(kind: str):
    """A dictionary in 2 dimensions with directions (0.6, 0.8) and (0, 1)."""
    made = dictionaries.KINDS[kind](2, 2)
    with torch.no_grad():
        (made.weight if kind == "tied" else made.decoder).copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        if kind != "tied":
            made.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        made.bias.copy_(torch.tensor([-1.0, 0.5]))
    return made


@pytest.fixture(params=KINDS, ids=lambda member: member.kind)
def dictionary(request):
    """A random dictionary of 12 features in 5 dimensions with bias, mean and scale."""
    generator = torch.Generator().manual_seed(0)
    made = request.param(12, 5, generator=generator)
    with torch.no_grad():
        made.bias.normal_(generator=generator)
        made.mean.normal_(generator=generator)
        made.scale.fill_(3.0)
    return made


@pytest.fixture
def x():
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(1))


def test_directions_are_unit_rows_one_per_feature(dictionary):
    assert dictionary.directions.shape == (12, 5)
    assert (dictionary.n_features, dictionary.d) == (12, 5)
    torch.testing.assert_close(dictionary.directions.norm(dim=1), torch.ones(12))


def test_a_zero_row_gives_no_nan():
    assert torch.equal(dictionaries.unit_rows(torch.tensor([[0.0, 0.0], [0.0, 2.0]])), torch.tensor([[0.0, 0], [0, 1]]))


def test_the_tied_formula_by_hand():
    # c = relu((0.6 + 1.6 - 1, 2 + 0.5)) = (1.2, 2.5);  x_hat = 1.2 (0.6, 0.8) + 2.5 (0, 1)
    made = by_hand("tied")
    code = made.encode(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(code, torch.tensor([1.2, 2.5]))
    torch.testing.assert_close(made.decode(code), torch.tensor([0.72, 3.46]))


def test_the_untied_formula_by_hand():
    # c = relu((1 - 1, -1 + 2 + 0.5)) = (0, 1.5);  x_hat = 1.5 (0, 1)
    made = by_hand("untied")
    code = made.encode(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(code, torch.tensor([0.0, 1.5]))
    torch.testing.assert_close(made.decode(code), torch.tensor([0.0, 1.5]))


def test_the_standard_formula_by_hand():
    # y = (1, 2) - (1, 1) = (0, 1);  c = relu((0 - 1, 1 + 0.5)) = (0, 1.5);  x_hat = 1.5 (0, 1) + (1, 1)
    made = by_hand("standard")
    made.decoder_bias.data.fill_(1.0)
    code = made.encode(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(code, torch.tensor([0.0, 1.5]))
    torch.testing.assert_close(made.decode(code), torch.tensor([1.0, 2.5]))


def test_topk_keeps_the_largest_of_the_standard_code():
    made = by_hand("topk")
    x = torch.tensor([[3.0, 4.0], [4.0, 3.0]])  # standard codes (2, 1.5) and (3, 0)
    made.k.fill_(1)
    assert torch.equal(made.encode(x), torch.tensor([[2.0, 0.0], [3.0, 0.0]]))
    made.k.fill_(5)  # more than there are: all
    assert torch.equal(made.encode(x), torch.tensor([[2.0, 1.5], [3.0, 0.0]]))


@pytest.mark.parametrize("features", [[7, 0, 3], torch.tensor([11]), slice(2, 5)], ids=str)
def test_chosen_columns_of_a_code_are_those_of_the_whole(dictionary, x, features):
    torch.testing.assert_close(dictionary.encode(x, features), dictionary.encode(x)[:, features])


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("rectify", [False, True])
def test_chosen_columns_of_a_linear_code_are_those_of_the_whole(x, k, rectify):
    made = dictionaries.Linear(12, 5)
    made.encoder.normal_(generator=torch.Generator().manual_seed(0))
    made.k.fill_(k)
    made.rectify.fill_(rectify)
    torch.testing.assert_close(made.encode(x, [7, 0]), made.encode(x)[:, [7, 0]])


@pytest.mark.parametrize("kind", dictionaries.KINDS)
def test_mean_and_scale_by_hand(kind):
    made = by_hand(kind)
    expected = 2 * made(torch.tensor([1.0, 2.0])) + torch.tensor([1.0, -1.0])
    made.mean.copy_(torch.tensor([1.0, -1.0]))
    made.scale.fill_(2.0)
    torch.testing.assert_close(made(torch.tensor([3.0, 3.0])), expected)  # (3, 3) = 2 (1, 2) + (1, -1)


def test_in_model_units_it_equals_the_standardised_dictionary(dictionary, x):
    plain = type(dictionary)(12, 5)
    plain.load_state_dict(dictionary.state_dict() | {"mean": torch.zeros(5), "scale": torch.ones(())})
    standardised = (x - dictionary.mean) / 3.0
    torch.testing.assert_close(dictionary.standardise(x), standardised)
    torch.testing.assert_close(dictionary.encode(x), plain.encode(standardised))
    torch.testing.assert_close(dictionary(x), 3.0 * plain(standardised) + dictionary.mean)


def test_codes_are_never_negative_and_some_are_zero(dictionary, x):
    code = dictionary.encode(x)
    assert code.shape == (40, 12) and (code >= 0).all()
    assert 0 < (code > 0).float().mean() < 1


def test_half_precision_activations_are_encoded_in_the_dictionarys_precision(dictionary, x):
    assert dictionary.encode(x.bfloat16()).dtype == torch.float32


def test_the_start_follows_the_generator(dictionary):
    kind, seed = type(dictionary), torch.Generator().manual_seed
    assert torch.equal(kind(12, 5, generator=seed(4)).weight, kind(12, 5, generator=seed(4)).weight)
    assert not torch.equal(kind(12, 5, generator=seed(4)).weight, kind(12, 5, generator=seed(5)).weight)


def test_the_untied_decoder_starts_at_the_encoder_but_is_its_own():
    made = dictionaries.UntiedSAE(12, 5)
    assert torch.equal(made.weight, made.decoder)
    assert made.weight.data_ptr() != made.decoder.data_ptr()


# --- files ---


@pytest.fixture
def saved(dictionary, tmp_path):
    path = tmp_path / "made_r2_a0.001_s0.safetensors"
    dictionaries.save(dictionary, path, spec={"alpha": 0.001})
    return path


def test_save_and_load_give_the_same_dictionary_and_its_description(dictionary, saved, x):
    loaded, about = dictionaries.load(saved)
    assert type(loaded) is type(dictionary)
    assert torch.equal(loaded(x), dictionary(x))
    assert (about["kind"], about["n_features"], about["d"]) == (dictionary.kind, 12, 5)
    assert about["spec"] == {"alpha": 0.001}
    assert sorted(path.suffix for path in saved.parent.iterdir()) == [".json", ".safetensors"]


def test_an_unknown_kind_is_refused_with_the_known(saved):
    head = saved.with_suffix(".json")
    files.write_json(head, files.read_json(head) | {"kind": "gated"})
    with pytest.raises(dictionaries.DictionaryError, match="unknown kind 'gated'; known are tied, untied") as caught:
        dictionaries.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_truncated_or_altered_file_is_refused_by_name(saved, change):
    saved.write_bytes(change(saved.read_bytes()))
    with pytest.raises(dictionaries.DictionaryError, match="train again") as caught:
        dictionaries.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("change", [{"n_features": 13}, {"d": 6}])
def test_wrong_shapes_are_refused_by_name(saved, change):
    head = saved.with_suffix(".json")
    files.write_json(head, files.read_json(head) | change)
    with pytest.raises(dictionaries.DictionaryError, match="size mismatch") as caught:
        dictionaries.load(saved)
    assert str(saved) in str(caught.value)


def test_another_kind_than_the_files_is_refused_by_name(saved, dictionary):
    head = saved.with_suffix(".json")
    other = "tied" if dictionary.kind != "tied" else "untied"
    files.write_json(head, files.read_json(head) | {"kind": other})
    with pytest.raises(dictionaries.DictionaryError, match="decoder") as caught:
        dictionaries.load(saved)
    assert str(saved) in str(caught.value)


def test_saving_anew_first_takes_the_old_description_away(dictionary, saved):
    """A description that cannot be written must not leave the former one beside the new weights."""
    with pytest.raises(TypeError):
        dictionaries.save(dictionary, saved, spec=object())
    assert not saved.with_suffix(".json").exists()


def test_a_dictionary_is_found_by_its_settings(tmp_path):
    for seed in (0, 1):
        made = dictionaries.TiedSAE(6, 4, generator=torch.Generator().manual_seed(seed))
        dictionaries.save(made, tmp_path / f"any_{seed}.safetensors", spec={"config": {"seed": seed, "alpha": 0.1}})
    found, about = dictionaries.find(tmp_path, seed=1, alpha=0.1)
    assert torch.equal(found.weight, made.weight) and about["spec"]["config"]["seed"] == 1
    with pytest.raises(MissingArtefact, match="Notebook 02"):
        dictionaries.find(tmp_path, seed=2)


def test_settings_asked_for_at_every_call_stay_on_the_host():
    """A number on a GPU costs a wait at each reading; the meta device stands for one."""
    for made, names in ((dictionaries.TopKSAE(8, 4, k=3), ["k"]), (dictionaries.Linear(8, 4), ["k", "rectify"])):
        moved = made.to("meta")
        assert moved.mean.device.type == "meta"
        assert all(getattr(moved, name).device.type == "cpu" for name in names)
    assert int(dictionaries.TopKSAE(8, 4, k=3).double().k) == 3
