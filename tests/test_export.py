"""Export: what is written has the same codes (times scale) and reconstructions; what is not plain and whole is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelib import dictionaries, export, files
from saelib.dictionaries import DictionaryError

D, N, SCALE = 5, 12, 3.0
WHERE = {"model": "some-model", "hook": "blocks.3.hook_resid_post", "context": 256}
FORMATS = {
    "saelens": (export.save_saelens, export.load_saelens),
    "dictionary_learning": (export.save_dictionary_learning, export.load_dictionary_learning),
}
both_formats = pytest.mark.parametrize("form", FORMATS)


def random_dictionary(kind: str):
    """Every parameter and statistic drawn at random, so that one that is left out or misplaced shows."""
    generator = torch.Generator().manual_seed(0)
    made = dictionaries.KINDS[kind](N, D, generator=generator, **({"k": 4} if kind == "topk" else {}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
        made.mean.normal_(mean=2, generator=generator)
        made.scale.fill_(SCALE)
    return made


@pytest.fixture
def x():
    return 2 + SCALE * torch.randn(200, D, generator=torch.Generator().manual_seed(1))


def by_formula(tensors: dict, x, k: int | None = None):
    """Codes and reconstructions as both peers compute them from four plain tensors, in float64."""
    named = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "bias": "b_dec"}
    found = {named.get(name, name): value.double() for name, value in tensors.items()}
    encoder, decoder = found["W_enc"], found["W_dec"]
    if "bias" in tensors:  # dictionary_learning stores both the other way round
        encoder, decoder = encoder.T, decoder.T
    code = ((x.double() - found["b_dec"]) @ encoder + found["b_enc"]).relu()
    code = code if k is None else dictionaries.keep_largest(code, k)
    return code, code @ decoder + found["b_dec"]


def read_weights(folder, form):
    return load_file(folder / "sae_weights.safetensors") if form == "saelens" else torch.load(folder / "ae.pt")


def close(found, expected):
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() < 1e-5 * expected.abs().max()


# --- what is written ---


@pytest.mark.parametrize(
    "form, kind",
    [
        (form, kind)
        for form in FORMATS
        for kind in dictionaries.KINDS
        if (form, kind) != ("dictionary_learning", "topk")
    ],
)
def test_a_file_read_by_the_peers_formula_and_by_us_gives_the_same(form, kind, x, tmp_path):
    made, (save, load) = random_dictionary(kind), FORMATS[form]
    save(made, tmp_path / "new", **WHERE, alpha=1e-3, seed=7)
    code, x_hat = made.encode(x), made(x)
    assert 0.1 < (code > 0).float().mean() < 0.9
    for found in (
        by_formula(read_weights(tmp_path / "new", form), x, k=4 if kind == "topk" else None),
        ((loaded := load(tmp_path / "new")).encode(x), loaded(x)),
    ):
        close(found[0], SCALE * code)
        close(found[1], x_hat)
    assert loaded.kind == ("topk" if kind == "topk" else "standard")
    assert loaded.scale == 1 and not loaded.mean.any()
    torch.testing.assert_close(loaded.directions, made.directions)
    # and once more: what was loaded can be saved again
    save(loaded, tmp_path / "again", **WHERE)
    close(load(tmp_path / "again")(x), x_hat)


def test_the_saelens_folder_says_what_saelens_asks_for(tmp_path):
    export.save_saelens(random_dictionary("tied"), tmp_path, **WHERE, alpha=1e-3, seed=7, fvu=0.2)
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    shapes = {name: tuple(value.shape) for name, value in read_weights(tmp_path, "saelens").items()}
    assert shapes == {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    cfg = files.read_json(tmp_path / "cfg.json")
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == ("standard", D, N, "float32")
    assert cfg["apply_b_dec_to_input"] is True and cfg["normalize_activations"] == "none"
    about = cfg["metadata"]
    assert (about["model_name"], about["hook_name"], about["context_size"]) == tuple(WHERE.values())
    assert (about["kind"], about["alpha"], about["seed"], about["fvu"]) == ("tied", 1e-3, 7, 0.2)
    assert int(about["sae_lens_version"].split(".")[0]) >= 6


def test_the_dictionary_learning_folder_says_what_its_readers_ask_for(tmp_path):
    export.save_dictionary_learning(random_dictionary("untied"), tmp_path, **WHERE, alpha=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "ae.pt"}
    norms = read_weights(tmp_path, "dictionary_learning")["decoder.weight"].norm(dim=0)
    assert torch.allclose(norms, torch.ones(N))  # the test of AutoEncoder.normalize_decoder
    config = files.read_json(tmp_path / "config.json")
    trainer = config["trainer"]
    assert (trainer["dict_class"], trainer["activation_dim"], trainer["dict_size"]) == ("AutoEncoder", D, N)
    assert (trainer["layer"], trainer["lm_name"], trainer["alpha"]) == (3, "some-model", 1e-3)
    assert config["buffer"]["ctx_len"] == 256


def test_topk_is_refused_where_the_format_has_none(tmp_path):
    with pytest.raises(DictionaryError, match="cannot hold kind 'topk', only tied, untied, standard"):
        export.save_dictionary_learning(random_dictionary("topk"), tmp_path / "new", **WHERE)
    assert not (tmp_path / "new").exists()


@both_formats
def test_a_description_that_cannot_be_written_leaves_no_folder_that_loads(form, tmp_path):
    save, load = FORMATS[form]
    save(random_dictionary("tied"), tmp_path, **WHERE)
    with pytest.raises(TypeError):
        save(random_dictionary("untied"), tmp_path, **WHERE, seed=object())
    with pytest.raises(DictionaryError, match=r"c\w+\.json"):
        load(tmp_path)


# --- what is read ---


@pytest.fixture
def saelens(tmp_path):
    export.save_saelens(random_dictionary("standard"), tmp_path, **WHERE)
    return tmp_path


@pytest.fixture
def dictionary_learning(tmp_path):
    export.save_dictionary_learning(random_dictionary("standard"), tmp_path, **WHERE)
    return tmp_path


def describe(folder, **changes):
    files.write_json(folder / "cfg.json", files.read_json(folder / "cfg.json") | changes)


def rewrite(folder, change):
    """Put `change`(tensors) in place of the weights of either format."""
    if (folder / "ae.pt").exists():
        torch.save(change(torch.load(folder / "ae.pt")), folder / "ae.pt")
    else:
        path = folder / "sae_weights.safetensors"
        save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path)


@both_formats
def test_rows_of_any_length_are_folded_into_the_codes(form, request, x):
    folder, (_, load) = request.getfixturevalue(form), FORMATS[form]
    length = torch.linspace(0.5, 4, N)
    name, shape = ("decoder.weight", (1, N)) if form == "dictionary_learning" else ("W_dec", (N, 1))
    rewrite(folder, lambda found: found | {name: found[name] * length.view(shape)})
    code, x_hat = by_formula(read_weights(folder, form), x)
    loaded = load(folder)
    torch.testing.assert_close(loaded.directions.norm(dim=1), torch.ones(N))
    close(loaded.encode(x), code * length)
    close(loaded(x), x_hat)


def test_an_encoder_that_does_not_take_the_bias_off_is_read(saelens, x):
    describe(saelens, apply_b_dec_to_input=False)
    found = {name: value.double() for name, value in load_file(saelens / "sae_weights.safetensors").items()}
    code = (x.double() @ found["W_enc"] + found["b_enc"]).relu()
    close(export.load_saelens(saelens).encode(x), code)
    close(export.load_saelens(saelens)(x), code @ found["W_dec"] + found["b_dec"])


def test_half_precision_is_read_as_float32(saelens, x):
    expected = export.load_saelens(saelens)(x)
    rewrite(saelens, lambda found: {name: value.bfloat16() for name, value in found.items()})
    found = export.load_saelens(saelens)(x)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("architecture", ["jumprelu", "gated", "batchtopk", None])
def test_other_architectures_of_saelens_are_refused_by_name(saelens, architecture):
    describe(saelens, architecture=architecture)
    with pytest.raises(DictionaryError, match=rf"cfg\.json.*'{architecture}'.*standard and topk can"):
        export.load_saelens(saelens)


@pytest.mark.parametrize(
    "setting",
    [{"normalize_activations": "layer_norm"}, {"reshape_activations": "hook_z"}, {"activation_fn_str": "topk"}],
)
def test_settings_that_change_the_codes_are_refused_by_name(saelens, setting):
    describe(saelens, **setting)
    ((name, value),) = setting.items()
    with pytest.raises(DictionaryError, match=rf"cfg\.json.*{name}.*{value}"):
        export.load_saelens(saelens)


@pytest.mark.parametrize("name", ["GatedAutoEncoder", "AutoEncoderTopK", "JumpReluAutoEncoder"])
def test_other_classes_of_dictionary_learning_are_refused_by_name(dictionary_learning, name):
    path = dictionary_learning / "config.json"
    files.write_json(path, {"trainer": files.read_json(path)["trainer"] | {"dict_class": name}})
    with pytest.raises(DictionaryError, match=rf"config\.json.*'{name}'.*AutoEncoder can"):
        export.load_dictionary_learning(dictionary_learning)


CHANGES = {
    "missing": lambda found: dict(list(found.items())[1:]),
    "extra": lambda found: found | {"scaling_factor": torch.ones(N)},
    "transposed": lambda found: {name: value.T if value.dim() == 2 else value for name, value in found.items()},
    "short": lambda found: {name: value[:-1] for name, value in found.items()},
}


@both_formats
@pytest.mark.parametrize("change", CHANGES)
def test_other_tensors_and_shapes_are_refused_by_file(form, change, request):
    folder, (_, load) = request.getfixturevalue(form), FORMATS[form]
    rewrite(folder, CHANGES[change])
    weights = "ae.pt" if form == "dictionary_learning" else "sae_weights.safetensors"
    with pytest.raises(DictionaryError, match=rf"{weights} holds .*, but c\w+\.json wants"):
        load(folder)


@both_formats
@pytest.mark.parametrize("damage", ["gone", "cut", "text"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_is_missing_or_damaged_is_refused_by_name(form, damage, which, request):
    folder, (_, load) = request.getfixturevalue(form), FORMATS[form]
    path = sorted(folder.iterdir())[which]
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no such thing")
    with pytest.raises(DictionaryError, match="is damaged or not plain") as caught:
        load(folder)
    assert str(path) in str(caught.value)


class Hostile:
    """Unpickling this writes a file; a class that does no more than exist in a state dict is refused just the same."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (exec, (f"open({self.path!r}, 'w').close()",))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(dictionary_learning, tmp_path):
    proof = tmp_path / "it ran"
    rewrite(dictionary_learning, lambda found: found | {"more": Hostile(proof)})
    with pytest.raises(DictionaryError, match=r"ae\.pt is damaged or not plain \(pickled classes are refused\)"):
        export.load_dictionary_learning(dictionary_learning)
    assert not proof.exists()
    torch.load(dictionary_learning / "ae.pt", weights_only=False)  # it would have run
    assert proof.exists()


