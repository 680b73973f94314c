"""Real things of a small size that several test files share: two tiny models, a text, its token rows, a harvest."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported: no test reaches for the network
os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that wait for tiny products must not spin on a busy machine

from pathlib import Path

import pytest
import torch

from saelib import activations, corpus, models

MARK = "<|endoftext|>"
RESIDUAL, MLP = "blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"
TALE = "the sea is green and a cat sleeps under old trees while seven small birds sing of rain over warm hills"
WORDS = TALE.split()


def sentence(number: int, n_words: int = 12) -> str:
    """A sentence that no other number gives (its number is part of it)."""
    picks = [WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(n_words)]
    return f"{number}: {' '.join(picks)}."


def document(number: int, n_words: int = 12) -> dict:
    """A document as `corpus.read_documents` yields it."""
    return {"source": "made", "id": str(number), "text": sentence(number, n_words)}


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`; temporary files of a killed process (hidden) are not counted."""
    from saelib import files

    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): files.sha256(path) for path in found}


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """The machine has few cores, and sums must be taken in the same order in every process that is compared."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 320 tokens, trained on the spot; it knows every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[MARK], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([sentence(number) for number in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=MARK, eos_token=MARK, unk_token=MARK)


def _save(model_class, config, tokenizer, folder: Path) -> str:
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():  # the usual start is so small that the blocks hardly do anything
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama(tokenizer, tmp_path_factory) -> str:
    """Folder of a random Llama: 3 layers, d 32, rotary positions, grouped keys, RMS norm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(LlamaForCausalLM, config, tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def neox(tokenizer, tmp_path_factory) -> str:
    """Folder of a random GPT-NeoX (the family of Pythia): 2 layers, d 32, parallel blocks, biases, layer norm."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(GPTNeoXForCausalLM, config, tokenizer, tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="session")
def rows(tokenizer) -> corpus.TokenRows:
    """40 training and 12 held-out rows of 16 tokens."""
    documents = [document(number, 20) for number in range(120)]
    sizes = {"context": 16, "n_train": 40, "n_held_out": 12}
    return corpus.make_rows(
        documents, tokenizer, separator=MARK, held_out_share=0.3, spec={"text": "made", **sizes}, **sizes
    )


@pytest.fixture(scope="session")
def harvested(llama, rows, tmp_path_factory) -> Path:
    """Folder of a finished harvest of the tiny Llama in shards of 16 rows: 600 training activations, 180 held out."""
    folder = tmp_path_factory.mktemp("harvested")
    forward = activations.forward_for(llama, dtype=torch.float32, device="cpu")
    activations.harvest(rows, [RESIDUAL, MLP], folder, forward, rows_per_shard=16)
    return folder


@pytest.fixture
def harvested_copy(harvested, tmp_path) -> Path:
    """A copy of `harvested` that a test may damage."""
    import shutil

    return Path(shutil.copytree(harvested, tmp_path / "harvested"))


@pytest.fixture(scope="session")
def llama_forward(llama):
    """The tiny Llama's forward for both harvested hooks."""
    return models.bare_forward(llama, [RESIDUAL, MLP])
