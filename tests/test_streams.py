"""Streams: what is read from where, in how much memory, and what is kept when a text breaks off."""

import itertools
import json
import random
import tracemalloc

import pytest
import torch
import zstandard
from conftest import MARK, document, sentence

from saelib import corpus, streams

RECORDS = [{"text": sentence(number), "meta": {"pile_set_name": "made"}} for number in range(300)]
SETTINGS = {"context": 16, "n_train": 60, "n_held_out": 10, "separator": MARK}


def lines(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture(params=["pile.jsonl", "pile.jsonl.zst"])
def path(request, tmp_path):
    made = tmp_path / request.param
    made.write_bytes(zstandard.compress(lines(RECORDS)) if made.suffix == ".zst" else lines(RECORDS))
    return made


def rows(tmp_path, path, tokenizer, suffix="", **settings):
    return corpus.token_rows(tmp_path / "run", f"{path}{suffix}", tokenizer, model="tiny", **SETTINGS | settings)


def test_reading_may_start_at_a_line(path):
    found = list(streams.json_lines(path, 298))
    assert [(one["id"], one["text"]) for one in found] == [("298", sentence(298)), ("299", sentence(299))]
    assert list(corpus.read_documents(f"{path}#L7", start=299)) == found[1:]


def test_lines_before_the_start_are_not_parsed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"not json\n" + lines(RECORDS[:1]))
    assert [one["text"] for one in streams.json_lines(tmp_path / "a.jsonl", 1)] == [sentence(0)]


def test_a_file_of_several_frames_and_without_a_last_newline_is_read_whole(tmp_path):
    data = lines(RECORDS).rstrip(b"\n")
    frames = [data[:1000], data[1000:1003], b"", data[1003:]]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
    assert [one["text"] for one in streams.json_lines(tmp_path / "a.jsonl.zst")] == [one["text"] for one in RECORDS]


def test_a_line_number_splits_the_text_as_in_the_papers_code(path, tokenizer, tmp_path):
    made = rows(tmp_path, path, tokenizer, "#L250")
    numbers = {split: {int(made.documents[one].split("/")[1]) for one in getattr(made, f"{split}_doc").unique()}
               for split in ("train", "held_out")}  # fmt: skip
    assert min(numbers["train"]) == 0 and max(numbers["train"]) < 250 <= min(numbers["held_out"]) < 260


def test_a_line_number_needs_lines_before_and_behind_it(path, tokenizer, tmp_path):
    with pytest.raises(corpus.CorpusError, match="60 train rows of 16 tokens asked for"):
        rows(tmp_path, path, tokenizer, "#L3")
    with pytest.raises(corpus.CorpusError, match="10 held_out rows of 16 tokens asked for, but the text holds 0"):
        rows(tmp_path, path, tokenizer, "#L300")


def test_a_text_is_never_wholly_in_memory(tmp_path):
    """Of 20 MB of text, a few documents and one block are held."""
    draw = random.Random(0)
    with zstandard.open(tmp_path / "big.jsonl.zst", "wb") as file:
        for _ in range(1000):
            file.write(lines([{"text": draw.randbytes(10_000).hex()}]))
    tracemalloc.start()
    assert sum(len(one["text"]) for one in streams.json_lines(tmp_path / "big.jsonl.zst")) == 20_000_000
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


# --- what breaks ---


def test_a_broken_line_is_named_and_what_came_before_is_kept(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(RECORDS[:100]) + b'{"text": "half a li\n' + lines(RECORDS[101:]))
    told = r"a\.jsonl, line 101 is not JSON .*Before it came 100 documents, enough for .* kept in .*tokens\.parts"
    with pytest.raises(corpus.CorpusError, match=told):
        rows(tmp_path, path, tokenizer, n_train=120)
    path.write_bytes(lines(RECORDS))  # mended
    encoded = count_encoded(tokenizer, monkeypatch)
    made = rows(tmp_path, path, tokenizer, n_train=120)
    assert 0 < sum(encoded) <= 200, "the 100 documents before the broken line are not tokenised again"
    monkeypatch.undo()
    assert torch.equal(made.train, rows(tmp_path / "undisturbed", path, tokenizer, n_train=120).train)
    assert not (tmp_path / "run" / "tokens.parts").exists()


