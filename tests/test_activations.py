"""The harvest: right values, each computed once, and the same bytes whatever interrupts it."""

import errno
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MLP, RESIDUAL, folder_digests
from safetensors.torch import load_file, save_file

from saelib import activations, files, models

HOOKS = [RESIDUAL, MLP]


def never(hooks):
    raise AssertionError(f"the model was asked for {hooks}")


@pytest.fixture
def run(rows, llama_forward):
    """Harvest into a folder with the tiny Llama, already loaded."""

    def harvest(folder, hooks=HOOKS, make_forward=lambda hooks: llama_forward, **options):
        return activations.harvest(rows, hooks, folder, make_forward, **{"rows_per_shard": 16} | options)

    return harvest


def test_shards_hold_a_direct_forward_without_the_first_position(harvested, rows, llama_forward):
    for split, number, start, stop in activations.plan(rows, 16):
        parts = [llama_forward(tokens) for tokens in getattr(rows, split)[start:stop].split(activations.BATCH)]
        for hook in HOOKS:
            stored = load_file(harvested / hook / activations.shard_name(split, number))
            expected = torch.cat([part[hook][:, 1:].flatten(0, 1) for part in parts])
            assert torch.equal(stored["activations"], expected)
            assert torch.equal(stored["norm"], expected.norm(dim=1))


def test_the_shards_cover_all_rows_and_are_entered_with_their_hashes(harvested):
    for hook in HOOKS:
        manifest = files.read_json(harvested / hook / "manifest.json")
        assert {name: entry["rows"] for name, entry in manifest["shards"].items()} == {
            "train-00000.safetensors": 240,
            "train-00001.safetensors": 240,
            "train-00002.safetensors": 120,
            "held_out-00000.safetensors": 180,
        }
        assert manifest["complete"]
        assert manifest["d"] == {RESIDUAL: 32, MLP: 48}[hook]
        for name, entry in manifest["shards"].items():
            assert files.sha256(harvested / hook / name) == entry["sha256"]


def test_the_paper_keeps_the_first_position(run, tmp_path, rows):
    run(tmp_path, [MLP], first_position=0)
    assert load_file(tmp_path / MLP / "held_out-00000.safetensors")["activations"].shape == (12 * 16, 48)


def test_a_second_call_runs_no_forward_and_changes_no_byte(run, harvested_copy):
    before = folder_digests(harvested_copy)
    assert run(harvested_copy, make_forward=never) == {hook: harvested_copy / hook for hook in HOOKS}
    assert folder_digests(harvested_copy) == before


def test_only_the_missing_hook_is_asked_for(run, harvested_copy, llama):
    asked = []

    def make_forward(hooks):
        asked.append(hooks)
        return models.bare_forward(llama, hooks)

    run(harvested_copy, [*HOOKS, "blocks.0.attn.hook_z"], make_forward)
    assert asked == [["blocks.0.attn.hook_z"]]


def test_one_hook_alone_gives_the_same_bytes_as_among_several(run, harvested, tmp_path, llama):
    for hook in HOOKS:
        run(tmp_path, [hook], lambda hooks: models.bare_forward(llama, hooks))
        stored = {name: digest for name, digest in folder_digests(harvested / hook).items() if "statistics" not in name}
        assert folder_digests(tmp_path / hook) == stored


SCRIPT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(2)
from safetensors.torch import load_file
from saelib import activations, corpus, models

model, tokens, folder = sys.argv[1:4]
rows = corpus.TokenRows(**load_file(tokens), spec={"text": "made"})

def make_forward(hooks):
    forward = models.bare_forward(model, hooks)
    def slow(tokens, take):
        time.sleep(0.05)
        return forward(tokens, take)
    return slow

