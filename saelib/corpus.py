"""From text to token rows: read documents, keep them apart, split them into train and held-out, cut them into rows."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import zstandard
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from saelib import files, sources
from saelib.paths import RAW


class CorpusError(ValueError):
    """The text cannot give what was asked for; the message says how much there is."""


@dataclass(frozen=True)
class TokenRows:
    """Token rows of both splits.

    ``train`` and ``held_out`` are int32 [n_rows, context]; ``train_doc`` and ``held_out_doc`` have the same shapes and
    hold the number of the document that each token came from, an index into ``documents`` (``"source/id"``).
    """

    train: torch.Tensor
    held_out: torch.Tensor
    train_doc: torch.Tensor
    held_out_doc: torch.Tensor
    spec: dict
    documents: list[str] = field(default_factory=list)
    tokens_by_source: dict = field(default_factory=dict)


def read_documents(text: str, raw: Path = RAW) -> Iterator[dict]:
    """Yield ``{"source", "id", "text"}`` for each document of `text`, in a fixed order.

    `text` is the name of a corpus in ``data/sources.yaml`` (read whole, in an order fixed by hash, so that every
    register comes early), the path of a ``.txt`` file or a folder of them (a document each), the path of a ``.jsonl``
    or ``.jsonl.zst`` file with a ``text`` field, or ``hub:owner/name[:configuration][:split]`` (streamed).
    """
    corpora = sources.catalogue()["corpora"]
    if text in corpora:
        documents = [document for name in corpora[text] for document in sources.read_text(name, raw)]
        return iter(sorted(documents, key=lambda document: _share(document, seed=0)))
    if text.startswith("hub:"):
        return _read_hub(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return map(_read_file, sorted(path.glob("*.txt")))
    if path.suffix == ".txt" and path.exists():
        return iter([_read_file(path)])
    if path.name.endswith((".jsonl", ".jsonl.zst")) and path.exists():
        return _read_json_lines(path)
    raise CorpusError(
        f"no text at '{text}': known corpora are {', '.join(corpora)}; otherwise give an existing .txt, .jsonl or "
        ".jsonl.zst file, a folder of .txt files, or hub:owner/name"
    )


def _read_file(path: Path) -> dict:
    try:
        return {"source": path.parent.name, "id": path.name, "text": path.read_text("utf-8")}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def _read_json_lines(path: Path) -> Iterator[dict]:
    """Records of a ``.jsonl`` or ``.jsonl.zst`` file, one line in memory at a time."""
    with open(path, "rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8")):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{path}, line {number + 1} is not JSON: {error}") from error
            yield _as_document(record, path.name, number)


def _read_hub(text: str) -> Iterator[dict]:
    """Stream a Hub data set, ``hub:owner/name[:configuration][:split]``, through `datasets`."""
    from datasets import load_dataset

    name, configuration, split, *_ = [*text.removeprefix("hub:").split(":"), None, None]
    try:
        stream = load_dataset(name, configuration or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds for "not cached and no network"
        raise CorpusError(
            f"cannot open the Hub data set {name} ({type(error).__name__}: {error}). Without a network, save it as "
            "JSON lines with a 'text' field and give that file's path instead"
        ) from error
    for number, record in enumerate(stream):
        yield _as_document(record, name, number)


def _as_document(record: dict, source: str, number: int) -> dict:
    if not (isinstance(record, dict) and isinstance(record.get("text"), str)):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise CorpusError(f"{source}, record {number}: wants a field 'text' that holds text; it has {found}")
    return {"source": source, "id": str(number), "text": record["text"]}


def _share(document: dict, seed: int) -> float:
    """A number in [0, 1) that depends on the document's name and `seed` alone, not on its place in the corpus."""
    name = f"{seed}/{document['source']}/{document['id']}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


