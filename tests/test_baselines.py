"""Baselines: identities, recovery of a known mixture, forms, orientation, resumption, clear errors."""

import pytest
import torch
from conftest import MLP, RESIDUAL

from saelib import baselines, dictionaries, metrics
from saelib.baselines import BaselineError
from saelib.paths import MissingArtefact
from saelib.store import ActivationStore

D = 6


@pytest.fixture(scope="module")
def mixture():
    """20,000 mixtures [n, 6] of independent, right-skewed sources around a mean far from 0, and the mixing rows."""
    generator = torch.Generator().manual_seed(3)
    sources = torch.empty(20_000, D).exponential_(generator=generator)
    mixing = torch.randn(D, D, generator=generator)
    return sources @ mixing + 5, mixing


def each_method(x):
    generator = torch.Generator().manual_seed(0)
    return {
        "default": baselines.default_basis(D),
        "random": baselines.random_directions(2 * D, D, generator=generator),
        "pca": baselines.pca(x),
        "ica": baselines.ica(x)[0],
    }


def test_directions_are_unit_rows(mixture):
    for dictionary in each_method(mixture[0]).values():
        torch.testing.assert_close(dictionary.directions.norm(dim=1), torch.ones(dictionary.n_features))


@pytest.mark.parametrize("method", ["default", "pca", "ica"])
def test_signed_and_complete_means_exact(mixture, method):
    x = mixture[0][:500]
    for form in (lambda same: same, baselines.both_signs, lambda made: baselines.top_k(made, D)):
        torch.testing.assert_close(form(each_method(mixture[0])[method])(x), x, rtol=1e-4, atol=1e-3)


def test_pca_is_scikit_learns_up_to_sign(mixture):
    from sklearn.decomposition import PCA

    reference = PCA().fit(mixture[0].double().numpy())
    cosine = (baselines.pca(mixture[0]).directions.double() * torch.from_numpy(reference.components_)).sum(1)
    torch.testing.assert_close(cosine.abs(), torch.ones(D, dtype=torch.float64), rtol=0, atol=1e-6)


def test_pca_as_in_the_code_does_not_centre(mixture):
    made = baselines.pca(mixture[0], centre=False)
    torch.testing.assert_close(made.encode(mixture[0][:9]), mixture[0][:9] @ made.directions.T)
    assert torch.equal(made.directions, baselines.pca(mixture[0]).directions)


def test_ica_finds_the_mixture_and_converges(mixture):
    x, mixing = mixture
    made, changes = baselines.ica(x, tolerance=1e-6)
    found = metrics.one_to_one(mixing, baselines.oriented(made, x).directions)
    assert found.min() > 0.99  # with the sign, since the sources are skewed to the right
    assert changes[-1] < 1e-6 <= min(changes[:-1])
    assert metrics.one_to_one(mixing, baselines.pca(x).directions).abs().mean() < 0.9


def test_ica_is_what_one_call_of_scikit_learn_gives(mixture):
    from sklearn.decomposition import FastICA

    reference = FastICA(whiten="unit-variance", random_state=0, tol=1e-7, max_iter=500).fit(mixture[0].double().numpy())
    mixing = torch.from_numpy(reference.mixing_.T).float()
    cosine = metrics.cosines(baselines.ica(mixture[0], tolerance=1e-6)[0].directions, mixing)
    assert cosine.abs().max(dim=1).values.min() > 0.9999


def test_ica_stops_at_the_iterations_given(mixture):
    assert len(baselines.ica(mixture[0], iterations=2, tolerance=0)[1]) == 2


def test_rectified_codes_are_the_positive_part(mixture):
    x = mixture[0][:50] - 5
    for made in each_method(mixture[0]).values():
        assert torch.equal(baselines.rectified(made).encode(x), made.encode(x).clamp(min=0))
        assert not made.rectify  # the original is left alone


def test_top_k_counts_and_equals_both_signs(mixture):
    x = mixture[0][:50]
    pca = baselines.pca(mixture[0])
    signed, doubled = baselines.top_k(pca, 2), baselines.top_k(baselines.both_signs(pca), 2)
    assert (signed.encode(x) != 0).sum(1).tolist() == [2] * 50
    assert (doubled.encode(x) > 0).sum(1).tolist() == [2] * 50
    torch.testing.assert_close(signed(x), doubled(x))
    kept = signed.encode(x)
    assert (kept.abs().sum(1) >= pca.encode(x).abs().topk(2).values.sum(1) - 1e-4).all()


def test_oriented_turns_the_heavy_tail_up_and_changes_nothing_else(mixture):
    x = mixture[0]
    made = baselines.ica(x)[0]
    made.encoder[0] *= -1
    made.decoder[0] *= -1
    turned = baselines.oriented(made, x)
    assert (baselines.moments(turned, x.split(1000)).skew > 0).all()
    torch.testing.assert_close(turned(x), made(x))


def test_moments_of_an_exponential(mixture):
    x = torch.empty(400_000, 1).exponential_(generator=torch.Generator().manual_seed(0))
    found = baselines.moments(baselines.default_basis(1), x.split(7_000))
    assert found.mean.item() == pytest.approx(1, rel=0.02)
    assert found.variance.item() == pytest.approx(1, rel=0.02)
    assert found.skew.item() == pytest.approx(2, rel=0.05)
    assert found.kurtosis.item() == pytest.approx(9, rel=0.1)