activations.harvest(rows, sys.argv[4:], Path(folder), make_forward, rows_per_shard=8)
"""


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(tmp_path, rows, llama, llama_forward):
    parts = {name: getattr(rows, name) for name in ("train", "held_out", "train_doc", "held_out_doc")}
    save_file(parts, tmp_path / "tokens.safetensors")
    (tmp_path / "harvest.py").write_text(SCRIPT)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, tmp_path / "harvest.py", llama, tmp_path / "tokens.safetensors", killed, *HOOKS]

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    first = killed / RESIDUAL / "train-00000.safetensors"
    deadline = time.monotonic() + 60
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert first.exists()
    assert 1 <= len(list(killed.rglob("*.safetensors"))) < 14
    assert not any(files.read_json(path)["complete"] for path in killed.rglob("manifest.json"))

    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    same = type(rows)(**parts, spec={"text": "made"})
    activations.harvest(same, HOOKS, undisturbed, lambda hooks: llama_forward, rows_per_shard=8)
    assert folder_digests(killed) == folder_digests(undisturbed)
    assert len(folder_digests(killed)) == 16


def test_what_was_harvested_before_an_interruption_is_not_run_again(run, tmp_path, llama_forward):
    calls = []

    def interrupted(hooks):
        def forward(tokens, take):
            calls.append(len(tokens))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return llama_forward(tokens, take)

        return forward

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, make_forward=interrupted)
    assert len(list((tmp_path / MLP).glob("*.safetensors"))) == 1
    run(tmp_path, make_forward=interrupted)
    assert calls[4:] == [8, 8, 8, 8, 4], "the second run begins at the second shard"


@pytest.mark.parametrize("links", [True, False])
def test_shards_that_another_harvest_has_are_taken_from_there(
    run, harvested, tmp_path, rows, llama_forward, links, monkeypatch
):
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda path, target: (_ for _ in ()).throw(OSError("another disk")))
    fewer = replace(rows, train=rows.train[:20], spec=rows.spec | {"n_train": 20})
    known = tmp_path / "known"
    activations.harvest(fewer, [MLP], known, lambda hooks: llama_forward, rows_per_shard=16)
    save_file({split: getattr(fewer, split).contiguous() for split in activations.SPLITS}, known / "tokens.safetensors")
    asked = []

    def watched(tokens, take=None):
        asked.append(tokens)
        return llama_forward(tokens, take)

    run(tmp_path / "own", [MLP], lambda hooks: watched, known=known)
    assert torch.equal(torch.cat(asked), rows.train[16:])
    own, whole = (folder_digests(folder / MLP) for folder in (tmp_path / "own", harvested))
    del own["manifest.json"], whole["manifest.json"]  # the same but for the order in which shards were entered
    assert own == whole
    assert files.read_json(tmp_path / "own" / MLP / "manifest.json") == files.read_json(
        harvested / MLP / "manifest.json"
    )


def test_another_layout_is_not_taken_over(run, harvested, tmp_path, rows):
    known = tmp_path / "known"
    run(known, [MLP], dtype=torch.float16)
    save_file({split: getattr(rows, split).contiguous() for split in activations.SPLITS}, known / "tokens.safetensors")
    run(tmp_path / "own", [MLP], known=known)
    assert folder_digests(tmp_path / "own" / MLP) == folder_digests(harvested / MLP)


@pytest.mark.parametrize(
    "changed", [{"dtype": torch.bfloat16}, {"first_position": 0}, {"rows_per_shard": 8}, {"coordinates": "paper"}]
)
def test_a_changed_parameter_is_announced_and_the_hook_made_anew(run, harvested_copy, tmp_path, changed):
    said = []
    run(harvested_copy, announce=said.append, **changed)
    assert len(said) == 2
    for hook, line in zip(HOOKS, said, strict=True):
        assert hook in line and next(iter(changed)) in line and "made anew" in line
    run(tmp_path / "fresh", **changed)
    assert folder_digests(harvested_copy) == folder_digests(tmp_path / "fresh")


def test_changed_tokens_are_announced(harvested_copy, rows, llama_forward):
    said = []
    other = type(rows)(rows.train, rows.held_out, rows.train_doc, rows.held_out_doc, spec=rows.spec | {"seed": 1})
    activations.harvest(
        other, [MLP], harvested_copy, lambda hooks: llama_forward, rows_per_shard=16, announce=said.append
    )
    assert said == [f"stale activations at {MLP} (tokens changed): made anew"]


@pytest.mark.parametrize("failing_write", [1, 2, 3, 4])
def test_a_full_disk_leaves_no_half_shard_and_the_next_call_finishes(
    run, harvested, tmp_path, monkeypatch, failing_write
):
    writes = []

    def full(tensors, path):
        writes.append(path)
        if len(writes) >= failing_write:  # and from then on, for the hooks are written side by side
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(activations, "save_file", full)
        with pytest.raises(files.DiskFull, match="run the same command again"):
            run(tmp_path)
    shards = {f"{path.parent.name}/{path.name}": path for path in tmp_path.rglob("*.safetensors")}
    assert len(shards) == failing_write - 1
    assert not list(tmp_path.rglob("*.tmp"))
    entered = set()
    for path in tmp_path.rglob("manifest.json"):
        manifest = files.read_json(path)
        assert not manifest["complete"]
        entered |= {f"{path.parent.name}/{name}" for name in manifest["shards"]}
    assert entered == set(shards)

    run(tmp_path)
    expected = {name: digest for name, digest in folder_digests(harvested).items() if "statistics" not in name}
    assert folder_digests(tmp_path) == expected


def test_activations_that_overflow_half_precision_are_refused_by_name(run, tmp_path, llama_forward):
    def large(hooks):
        return lambda tokens, take: llama_forward(tokens, lambda hook, values: take(hook, values * 1e6))

    with pytest.raises(activations.HarvestError, match=rf"{MLP}.*train-00000.*float16"):
        run(tmp_path, [MLP], large, dtype=torch.float16)
    assert not list(tmp_path.rglob("*.safetensors"))
    run(tmp_path, [MLP], large, dtype=torch.bfloat16)
    assert files.read_json(tmp_path / MLP / "manifest.json")["complete"]
