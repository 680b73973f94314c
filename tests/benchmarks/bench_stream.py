"""Streaming and tokenising against the harvest of a model of Pythia-70M's size: text must be at least five times as fast.

The text is the pocket Pile as .jsonl.zst; the tokenizer the bundled model's (49,152 tokens, Pythia's has 50,254); the model a
random GPT-NeoX of 6 layers, d 512, of which all residual hooks are written to disk.
"""

import itertools
import json
import shutil
import tempfile
from pathlib import Path

import torch
import zstandard
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging

from saelib import activations, corpus, models, streams
from saelib.corpus import TokenRows
from tests.benchmarks.timing import interleaved

MODEL, ROWS, DOCUMENTS = "smollm2-135m-instruct", 64, 256


def main():
    torch.set_num_threads(2)
    logging.disable_progress_bar()
    dtype, tokenizer = models.fast_dtype(), models.load_tokenizer(MODEL)
    place = Path(tempfile.mkdtemp())
    with zstandard.open(place / "pile.jsonl.zst", "wt", encoding="utf-8") as file:
        for document in itertools.islice(corpus.read_documents("pocket-pile"), DOCUMENTS):
            file.write(json.dumps({"text": document["text"], "meta": {}}) + "\n")
    config = GPTNeoXConfig(
        vocab_size=50_304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=2048,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
    forward = models.bare_forward(str(place / "model"), hooks, dtype=dtype)
    tokens = torch.randint(1000, 40_000, (ROWS, 256), dtype=torch.int32)
    rows, counted = TokenRows(tokens, tokens[:0], tokens, tokens[:0], spec={}), []

    def text():
        documents = streams.json_lines(place / "pile.jsonl.zst")
        counted.append(sum(len(ids) for _, ids in streams.tokenised(documents, tokenizer, place / "parts")))

    def harvest():
        activations.harvest(rows, hooks, place / "activations", lambda _: forward, dtype=dtype)

    def tidy():
        for name in ("parts", "activations"):
            shutil.rmtree(place / name, ignore_errors=True)

    seconds = interleaved({"text": text, "harvest": harvest}, rounds=5, warm_up=1, tidy=tidy)
    rates = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    rates = {"text": counted[-1] / rates["text"], "harvest": tokens.numel() / rates["harvest"]}
    print(f"  streaming and tokenising, parts kept    {rates['text']:12,.0f} tokens/s")
    print(f"  harvest of 6 layers at 70M's size, {dtype} {rates['harvest']:12,.0f} tokens/s")
    print(f"  ratio {rates['text'] / rates['harvest']:.0f} (at least 5)")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
