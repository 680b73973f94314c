"""One KL evaluation of 50 prompts against the bare forward of the remaining layers over the same columns; noise of the dtypes.

The bare forward knows the prefix's keys and values and the rotary angles, and ends with the final norm and the unembedding
of the last position. Ours adds the patch itself, the set-up of mask and prefix, and the KL. Limit: 1.15 times.
"""

import statistics

import torch

from saelib import dictionaries, ioi, models, patching
from saelib.paths import run_dir
from tests.benchmarks.timing import interleaved, report

MODEL, HOOK = "smollm2-135m-instruct", "blocks.10.hook_resid_post"
FOLDER = run_dir("laptop") / "dictionaries" / HOOK


def main():
    device = models.default_device()
    prompts, few = (ioi.make_prompts(models.load_tokenizer(MODEL), (n, n))[0] for n in (50, 8))
    dictionary = dictionaries.TiedSAE(1152, 576, generator=torch.Generator().manual_seed(0))
    if FOLDER.exists():
        dictionary = dictionaries.find(FOLDER, kind="tied", ratio=2.0, alpha=0.001, seed=0)[0]
    dictionary, lm = dictionary.to(device), patching.load(MODEL, device=device)
    tail = patching.Tail(lm, HOOK, prompts)
    patch = patching.patch(tail, dictionary)
    base, behind = lm.model.base_model, lm.blocks[tail.layer + 1 :]
    with torch.no_grad():
        angles = base.rotary_emb(tail.x, tail._places)

    @torch.no_grad()
    def bare():
        x, past = tail.x, patching._Prefix(tail._prefix, 1)
        for block in behind:
            x = block(x, attention_mask=tail._mask, past_key_values=past, use_cache=True, position_embeddings=angles)
            x = x[0] if isinstance(x, tuple) else x
        return lm.model.lm_head(base.norm(x[:, -1].contiguous()))

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    torch.testing.assert_close(bare().float(), tail.logits, rtol=1e-3, atol=1e-3)
    half = patch.candidates[: len(patch.candidates) // 2]
    functions = {f"bare forward, {len(behind)} blocks, {tail.x.shape[1]} columns (the limit)": bare}
    functions["KL of one set of features"] = lambda: patch.mean_kls([half])
    functions["logits of one set"] = torch.no_grad()(lambda: tail.run(patch.apply(half)[None]))
    seconds = interleaved(
        {name: lambda run=run: (run(), wait()) for name, run in functions.items()}, rounds=9, warm_up=1
    )
    limit, ours, _ = seconds
    report(seconds, limit, len(prompts), "prompts")
    ratios = [one / two for one, two in zip(seconds[ours], seconds[limit], strict=True)]
    print(f"  one KL evaluation over the bare forward: {statistics.median(ratios):.3f} (limit 1.15)")

    order = patch.candidates
    sets = [order[:0], *(order[torch.arange(len(order), device=device) != one] for one in range(8)), order[::2], order]
    kl = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        there = patching.patch(patching.Tail(patching.load(MODEL, dtype=dtype, device=device), HOOK, few), dictionary)
        kl[dtype] = there.measure(sets)[0].double().mean(1)
    for dtype in (torch.float32, torch.bfloat16):
        off = (kl[dtype] - kl[torch.float64]).abs()
        print(
            f"  noise on KL, {dtype}, against float64: mean {off.mean():.1e}, largest of {len(off)} {off.max():.1e} nats"
        )


if __name__ == "__main__":
    main()
