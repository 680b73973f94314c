"""A stand-in for Pythia and the Pile, made on the spot: a tiny GPT-NeoX with random weights and a Pile-shaped .jsonl.zst.

    python tests/standin.py FOLDER [LAYERS] [DOCUMENTS]

makes ``FOLDER/model`` (with the checkpoints ``step1000`` and ``step143000`` as subfolders) and ``FOLDER/pile.jsonl.zst``.
Layers are as many as Pythia's, so that a paper profile runs on it with its hooks as they are.
"""

import json
import random
import sys
from pathlib import Path

import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from saelib import ioi

MARK, STEPS = "<|endoftext|>", (1000, 143_000)
SUBSETS = ("Pile-CC", "Github", "PubMed Abstracts", "Wikipedia (en)", "StackExchange")


def documents(n: int, seed: int = 0):
    """`n` records of the Pile's form; the texts are sentences around names, places, numbers and lists."""
    draw = random.Random(seed)
    templates = ioi.both_orders()
    for number in range(n):
        parts = []
        for _ in range(draw.randint(4, 24)):
            a, b = draw.sample(ioi.NAMES, 2)
            place, thing = draw.choice(ioi.PLACES), draw.choice(ioi.OBJECTS)
            parts.append(draw.choice(templates).format(a=a, b=b, place=place, object=thing) + f" {a}.")
            parts.append(
                f"({b}'s part of the {thing}, {draw.randint(1, 99)} in all, isn't at the {place}’s end; they'll see a_b(x) too)"
            )
        yield {
            "text": f"{number}. " + " ".join(parts) + "\n",
            "meta": {"pile_set_name": SUBSETS[number % len(SUBSETS)]},
        }


def write_pile(path: Path, n: int) -> Path:
    """`n` documents as compressed JSON lines."""
    with zstandard.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in documents(n))
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which the names of the IOI prompts are one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[MARK], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((record["text"] for record in documents(400)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=MARK, eos_token=MARK, unk_token=MARK)


def save_model(folder: Path, tokenizer, *, layers: int, d: int = 32, seed: int = 0) -> Path:
    """A GPT-NeoX with random weights, wide enough that its blocks do something."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=d, intermediate_size=4 * d, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make(folder: Path, *, layers: int = 6, n_documents: int = 1500) -> dict[str, str]:
    """Both, below `folder`; returns the paths as a profile's ``model`` and ``text``."""
    tokenizer = make_tokenizer()
    save_model(folder / "model", tokenizer, layers=layers)
    for number, step in enumerate(STEPS):
        save_model(folder / "model" / f"step{step}", tokenizer, layers=layers, seed=1 + number)
    return {"model": str(folder / "model"), "text": str(write_pile(folder / "pile.jsonl.zst", n_documents))}


if __name__ == "__main__":
    target, *sizes = sys.argv[1:]
    print(make(Path(target), **dict(zip(("layers", "n_documents"), map(int, sizes), strict=False))))