def make_rows(
    documents: Iterable[dict],
    tokenizer,
    *,
    context: int,
    n_train: int,
    n_held_out: int,
    separator: str,
    row_starts_with_separator: bool = True,
    held_out_share: float = 0.1,
    seed: int = 0,
    read_all: bool = True,
    spec: dict | None = None,
) -> TokenRows:
    """Tokenise documents, join them with `separator`, cut into rows of `context` tokens and take what is asked for.

    A document belongs to the held-out split with probability `held_out_share`, decided by a hash of its name, so no
    document feeds both. With ``row_starts_with_separator`` the first token of each row is the separator (it serves
    as BOS and its position is left out of the activations); the paper's code has no such token. Rows are permuted by
    `seed`; with ``read_all=False`` reading stops as soon as both splits are filled (streams).

    Sizes `n_train` and `n_held_out` are in rows. Raises `CorpusError` when the text holds fewer: nothing is repeated.
    """
    mark = tokenizer.convert_tokens_to_ids(separator)
    if mark is None or tokenizer.convert_ids_to_tokens(mark) != separator:
        raise CorpusError(
            f"separator '{separator}' is no token of this tokenizer; its own EOS is '{tokenizer.eos_token}'"
        )
    body = context - int(row_starts_with_separator)
    wanted = {"train": n_train * body, "held_out": n_held_out * body}
    tokens, owners = {"train": [], "held_out": []}, {"train": [], "held_out": []}
    have, names, by_source = {"train": 0, "held_out": 0}, [], {}
    # the backend does not warn about its model's length (nothing is cut here), and what looks like a special token in a
    # text is text
    tokenizer.backend_tokenizer.encode_special_tokens = True
    encode = tokenizer.backend_tokenizer.encode_batch
    for batch in _batches(tqdm(documents, desc="tokenise", unit="doc", mininterval=0.5), 64):
        for document, encoding in zip(batch, encode([d["text"] for d in batch], add_special_tokens=False), strict=True):
            if not encoding.ids:
                continue  # an empty document holds no tokens; it is not an error and leaves no separator
            split = "held_out" if _share(document, seed + 1) < held_out_share else "train"
            ids = [*encoding.ids, mark]
            tokens[split].append(torch.tensor(ids, dtype=torch.int32))
            owners[split].append(torch.full((len(ids),), len(names), dtype=torch.int32))
            names.append(f"{document['source']}/{document['id']}")
            have[split] += len(ids)
            by_source[document["source"]] = by_source.get(document["source"], 0) + len(ids)
        if not read_all and all(have[split] >= wanted[split] for split in wanted):
            break
    rows = {}
    for split, n_rows in (("train", n_train), ("held_out", n_held_out)):
        available = have[split] // body
        if available < n_rows:
            raise CorpusError(
                f"{n_rows:,} {split} rows of {context} tokens asked for, but the text holds {available:,} "
                f"({have[split]:,} tokens in that split). Ask for fewer or give more text; text is never repeated"
            )
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:n_rows]
        for name, parts in ((split, tokens[split]), (f"{split}_doc", owners[split])):
            flat = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)
            cut = flat[: available * body].view(available, body)[order]
            if row_starts_with_separator:
                first = torch.full((n_rows, 1), mark, dtype=torch.int32) if name == split else cut[:, :1]
                cut = torch.cat([first, cut], dim=1)
            rows[name] = cut
    return TokenRows(**rows, spec=spec or {}, documents=names, tokens_by_source=by_source)


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def token_rows(folder: Path, text: str, tokenizer, *, model: str, raw: Path = RAW, **settings) -> TokenRows:
    """`make_rows` of `text`, cached in ``folder/tokens.safetensors``; made anew when `settings` differ.

    `settings` are the keyword arguments of `make_rows`. The specification names the text's hashes, so that a changed
    source or file is noticed.
    """
    listed = sources.catalogue()
    if text in listed["corpora"]:
        origin = {name: listed["texts"][name]["sha256"] for name in listed["corpora"][text]}
        origin["reader"] = sources.READER_VERSION
    else:
        path = Path(text).expanduser()
        parts = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.exists() else []
        origin = {part.name: files.sha256(part) for part in parts}
    spec = {"text": text, "origin": origin, "model": model, **settings}
    table, head = folder / "tokens.safetensors", folder / "tokens.json"
    if head.exists() and table.exists():
        stored = files.read_json(head)
        if stored["spec"] == json.loads(json.dumps(spec)):
            meta = {name: stored[name] for name in ("spec", "documents", "tokens_by_source")}
            return TokenRows(**load_file(table), **meta)
    settings = {"read_all": text in listed["corpora"], **settings}
    rows = make_rows(read_documents(text, raw), tokenizer, spec=spec, **settings)
    head.unlink(missing_ok=True)  # the head is written last: without it the table does not count
    parts = {name: getattr(rows, name).contiguous() for name in ("train", "held_out", "train_doc", "held_out_doc")}
    with files.atomic(table) as temporary:
        save_file(parts, temporary)
    files.write_json(head, {"spec": spec, "documents": rows.documents, "tokens_by_source": rows.tokens_by_source})
    return rows