def test_moments_of_a_feature_that_never_varies_are_nan():
    found = baselines.moments(baselines.default_basis(2), [torch.tensor([[1.0, 3], [1, 4]])])
    assert found.skew.isnan().tolist() == [True, False]


def test_ica_top_k_of_the_code_is_the_formula_of_the_code(mixture):
    from sklearn.preprocessing import StandardScaler

    x = mixture[0]
    made = baselines.ica(x)[0]
    scaler = StandardScaler().fit(x.numpy())
    # rows that turn standardised coordinates into components of unit variance, then applied to what is not standardised
    standardised = torch.from_numpy(scaler.transform(x.numpy())).double()
    code = made.encode(x).double()
    rows = torch.linalg.lstsq(standardised, (code - code.mean(0)) / code.std(0)).solution.T.float()
    scores = x[:20] @ torch.cat([rows, -rows]).T
    wanted = torch.relu(scores) * (scores >= scores.topk(2).values[:, -1:])
    torch.testing.assert_close(baselines.ica_top_k_of_the_code(made, x, 2).encode(x[:20]), wanted, rtol=1e-2, atol=1e-2)


def test_few_activations_are_refused(mixture):
    for method in (baselines.pca, baselines.ica):
        with pytest.raises(BaselineError, match=r"6 activations are too few for 6 components: give more than 6"):
            method(mixture[0][:D])


def test_components_beyond_the_width_are_refused(mixture):
    with pytest.raises(BaselineError, match=r"7 components of activations of width 6: ask for 1 to 6"):
        baselines.pca(mixture[0], 7)


def test_ica_of_activations_without_full_rank_is_refused(mixture):
    flat = mixture[0].clone()
    flat[:, 0] = flat[:, 1]
    with pytest.raises(BaselineError, match=r"only 5 of 6 components have variance: ask for 5 or fewer"):
        baselines.ica(flat)
    assert baselines.ica(flat, 5)[0].n_features == 5


@pytest.mark.parametrize("k", [0, 7])
def test_k_beyond_the_directions_is_refused(k):
    with pytest.raises(BaselineError, match=rf"k = {k}: the dictionary has 6 directions"):
        baselines.top_k(baselines.default_basis(D), k)


def test_save_and_load_keep_every_form(tmp_path, mixture):
    x = mixture[0][:40]
    made = baselines.top_k(baselines.both_signs(baselines.pca(mixture[0], 4)), 3)
    dictionaries.save(made, tmp_path / "pca_topk.safetensors", note="kept")
    loaded = baselines.load_all(tmp_path)["pca_topk"]
    assert torch.equal(loaded.encode(x), made.encode(x))
    assert torch.equal(loaded(x), made(x))


def test_a_missing_folder_names_the_notebook_that_makes_it(tmp_path):
    with pytest.raises(MissingArtefact, match="Notebook 03_baselines makes it"):
        baselines.load_all(tmp_path / "none")


def keep(store, folder, **parameters):
    """`fitted` of a PCA, and how often it was made."""
    calls = []

    def make():
        calls.append(1)
        return baselines.pca(baselines.sample(store, 200)), {"said": 7}

    return *baselines.fitted("pca", make, folder, store, **parameters), len(calls)


def test_a_finished_fit_is_loaded_until_its_specification_changes(harvested, tmp_path):
    store = ActivationStore(harvested / RESIDUAL)
    made, about, calls = keep(store, tmp_path, n=200)
    assert (calls, about["said"], about["spec"]["parameters"]) == (1, 7, {"n": 200})
    again, _, calls = keep(store, tmp_path, n=200)
    assert calls == 0
    assert torch.equal(again.directions, made.directions)
    assert keep(store, tmp_path, n=201)[2] == 1
    assert keep(ActivationStore(harvested / RESIDUAL, outlier_factor=5.0), tmp_path, n=201)[2] == 1


def test_a_killed_fit_leaves_nothing_that_counts_as_finished(harvested, tmp_path):
    def make():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baselines.fitted("pca", make, tmp_path, ActivationStore(harvested / RESIDUAL))
    assert not list(tmp_path.iterdir())


def test_a_width_other_than_the_stores_is_refused(harvested, tmp_path):
    with pytest.raises(BaselineError, match=r"'default' has width 32, but blocks.0.mlp.hook_post has 48"):
        baselines.fitted(
            "default", lambda: (baselines.default_basis(32), {}), tmp_path, ActivationStore(harvested / MLP)
        )


def test_more_activations_than_harvested_are_refused(harvested):
    store = ActivationStore(harvested / RESIDUAL)
    with pytest.raises(BaselineError, match=rf"{store.n + 1} activations wanted, .* has {store.n}: ask for fewer"):
        baselines.sample(store, store.n + 1)


def test_a_sample_is_drawn_once_without_repetition(harvested):
    store = ActivationStore(harvested / RESIDUAL)
    whole = baselines.sample(store, store.n)
    assert torch.equal(whole[:50], baselines.sample(store, 50))
    assert len(whole.unique(dim=0)) == len(next(store.chunks(store.n)).unique(dim=0))
