"""From text to token rows: what is read, how it is split and cut, what is cached, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import zstandard
from conftest import MARK, document, sentence

from saelib import corpus, files

DOCUMENTS = [document(number) for number in range(100)]


def make(tokenizer, documents=DOCUMENTS, **settings):
    return corpus.make_rows(
        documents, tokenizer, **{"context": 16, "n_train": 30, "n_held_out": 10, "separator": MARK} | settings
    )


def names(rows: corpus.TokenRows, split: str) -> set[str]:
    return {rows.documents[number] for number in getattr(rows, f"{split}_doc").flatten().tolist()}


def stream(tokenizer, documents) -> tuple[list[int], list[int]]:
    """All tokens in one line, each document closed by the separator, and the number of each token's document."""
    tokens, owners = [], []
    for number, each in enumerate(documents):
        ids = [*tokenizer(each["text"])["input_ids"], tokenizer.convert_tokens_to_ids(MARK)]
        tokens += ids
        owners += [number] * len(ids)
    return tokens, owners


# --- splitting and cutting ---


def test_no_document_feeds_both_splits(tokenizer):
    rows = make(tokenizer, held_out_share=0.3)
    train, held_out = names(rows, "train"), names(rows, "held_out")
    assert len(train) > 10 and len(held_out) > 5
    assert not train & held_out


def test_the_split_of_a_document_does_not_depend_on_the_order_or_on_other_documents(tokenizer):
    forward = make(tokenizer, held_out_share=0.3)
    backward = make(tokenizer, DOCUMENTS[::-1], held_out_share=0.3)
    fewer = make(tokenizer, DOCUMENTS[20:], held_out_share=0.3)
    for other in (backward, fewer):
        assert not names(forward, "train") & names(other, "held_out")
        assert not names(forward, "held_out") & names(other, "train")


def test_documents_of_a_split_that_is_not_asked_for_are_left_out_and_change_nothing(tokenizer):
    both, one = make(tokenizer, held_out_share=0.3), make(tokenizer, held_out_share=0.3, n_train=0)
    assert torch.equal(one.held_out, both.held_out) and one.train.shape == (0, 16)
    assert names(one, "held_out") == names(both, "held_out") and len(one.documents) < len(both.documents)


def test_another_seed_splits_otherwise(tokenizer):
    first, second = make(tokenizer, held_out_share=0.3), make(tokenizer, held_out_share=0.3, seed=1)
    assert names(first, "train") & names(second, "held_out")


def test_rows_have_the_shape_asked_for_and_start_with_the_separator(tokenizer):
    rows = make(tokenizer)
    assert rows.train.shape == rows.train_doc.shape == (30, 16)
    assert rows.held_out.shape == rows.held_out_doc.shape == (10, 16)
    assert rows.train.dtype == rows.held_out.dtype == torch.int32
    assert (rows.train[:, 0] == tokenizer.eos_token_id).all() and (rows.held_out[:, 0] == tokenizer.eos_token_id).all()


