"""The store gives back what was harvested: every row once per pass, exact statistics, and refuses damaged shards."""

from collections import Counter

import pytest
import torch
from conftest import MLP, RESIDUAL
from safetensors.torch import load_file

from saelib import activations, corpus, files, store
from saelib.paths import MissingArtefact


def concatenated(folder, split: str = "train") -> torch.Tensor:
    return torch.cat([load_file(path)["activations"] for path in sorted(folder.glob(f"{split}-*.safetensors"))])


def harvest_numbers(folder, n_rows: int = 25, outliers: tuple = ()):
    """A real harvest whose "model" gives for token t the activation (t, 1, t % 7); shards of 4 x 8 activations.

    The first value makes every row recognisable. Tokens in `outliers` give an activation 1000 times longer.
    """

    def forward(tokens, take):
        t = tokens.float()
        value = torch.stack([t, torch.ones_like(t), t % 7], dim=-1)
        for number in outliers:
            value[tokens == number] *= 1000
        take("blocks.0.hook_resid_post", value)

    tokens = torch.arange(n_rows * 9, dtype=torch.int32).view(n_rows, 9)
    rows = corpus.TokenRows(tokens, tokens[:2], tokens, tokens[:2], spec={"text": "numbers"})
    made = activations.harvest(rows, ["blocks.0.hook_resid_post"], folder, lambda hooks: forward, rows_per_shard=4)
    return made["blocks.0.hook_resid_post"]


@pytest.fixture
def numbers(tmp_path):
    """200 recognisable activations in 7 shards."""
    return store.ActivationStore(harvest_numbers(tmp_path))


def firsts(batches) -> list[float]:
    return [value for batch in batches for value in batch[:, 0].tolist()]


def test_only_the_first_rows_are_taken_where_a_number_is_asked_for(numbers):
    part = store.ActivationStore(numbers.folder, n_rows=60)
    assert part.n == 60 and part.n_batches(20) == 3
    first = concatenated(numbers.folder)[:60].float()
    assert sorted(firsts(part.batches(20, seed=0))) == sorted(first[:, 0].tolist())
    torch.testing.assert_close(part.mean, first.mean(0))
    assert store.ActivationStore(numbers.folder).n == 200
    with pytest.raises(
        activations.HarvestError, match="has 200 activations of the split 'train', fewer than the 201 asked for"
    ):
        store.ActivationStore(numbers.folder, n_rows=201)


def test_a_pass_gives_every_row_once_when_the_size_divides(numbers):
    batches = list(numbers.batches(20, seed=0))
    assert [batch.shape for batch in batches] == [(20, 3)] * 10 and numbers.n_batches(20) == 10
    assert sorted(firsts(batches)) == sorted(concatenated(numbers.folder)[:, 0].tolist())


def test_only_an_incomplete_last_batch_is_dropped(numbers):
    found = firsts(numbers.batches(30, seed=0))
    assert len(found) == len(set(found)) == 180
    assert set(found) <= set(concatenated(numbers.folder)[:, 0].tolist())


def test_a_batch_mixes_shards(numbers):
    shard_of = {value: place // 32 for place, value in enumerate(concatenated(numbers.folder)[:, 0].tolist())}
    for batch in numbers.batches(20, seed=0):
        assert len({shard_of[value] for value in batch[:, 0].tolist()}) >= 3


def test_the_order_depends_on_the_seed_alone(numbers):
    first = firsts(numbers.batches(20, seed=1))
    assert first == firsts(numbers.batches(20, seed=1))
    assert first != firsts(numbers.batches(20, seed=2))


@pytest.mark.parametrize("start", [0, 1, 3, 9, 10])
@pytest.mark.parametrize("window", [20, 50, store.WINDOW])
def test_a_pass_that_starts_later_gives_just_the_rest(numbers, monkeypatch, start, window):
    whole = list(numbers.batches(20, seed=3))
    monkeypatch.setattr(store, "WINDOW", window)
    rest = list(numbers.batches(20, seed=3, start=start))
    assert len(rest) == 10 - start
    for found, expected in zip(rest, whole[start:], strict=True):
        assert torch.equal(found, expected)


def test_a_batch_larger_than_the_store_gives_no_batch(numbers):
    assert list(numbers.batches(201, seed=0)) == [] and numbers.n_batches(201) == 0


@pytest.mark.parametrize("hook", [RESIDUAL, MLP])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rows_equal_direct_indexing_of_the_shards(harvested, hook, split):
    whole = concatenated(harvested / hook, split)
    read = store.ActivationStore(harvested / hook, split, outlier_factor=None)
    assert (len(read), read.d, read.hook) == (*whole.shape, hook)
    index = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:100]
    index = torch.cat([index, index[:5], torch.tensor([0, len(whole) - 1])])  # repeated, first and last
    assert torch.equal(read.rows(index), whole[index])


