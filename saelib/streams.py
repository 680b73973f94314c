"""Text as a stream: JSON lines (plain or .zst) and Hub data sets, a document in memory at a time; tokenised resumably.

The name of a text may end with ``#L1000000``: documents from that line on (counted from 0) are held out, those before it
are for training, as in the paper's code (Pile shard 00, evaluation from line 1,000,000 on). Without it, a hash of the
document's name decides (`saelib.corpus`).
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import zstandard
from safetensors import safe_open
from safetensors.torch import save_file

from saelib import files, hub

BATCH = 64  # documents tokenised together
PART = 2**21  # tokens per part that is kept: some seconds of work


class CorpusError(ValueError):
    """The text cannot be read or cannot give what was asked for; the message says where, and how much there is."""


def split_line(text: str) -> tuple[str, int | None]:
    """``"pile.jsonl.zst#L1000000"`` as the text's own name and the line from which on it is held out; None without one."""
    found = re.fullmatch(r"(.+)#L(\d+)", text)
    return (found[1], int(found[2])) if found else (text, None)


def json_lines(path: Path, start: int = 0) -> Iterator[dict]:
    """Documents of a ``.jsonl`` or ``.jsonl.zst`` file from line `start` on (from 0); earlier lines are not parsed.

    Raises `CorpusError` with the number of the line (from 1) that is no JSON, or after which a compressed file breaks off.
    Not through `datasets`, which reads blocks: it knows no line numbers, and takes a text that looks like a date for one.
    """
    number = 0
    try:
        for number, line in enumerate(_lines(path), 1):
            if number > start:
                yield as_document(json.loads(line), path.name, number - 1)
    except CorpusError:
        raise
    except (EOFError, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{path} is truncated or damaged after line {number:,} ({error}): fetch the file again, or ask for fewer rows"
        ) from error
    except ValueError as error:
        raise CorpusError(f"{path}, line {number:,} is not JSON ({error}): mend or delete that line") from error


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or compressed file; EOFError where a compressed one ends within a frame."""
    if path.suffix != ".zst":
        with open(path, "rb") as file:
            yield from file
        return
    with open(path, "rb") as file:
        frame, rest = None, b""
        while block := file.read(2**17):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *whole, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from whole
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise EOFError("the last frame does not end")
        if rest:
            yield rest


def hub_documents(text: str, start: int = 0) -> Iterator[dict]:
    """Stream ``hub:owner/name[:configuration][:split]`` through `datasets`, from record `start` on.

    Raises `CorpusError`: unreachable, gated or missing, with what to do; or with the number of the record at which it broke.
    """
    from datasets import load_dataset

    name, configuration, split, *_ = [*text.removeprefix("hub:").split(":"), None, None]
    try:
        stream = load_dataset(name, configuration or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds for "not cached and no network"
        raise CorpusError(hub.explain(error, name, what="data set")) from error
    number = start
    try:
        for number, record in enumerate(stream.skip(start) if start else stream, start):
            yield as_document(record, name, number)
    except (OSError, RuntimeError) as error:
        raise CorpusError(f"after record {number:,}: {hub.explain(error, name, what='data set')}") from error


def as_document(record: dict, source: str, number: int) -> dict:
    """``{"source", "id", "text"}`` of a record with a field ``text``."""
    if not (isinstance(record, dict) and isinstance(record.get("text"), str)):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise CorpusError(f"{source}, record {number}: wants a field 'text' that holds text; it has {found}")
    return {"source": source, "id": str(number), "text": record["text"]}


def tokenised(documents: Iterable[dict], tokenizer, folder: Path | None = None) -> Iterator[tuple[dict, torch.Tensor]]:
    """Yield each document with its token ids, int32 [n], without special tokens.

    With a `folder`, ids are kept there in parts. What a broken or killed run left is read back, not tokenised again, as far
    as the documents are still the same (their hash stands in each part); an error keeps all that came before it.
    """
    # what looks like a special token in a text is text; the backend does not warn about its model's length
    tokenizer.backend_tokenizer.encode_special_tokens = True
    encode = tokenizer.backend_tokenizer.encode_batch
    documents, number, held = iter(documents), 0, []
    salt = tokenizer.backend_tokenizer.to_str().encode() if folder else b""
    while folder and (path := folder / f"part-{number:05d}.safetensors").exists():
        with safe_open(path, "pt") as file:
            about, ids, lengths = file.metadata(), file.get_tensor("ids"), file.get_tensor("lengths").tolist()
        batch = list(itertools.islice(documents, len(lengths)))
        if about["digest"] != _digest(batch, salt):
            documents = itertools.chain(batch, documents)  # the text or the tokenizer changed from here on
            break
        yield from zip(batch, ids.split(lengths), strict=True)
        number += 1

    def keep() -> None:
        nonlocal number
        batch, ids = zip(*held, strict=True)
        parts = {"ids": torch.cat(ids), "lengths": torch.tensor([len(one) for one in ids])}
        with files.atomic(folder / f"part-{number:05d}.safetensors") as temporary:
            save_file(parts, temporary, metadata={"digest": _digest(batch, salt)})
        number += 1
        held.clear()

    try:
        for batch in _batches(documents):
            encodings = encode([document["text"] for document in batch], add_special_tokens=False)
            made = [torch.tensor(encoding.ids, dtype=torch.int32) for encoding in encodings]
            if folder:
                held += zip(batch, made, strict=True)
                if sum(len(ids) for _, ids in held) >= PART:
                    keep()
            yield from zip(batch, made, strict=True)
    except CorpusError:
        if held:
            keep()
        raise


def _digest(documents: Iterable[dict], salt: bytes) -> str:
    found = hashlib.sha256(salt)
    for document in documents:
        for part in ("source", "id", "text"):
            found.update(document[part].encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _batches(documents: Iterable[dict]) -> Iterator[list[dict]]:
    """Lists of `BATCH` documents; what was read before an error comes out before the error does."""
    documents, batch, broken = iter(documents), [], None
    while broken is None:
        try:
            batch += [next(documents)]
        except (StopIteration, CorpusError) as error:
            broken = error
        if batch and (broken or len(batch) == BATCH):
            yield batch
            batch = []
    if isinstance(broken, CorpusError):
        raise broken
