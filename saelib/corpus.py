"""From text to token rows: read documents, keep them apart, split them into train and held-out, cut them into rows."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from saelib import files, sources, streams
from saelib.paths import RAW
from saelib.streams import CorpusError


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


def read_documents(text: str, raw: Path = RAW, *, start: int = 0) -> Iterator[dict]:
    """Yield ``{"source", "id", "text"}`` for each document of `text` from number `start` on, in a fixed order.

    `text` is the name of a corpus in ``data/sources.yaml`` (read whole, in an order fixed by hash, so that every
    register comes early), the path of a ``.txt`` file or a folder of them (a document each), the path of a ``.jsonl``
    or ``.jsonl.zst`` file with a ``text`` field, or ``hub:owner/name[:configuration][:split]``; the last two are streamed,
    and may end with ``#L`` and a line number, see `saelib.streams`.
    """
    corpora, (text, _) = sources.catalogue()["corpora"], streams.split_line(text)
    if text in corpora:
        documents = [document for name in corpora[text] for document in sources.read_text(name, raw)]
        documents = sorted(documents, key=lambda document: _share(document, seed=0))
        return itertools.islice(documents, start, None)
    if text.startswith("hub:"):
        return streams.hub_documents(text, start)
    path = Path(text).expanduser()
    if path.is_dir():
        return itertools.islice(map(_read_file, sorted(path.glob("*.txt"))), start, None)
    if path.suffix == ".txt" and path.exists():
        return itertools.islice([_read_file(path)], start, None)
    if path.name.endswith((".jsonl", ".jsonl.zst")) and path.exists():
        return streams.json_lines(path, start)
    raise CorpusError(
        f"no text at '{text}': known corpora are {', '.join(corpora)}; otherwise give an existing .txt, .jsonl or "
        ".jsonl.zst file, a folder of .txt files, or hub:owner/name"
    )


def _read_file(path: Path) -> dict:
    try:
        return {"source": path.parent.name, "id": path.name, "text": path.read_text("utf-8")}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def _share(document: dict, seed: int) -> float:
    """A number in [0, 1) that depends on the document's name and `seed` alone, not on its place in the corpus."""
    name = f"{seed}/{document['source']}/{document['id']}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


def make_rows(
    documents: Iterable[dict],
    tokenizer,
    held_out_documents: Iterable[dict] | None = None,
    *,
    context: int,
    n_train: int,
    n_held_out: int,
    separator: str,
    row_starts_with_separator: bool = True,
    held_out_share: float = 0.1,
    seed: int = 0,
    read_all: bool = True,
    keep: Path | None = None,
    spec: dict | None = None,
) -> TokenRows:
    """Tokenise documents, join them with `separator`, cut into rows of `context` tokens and take what is asked for.

    A document belongs to the held-out split with probability `held_out_share`, decided by a hash of its name, so no
    document feeds both; or the held-out ones come from `held_out_documents`, and `documents` are all for training. With
    ``row_starts_with_separator`` the first token of each row is the separator (it serves as BOS and its position is left
    out of the activations); the paper's code has no such token. Rows are permuted by `seed`; with ``read_all=False``
    reading stops as soon as both splits are filled (streams), and ids are kept below the folder `keep`, so that a broken
    run goes on where it broke.

    Sizes `n_train` and `n_held_out` are in rows; documents of a split of 0 rows are passed over. Raises `CorpusError` when
    the text holds fewer rows (nothing is repeated), and when it is broken before there are enough; then the error says how
    much came before.
    """
    mark = tokenizer.convert_tokens_to_ids(separator)
    if mark is None or tokenizer.convert_ids_to_tokens(mark) != separator:
        raise CorpusError(
            f"separator '{separator}' is no token of this tokenizer; its own EOS is '{tokenizer.eos_token}'"
        )
    body = context - int(row_starts_with_separator)
    wanted = {"train": n_train * body, "held_out": n_held_out * body}

    def split_of(document: dict) -> str:
        return "held_out" if _share(document, seed + 1) < held_out_share else "train"

    tokens, owners = {"train": [], "held_out": []}, {"train": [], "held_out": []}
    have, names, by_source = {"train": 0, "held_out": 0}, [], {}
    end = torch.tensor([mark], dtype=torch.int32)
    parts = {"all": documents} if held_out_documents is None else {"train": documents, "held_out": held_out_documents}
    for part, items in parts.items():
        if part == "all" and not all(wanted.values()):  # documents of a split that is not asked for need no tokens
            items = (document for document in items if wanted[split_of(document)])
        fills, folder = (part,) if part in wanted else tuple(wanted), keep / part if keep else None
        items = tqdm(items, desc="tokenise", unit="doc", mininterval=0.5)
        try:
            for document, ids in streams.tokenised(items, tokenizer, folder):
                if not len(ids):
                    continue  # an empty document holds no tokens; it is not an error and leaves no separator
                split = split_of(document) if part == "all" else part
                tokens[split].append(torch.cat([ids, end]))
                owners[split].append(torch.full((len(ids) + 1,), len(names), dtype=torch.int32))
                names.append(f"{document['source']}/{document['id']}")
                have[split] += len(ids) + 1
                by_source[document["source"]] = by_source.get(document["source"], 0) + len(ids) + 1
                if not read_all and all(have[each] >= wanted[each] for each in fills):
                    break
        except CorpusError as error:
            before = " and ".join(f"{have[each] // body:,} of {wanted[each] // body:,} {each} rows" for each in wanted)
            kept = f", kept in {keep}: reading goes on there" if keep else ""
            raise CorpusError(f"{error}. Before it came {len(names):,} documents, enough for {before}{kept}") from error
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


def token_rows(folder: Path, text: str, tokenizer, *, model: str, raw: Path = RAW, **settings) -> TokenRows:
    """`make_rows` of `text`, cached in ``folder/tokens.safetensors``; made anew when `settings` differ.

    `settings` are the keyword arguments of `make_rows`. The specification names the text's hashes, so that a changed
    source or file is noticed.
    """
    listed, (own, line) = sources.catalogue(), streams.split_line(text)
    whole = own in listed["corpora"]
    if whole:
        origin = {name: listed["texts"][name]["sha256"] for name in listed["corpora"][own]}
        origin["reader"] = sources.READER_VERSION
    else:
        path = Path(own).expanduser()
        parts = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.exists() else []
        origin = {part.name: files.sha256(part) for part in parts}
    spec = {"text": text, "origin": origin, "model": model, **settings}
    table, head = folder / "tokens.safetensors", folder / "tokens.json"
    if head.exists() and table.exists():
        stored = files.read_json(head)
        if stored["spec"] == json.loads(json.dumps(spec)):
            meta = {name: stored[name] for name in ("spec", "documents", "tokens_by_source")}
            return TokenRows(**load_file(table), **meta)
    settings = {"read_all": whole, "keep": None if whole else folder / "tokens.parts", **settings}
    documents, held_out = read_documents(text, raw), None
    if line is not None:
        documents, held_out = itertools.islice(documents, line), read_documents(text, raw, start=line)
    rows = make_rows(documents, tokenizer, held_out, spec=spec, **settings)
    head.unlink(missing_ok=True)  # the head is written last: without it the table does not count
    parts = {name: getattr(rows, name).contiguous() for name in ("train", "held_out", "train_doc", "held_out_doc")}
    with files.atomic(table) as temporary:
        save_file(parts, temporary)
    files.write_json(head, {"spec": spec, "documents": rows.documents, "tokens_by_source": rows.tokens_by_source})
    shutil.rmtree(folder / "tokens.parts", ignore_errors=True)
    return rows