def test_enough_rows_before_a_broken_line_are_enough(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS[:250]) + b"broken\n")
    assert len(rows(tmp_path, tmp_path / "a.jsonl", tokenizer).train) == 60


def test_a_truncated_zst_is_named_with_its_last_whole_line(tmp_path, tokenizer):
    path, texts = tmp_path / "a.jsonl.zst", [sentence(number, 40) for number in range(6000)]
    whole = zstandard.ZstdCompressor(level=1).compress(lines([{"text": text} for text in texts]))
    path.write_bytes(whole[: len(whole) // 2])
    read = []
    with pytest.raises(corpus.CorpusError, match=r"a\.jsonl\.zst is truncated or damaged after line [1-9]"):
        read.extend(one["text"] for one in streams.json_lines(path))
    assert 0 < len(read) < 6000 and read == texts[: len(read)]
    with pytest.raises(corpus.CorpusError, match=rf"truncated.*Before it came {len(read):,} documents"):
        rows(tmp_path, path, tokenizer, n_train=100_000)


def test_a_zst_with_damaged_bytes_is_named(tmp_path):
    whole = bytearray(zstandard.compress(lines(RECORDS)))
    whole[2] ^= 255
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    with pytest.raises(corpus.CorpusError, match=r"a\.jsonl\.zst is truncated or damaged after line 0"):
        list(streams.json_lines(tmp_path / "a.jsonl.zst"))


def test_a_hub_stream_that_breaks_names_the_record(monkeypatch):
    import datasets

    class Stream(list):
        def __iter__(self):
            yield from ({"text": "one"}, {"text": "two"})
            raise ConnectionError("LocalEntryNotFoundError")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **b: Stream())
    found = streams.hub_documents("hub:a/b")
    assert [one["text"] for one in itertools.islice(found, 2)] == ["one", "two"]
    with pytest.raises(corpus.CorpusError, match=r"after record 1: cannot load 'a/b'.*HF_HUB_OFFLINE"):
        next(found)


# --- tokenised documents are kept ---


def count_encoded(tokenizer, monkeypatch) -> list[int]:
    """Lengths of the batches that are really tokenised from now on (a Rust object: it is wrapped whole)."""
    seen, backend = [], tokenizer.backend_tokenizer

    class Counting:
        def encode_batch(self, texts, **options):
            seen.append(len(texts))
            return backend.encode_batch(texts, **options)

        def __getattr__(self, name):
            return getattr(backend, name)

    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda self: Counting()))
    return seen


def test_a_killed_run_goes_on_at_the_first_part_that_is_not_there(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PART", 1)  # a part per batch of 64
    documents = [document(number) for number in range(200)]
    expected = [ids.tolist() for _, ids in streams.tokenised(documents, tokenizer)]
    stopped = streams.tokenised(documents, tokenizer, tmp_path)
    begun = [next(stopped) for _ in range(130)]  # two whole parts, and the third has just been written
    del stopped
    assert len(begun) == 130 and len(list(tmp_path.glob("part-*.safetensors"))) == 3
    encoded = count_encoded(tokenizer, monkeypatch)
    again = list(streams.tokenised(documents, tokenizer, tmp_path))
    assert [ids.tolist() for _, ids in again] == expected and [one for one, _ in again] == documents
    assert sum(encoded) == 200 - 192


def test_parts_of_a_changed_text_are_tokenised_anew(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PART", 1)
    documents = [document(number) for number in range(130)]
    list(streams.tokenised(documents, tokenizer, tmp_path))
    documents[70]["text"] = "another cat"
    encoded = count_encoded(tokenizer, monkeypatch)
    again = [ids.tolist() for _, ids in streams.tokenised(documents, tokenizer, tmp_path)]
    assert sum(encoded) == 66, "the first part is as it was"
    monkeypatch.undo()
    assert again == [ids.tolist() for _, ids in streams.tokenised(documents, tokenizer)]