def test_a_whole_pickled_module_is_refused(dictionary_learning):
    torch.save(torch.nn.Linear(2, 2), dictionary_learning / "ae.pt")
    with pytest.raises(DictionaryError, match="pickled classes are refused"):
        export.load_dictionary_learning(dictionary_learning)


# --- topk ---


@pytest.fixture
def topk(tmp_path):
    export.save_saelens(random_dictionary("topk"), tmp_path, **WHERE)
    return tmp_path


@pytest.mark.parametrize("k", [0, -1, N + 1, 2.5, "4", None])
def test_topk_wants_a_k(topk, k):
    describe(topk, k=k)
    with pytest.raises(DictionaryError, match=rf"cfg\.json wants .*, k {k or 0}"):
        export.load_saelens(topk)


def test_topk_over_longer_rows_is_read_only_where_saelens_ranks_by_length_too(topk, x):
    length = torch.linspace(0.2, 5, N)
    rewrite(topk, lambda found: found | {"W_dec": found["W_dec"] * length[:, None]})
    with pytest.raises(DictionaryError, match="rows of other lengths than 1"):
        export.load_saelens(topk)
    describe(topk, rescale_acts_by_decoder_norm=True)
    found = {name: value.double() for name, value in load_file(topk / "sae_weights.safetensors").items()}
    code = ((x.double() - found["b_dec"]) @ found["W_enc"] + found["b_enc"]).relu() * length
    code = dictionaries.keep_largest(code, 4)
    close(export.load_saelens(topk).encode(x), code)
    close(export.load_saelens(topk)(x), (code / length) @ found["W_dec"] + found["b_dec"])


def test_the_fold_of_alpha_that_the_module_states(x):
    """error + alpha sparsity of ours is 1 / (d scale^2) of their loss with an L1 weight of d scale alpha."""
    from saelib.losses import sae_loss

    made, alpha = random_dictionary("standard"), 0.3
    code, x_hat = made.encode(x), made(x)
    ours = sae_loss(made.standardise(x), made.standardise(x_hat), code, alpha)[0]
    theirs = (x - x_hat).square().sum(1).mean() + D * SCALE * alpha * (SCALE * code).sum(1).mean()
    torch.testing.assert_close(ours, theirs / (D * SCALE**2))
