"""Files are whole or absent, whatever happens during the write."""

import errno
import hashlib
import json

import pytest

from saelib import files


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_key_does_not_depend_on_the_order_of_a_spec_but_on_each_value():
    assert files.key({"a": 1, "b": [2, 3]}) == files.key({"b": [2, 3], "a": 1})
    assert files.key({"a": 1, "b": [2, 3]}) != files.key({"a": 1, "b": [3, 2]})
    assert len(files.key({})) == 16


def test_atomic_makes_missing_folders_and_leaves_only_the_final_file(tmp_path):
    target = tmp_path / "new" / "folder" / "out.txt"
    with files.atomic(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.EACCES, "denied")])
def test_atomic_leaves_nothing_after_a_failure_and_passes_it_on(tmp_path, failure):
    with pytest.raises(type(failure)) as caught, files.atomic(tmp_path / "out.txt") as temporary:
        temporary.write_text("half")
        raise failure
    assert caught.value is failure
    assert list(tmp_path.iterdir()) == []


def test_atomic_keeps_the_former_content_after_a_failure(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("former")
    with pytest.raises(RuntimeError), files.atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "former"
    assert list(tmp_path.iterdir()) == [target]


def test_a_really_full_device_becomes_disk_full_naming_the_file(tmp_path):
    with (
        pytest.raises(files.DiskFull, match=r"out\.txt.*free some space") as caught,
        files.atomic(tmp_path / "out.txt") as temporary,
    ):
        temporary.symlink_to("/dev/full")  # every write to it fails with ENOSPC
        temporary.write_text("too much")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_reported_in_words_only_becomes_disk_full(tmp_path):
    """safetensors reports an I/O error of its own class, without errno."""
    with pytest.raises(files.DiskFull), files.atomic(tmp_path / "out.txt"):
        raise ValueError("I/O error: No space left on device (os error 28)")


def test_json_is_written_readable_with_a_final_newline_and_read_back(tmp_path):
    content = {"a": [1, 2.5], "b": {"c": "é"}}
    files.write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n") and text.count("\n") > 3
    assert files.read_json(tmp_path / "a.json") == content == json.loads(text)


def test_json_that_cannot_be_written_leaves_the_former_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_atomic_folder_replaces_the_old_one_or_leaves_it(tmp_path):
    target = tmp_path / "new" / "page"
    for content in ("first", "second"):
        with files.atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
            assert not (target / content).exists()
        assert [path.name for path in target.iterdir()] == [content]
    with pytest.raises(RuntimeError, match="in the middle"), files.atomic_folder(target) as temporary:
        (temporary / "third").write_text("half")
        raise RuntimeError("in the middle")
    assert [path.name for path in target.iterdir()] == ["second"] and [target] == list(target.parent.iterdir())