def test_without_the_leading_separator_rows_are_text_throughout(tokenizer):
    tokens, _ = stream(tokenizer, DOCUMENTS)
    rows = make(tokenizer, held_out_share=0, n_held_out=0, n_train=len(tokens) // 16, row_starts_with_separator=False)
    assert sum(row[0] == tokenizer.eos_token_id for row in rows.train.tolist()) < len(rows.train) / 2
    assert sorted(rows.train.flatten().tolist()) == sorted(tokens[: rows.train.numel()])


def test_tokens_are_never_repeated_and_keep_their_document(tokenizer):
    tokens, owners = stream(tokenizer, DOCUMENTS)
    n = len(tokens) // 15
    rows = make(tokenizer, held_out_share=0, n_train=n, n_held_out=0)
    cut = sorted((tokens[i * 15 : i * 15 + 15], owners[i * 15 : i * 15 + 15]) for i in range(n))
    assert sorted(zip(rows.train[:, 1:].tolist(), rows.train_doc[:, 1:].tolist(), strict=True)) == cut
    assert torch.equal(rows.train_doc[:, 0], rows.train_doc[:, 1]), "the leading separator counts to what follows it"


def test_rows_are_in_random_but_fixed_order(tokenizer):
    first, again = make(tokenizer), make(tokenizer)
    assert torch.equal(first.train, again.train) and torch.equal(first.train_doc, again.train_doc)
    begins = first.train_doc[:, 1].tolist()
    assert begins != sorted(begins)


def test_tokens_are_counted_by_source(tokenizer):
    documents = [each | {"source": "even" if number % 2 == 0 else "odd"} for number, each in enumerate(DOCUMENTS)]
    rows = make(tokenizer, documents)
    assert rows.tokens_by_source == {
        "even": len(stream(tokenizer, documents[::2])[0]),
        "odd": len(stream(tokenizer, documents[1::2])[0]),
    }


def test_too_few_tokens_are_refused_with_the_number_there_is(tokenizer):
    tokens, _ = stream(tokenizer, DOCUMENTS[:5])
    with pytest.raises(corpus.CorpusError) as caught:
        make(tokenizer, DOCUMENTS[:5], held_out_share=0, n_train=9_000, n_held_out=0)
    for part in ("9,000 train rows of 16 tokens", f"holds {len(tokens) // 15:,} ", f"({len(tokens):,} tokens"):
        assert part in str(caught.value)


def test_a_held_out_split_that_is_too_small_is_refused_by_name(tokenizer):
    with pytest.raises(corpus.CorpusError, match="held_out rows"):
        make(tokenizer, held_out_share=0)


def test_an_unknown_separator_is_named_with_the_tokenizers_own(tokenizer):
    with pytest.raises(corpus.CorpusError, match=r"'<\|nothing\|>'.*'<\|endoftext\|>'"):
        make(tokenizer, separator="<|nothing|>")


def test_an_empty_document_leaves_no_token_and_no_separator(tokenizer):
    with_empty = make(tokenizer, [document(0) | {"text": ""}, *DOCUMENTS, document(1) | {"id": "e", "text": ""}])
    without = make(tokenizer)
    assert torch.equal(with_empty.train, without.train)
    assert with_empty.documents == without.documents


def test_a_stream_is_read_only_as_far_as_needed(tokenizer):
    read = []

    def endless():
        for number in range(1_000_000):
            read.append(number)
            yield document(number)

    rows = make(tokenizer, endless(), read_all=False)
    assert len(rows.train) == 30 and len(rows.held_out) == 10
    assert len(read) < 1000


UNUSUAL = {
    "emoji": "a 👩‍👩‍👧‍👦 family 🏳️‍🌈 and 🇫🇷",
    "combining marks": "Z͑ͫ̓a̴̵̡l̨ǵo e\u0301 is not \u00e9",
    "right to left": "שלום עולם and \u202eمرحبا\u202c",
    "NUL": "be\x00fore and after",
    "zero width": "a\u200bb\u200dc\ufeffd",
    "controls and blanks": "\ttab \x07 \x1b[0m   many   blanks \n\n\n end ",
    "beyond the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff 漢字 𠮷",
}


@pytest.mark.parametrize("text", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_unicode_decodes_back_to_the_same_text(tokenizer, tmp_path, text):
    (tmp_path / "a.txt").write_text(text, "utf-8")
    n = len(tokenizer(text)["input_ids"])
    rows = make(
        tokenizer,
        corpus.read_documents(str(tmp_path / "a.txt")),
        context=n + 2,
        n_train=1,
        n_held_out=0,
        held_out_share=0,
    )
    tokens = rows.train[0].tolist()
    assert tokens[0] == tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[1:-1], clean_up_tokenization_spaces=False) == text


# --- reading ---


def write_lines(path: Path, records: list) -> str:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
    return str(path)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "poem.txt").write_text("ü and\nmore", "utf-8")
    expected = [{"source": tmp_path.name, "id": "poem.txt", "text": "ü and\nmore"}]
    assert list(corpus.read_documents(str(tmp_path / "poem.txt"))) == expected