def test_chunks_are_all_rows_in_order_or_the_first_few(harvested):
    read = store.ActivationStore(harvested / MLP, outlier_factor=None)
    assert torch.equal(torch.cat(list(read.chunks(77))), concatenated(harvested / MLP))
    assert torch.equal(torch.cat(list(read.chunks(77, limit=100))), concatenated(harvested / MLP)[:100])


@pytest.mark.parametrize("hook", [RESIDUAL, MLP])
def test_mean_and_scale_equal_direct_computation_also_when_cached(harvested_copy, hook):
    whole = concatenated(harvested_copy / hook).double()
    first = store.ActivationStore(harvested_copy / hook, outlier_factor=None)
    again = store.ActivationStore(harvested_copy / hook, outlier_factor=None)
    torch.testing.assert_close(first.mean, whole.mean(0).float(), rtol=1e-6, atol=1e-7)
    assert first.mean.dtype == torch.float32
    assert first.scale == pytest.approx(whole.square().mean().sqrt().item(), rel=1e-9)
    assert torch.equal(first.mean, again.mean) and first.scale == again.scale


def test_outliers_are_left_out_and_counted(tmp_path):
    read = store.ActivationStore(harvest_numbers(tmp_path, outliers=(1, 100, 200)))  # the first is 15 times the median
    assert (read.n, read.n_left_out) == (197, 3)
    assert not {1_000.0, 100_000.0, 200_000.0} & set(firsts(read.batches(1, seed=0)))
    whole = concatenated(read.folder)
    kept = whole[whole.norm(dim=1) <= 10 * whole.norm(dim=1).median()]
    assert torch.equal(read.rows(torch.arange(197)), kept)
    torch.testing.assert_close(read.mean, kept.mean(0))
    assert read.scale == pytest.approx(kept.double().square().mean().sqrt().item())


def test_without_a_factor_all_rows_are_kept_and_the_statistics_differ(tmp_path):
    folder = harvest_numbers(tmp_path, outliers=(40,))
    without, with_all = store.ActivationStore(folder), store.ActivationStore(folder, outlier_factor=None)
    assert (with_all.n, with_all.n_left_out) == (200, 0)
    assert with_all.scale > 5 * without.scale


def test_rows_keep_the_stored_dtype(rows, llama_forward, tmp_path):
    activations.harvest(rows, [MLP], tmp_path, lambda hooks: llama_forward, dtype=torch.bfloat16)
    read = store.ActivationStore(tmp_path / MLP)
    batch = next(read.batches(8, seed=0))
    assert batch.dtype == torch.bfloat16
    whole = Counter(map(tuple, concatenated(tmp_path / MLP).tolist()))
    assert not Counter(map(tuple, batch.tolist())) - whole


SHARD = "train-00001.safetensors"


def damage(path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-10])
    elif how == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()


@pytest.mark.parametrize(
    "how, words", [("truncated", "truncated or altered"), ("altered", "altered"), ("gone", "missing")]
)
def test_a_damaged_shard_is_refused_by_name(harvested_copy, how, words):
    damage(harvested_copy / MLP / SHARD, how)
    with pytest.raises(activations.HarvestError, match=words) as caught:
        store.ActivationStore(harvested_copy / MLP)
    assert str(harvested_copy / MLP / SHARD) in str(caught.value) and "notebook 01" in str(caught.value)


def test_a_damaged_shard_of_the_other_split_does_no_harm(harvested_copy):
    damage(harvested_copy / MLP / SHARD, "altered")
    assert store.ActivationStore(harvested_copy / MLP, "held_out").n == 180


def test_a_missing_shard_is_noticed_even_without_verification(harvested_copy):
    damage(harvested_copy / MLP / SHARD, "gone")
    with pytest.raises(activations.HarvestError, match="missing"):
        store.ActivationStore(harvested_copy / MLP, verify=False)


def test_an_unfinished_harvest_is_refused(harvested_copy):
    manifest = files.read_json(harvested_copy / MLP / "manifest.json")
    files.write_json(harvested_copy / MLP / "manifest.json", manifest | {"complete": False})
    with pytest.raises(activations.HarvestError, match=r"not finished\. Run notebook 01 again") as caught:
        store.ActivationStore(harvested_copy / MLP)
    assert MLP in str(caught.value)


def test_nothing_harvested_names_the_notebook_that_harvests(tmp_path):
    with pytest.raises(MissingArtefact, match="01_collect_activations"):
        store.ActivationStore(tmp_path / MLP)
