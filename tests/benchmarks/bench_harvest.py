"""Harvest of 12 layers of the bundled model against a bare transformers forward of the same layers and dtype."""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from saelib import activations, models
from saelib.corpus import TokenRows
from tests.benchmarks.timing import interleaved, report

MODEL, LAYERS, ROWS = "smollm2-135m-instruct", 12, 128


def main():
    dtype = models.fast_dtype()
    tokens = torch.randint(1000, 40_000, (ROWS, 256), dtype=torch.int32)
    empty = tokens[:0]
    rows = TokenRows(tokens, empty, tokens, empty, spec={})
    bare = AutoModelForCausalLM.from_pretrained(models.locate(MODEL), num_hidden_layers=LAYERS, dtype=dtype).base_model
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    forward = models.bare_forward(MODEL, hooks, dtype=dtype)
    bridge = models.bridge_forward(models.load_model(MODEL, dtype=dtype), hooks)
    folder = Path(tempfile.mkdtemp())

    @torch.inference_mode()
    def limit():
        for part in tokens.split(activations.BATCH):
            bare(part, use_cache=False)

    def harvest():
        activations.harvest(rows, hooks, folder, lambda _: forward, dtype=dtype)

    def cached():
        for part in tokens.split(activations.BATCH):
            bridge(part)

    print(f"  {ROWS} rows of 256 tokens, {LAYERS} layers, every residual hook written to disk, {dtype}")
    functions = {"bare transformers forward (the limit)": limit, "saelib harvest, shards written": harvest}
    functions["TransformerBridge.run_with_cache"] = cached
    seconds = interleaved(functions, rounds=5, warm_up=1, tidy=lambda: shutil.rmtree(folder, ignore_errors=True))
    report(seconds, "bare transformers forward (the limit)", tokens.numel(), "tokens")


if __name__ == "__main__":
    main()