def test_a_folder_gives_a_document_per_text_file_in_order_of_name(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    found = list(corpus.read_documents(str(tmp_path)))
    assert [each["id"] for each in found] == ["a.txt", "b.txt"]
    assert [each["text"] for each in found] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.zst"])
def test_json_lines_are_read_plain_and_compressed(tmp_path, name):
    text = write_lines(tmp_path / name, [{"text": "one", "meta": 1}, {"text": "", "meta": 2}, {"text": "drei ü\x00"}])
    found = list(corpus.read_documents(text))
    assert [each["text"] for each in found] == ["one", "", "drei ü\x00"]
    assert [each["id"] for each in found] == ["0", "1", "2"]
    assert {each["source"] for each in found} == {name}


def test_records_without_text_are_refused_with_the_fields_they_have(tmp_path):
    text = write_lines(tmp_path / "lines.jsonl", [{"body": "one", "meta": 1}])
    with pytest.raises(corpus.CorpusError, match=r"lines\.jsonl, record 0: wants a field 'text' .* has body, meta"):
        list(corpus.read_documents(text))


def test_one_record_without_text_among_others_is_refused_by_number(tmp_path):
    text = write_lines(tmp_path / "lines.jsonl", [{"text": "one"}, {"body": "two"}, {"text": "three"}])
    with pytest.raises(corpus.CorpusError, match=r"lines\.jsonl, record 1: wants a field 'text'"):
        list(corpus.read_documents(text))


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    text = write_lines(tmp_path / "lines.jsonl", [{"text": "2020-01-01T00:00:00Z"}])
    assert [each["text"] for each in corpus.read_documents(text)] == ["2020-01-01T00:00:00Z"]


def test_a_line_that_is_no_json_is_refused_with_the_file_named(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(corpus.CorpusError, match=r"lines\.jsonl"):
        list(corpus.read_documents(str(tmp_path / "lines.jsonl")))


def test_an_empty_json_lines_file_is_refused_with_the_file_named_or_gives_nothing(tokenizer, tmp_path):
    (tmp_path / "lines.jsonl").write_text("")
    with pytest.raises(corpus.CorpusError, match=r"0 tokens|lines\.jsonl"):
        make(tokenizer, corpus.read_documents(str(tmp_path / "lines.jsonl")))


@pytest.mark.parametrize("text", ["pocket-pie", "no/such.txt", "no/such.jsonl", "no/such.jsonl.zst"])
def test_an_unknown_text_lists_what_can_be_given(text):
    with pytest.raises(corpus.CorpusError, match=r"known corpora are pocket-pile; .*\.jsonl") as caught:
        corpus.read_documents(text)
    assert f"'{text}'" in str(caught.value)


def test_a_hub_data_set_without_network_says_what_to_do():
    with pytest.raises(
        corpus.CorpusError, match=r"nobody/no-such-set' .*HF_HUB_OFFLINE=0.*HF_HOME.*JSON lines with a 'text' field"
    ):
        list(corpus.read_documents("hub:nobody/no-such-set"))


# --- the cache ---

SETTINGS = {"context": 16, "n_train": 5, "n_held_out": 0, "separator": MARK, "held_out_share": 0.0}


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(sentence(number) for number in range(40)))
    return path


def cached(tmp_path, text, tokenizer, **settings):
    return corpus.token_rows(tmp_path / "run", str(text), tokenizer, model="tiny", **SETTINGS | settings)


def test_same_settings_return_the_same_rows_without_a_tokenizer(tmp_path, text, tokenizer):
    made = cached(tmp_path, text, tokenizer)
    again = cached(tmp_path, text, None)
    for name in ("train", "held_out", "train_doc", "held_out_doc"):
        assert torch.equal(getattr(made, name), getattr(again, name))
    assert (made.documents, made.tokens_by_source) == (again.documents, again.tokens_by_source)
    assert files.key(made.spec) == files.key(again.spec)


@pytest.mark.parametrize(
    "changed", [{"context": 12}, {"n_train": 4}, {"seed": 1}, {"row_starts_with_separator": False}]
)
def test_changed_settings_make_the_rows_anew(tmp_path, text, tokenizer, changed):
    before = cached(tmp_path, text, tokenizer)
    after = cached(tmp_path, text, tokenizer, **changed)
    assert before.train.tolist() != after.train.tolist()
    fresh = corpus.make_rows(corpus.read_documents(str(text)), tokenizer, **SETTINGS | changed)
    assert torch.equal(after.train, fresh.train)


def test_a_changed_text_file_makes_the_rows_anew(tmp_path, text, tokenizer):
    before = cached(tmp_path, text, tokenizer)
    text.write_text(" ".join(sentence(number) for number in range(100, 140)))
    assert cached(tmp_path, text, tokenizer).train.tolist() != before.train.tolist()


def test_a_changed_file_in_a_folder_makes_the_rows_anew(tmp_path, text, tokenizer):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text(text.read_text())
    before = cached(tmp_path, folder, tokenizer)
    (folder / "a.txt").write_text(" ".join(sentence(number) for number in range(100, 140)))
    assert cached(tmp_path, folder, tokenizer).train.tolist() != before.train.tolist()


def test_rows_without_their_head_do_not_count(tmp_path, text, tokenizer):
    made = cached(tmp_path, text, tokenizer)
    (tmp_path / "run" / "tokens.json").unlink()
    assert torch.equal(cached(tmp_path, text, tokenizer).train, made.train)
    assert (tmp_path / "run" / "tokens.json").exists()


def test_a_data_set_is_streamed_through_the_datasets_library(tmp_path):
    """A folder in the layout of a Hub data set stands for the Hub: the same loader opens both."""
    (tmp_path / "pile").mkdir()
    write_lines(tmp_path / "pile" / "train.jsonl", [{"text": "one", "meta": {}}, {"text": "two", "meta": {}}])
    name = str(tmp_path / "pile")
    expected = [{"source": name, "id": str(number), "text": text} for number, text in enumerate(("one", "two"))]
    assert list(corpus.read_documents(f"hub:{name}")) == expected
