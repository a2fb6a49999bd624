"""Byte-level BPE over the training split, and the batches a step sees."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
VOCAB = 2048


def tokenizer(splits: dict[str, dict[str, list[str]]], folder: Path) -> Tokenizer:
    """The tokenizer, trained on the training split only; cached as tokenizer.json."""
    path = folder / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator((t for d in splits["train"].values() for t in d), trainer)
    made.save(str(path))
    return made


def encode(made: Tokenizer, documents: list[str]) -> list[list[int]]:
    """Every document's ids, each opened by the end-of-text token."""
    end = made.token_to_id(END)
    assert end is not None
    return [[end, *found.ids] for found in made.encode_batch(documents)]


class Windows:
    """Training windows of `length` + 1 tokens, in another order every epoch; by step, so that a
    resumed run sees what an uninterrupted one would have."""

    def __init__(
        self, domains: dict[str, list[str]], made: Tokenizer, length: int, cache: Path
    ) -> None:
        documents = [text for texts in domains.values() for text in texts]
        random.Random(0).shuffle(documents)
        if not cache.exists():
            ids = [i for doc in encode(made, documents) for i in doc]
            torch.save(torch.tensor(ids, dtype=torch.int16), cache)
        self.stream = torch.load(cache, weights_only=True)
        self.count, self.length = len(self.stream), length

    def batch(self, step: int, sequences: int) -> torch.Tensor:
        """[sequences, length + 1] int64."""
        per_epoch = (self.count - 2 * self.length) // self.length // sequences
        epoch, at = divmod(step, per_epoch)
        order = random.Random(epoch)
        offset = order.randrange(self.length)  # another cut of the documents every epoch
        starts = list(range(per_epoch * sequences))
        order.shuffle(starts)
        picked = starts[at * sequences : (at + 1) * sequences]
        firsts = (offset + i * self.length for i in picked)
        return torch.stack([self.stream[f : f + self.length + 1] for f in firsts]).long()
