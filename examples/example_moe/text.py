"""From text to token streams: a byte-level BPE tokenizer and the batches drawn from the streams."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from example_moe.corpus import Document, texts

Stream = npt.NDArray[np.int64]
END_OF_TEXT = "<|end|>"


def train_tokenizer(train_texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the training texts only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train_texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Stream:
    """Token ids of one text, ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return np.array([*tokenizer.encode(text).ids, end], dtype=np.int64)


def streams(tokenizer: Tokenizer, corpus: dict[Document, str], split: str) -> dict[str, Stream]:
    """All texts of a split end to end, one stream per domain."""
    domains = sorted({document.domain for document in corpus})
    return {
        domain: np.concatenate([encode(tokenizer, text) for text in texts(corpus, split, domain)])
        for domain in domains
    }


def random_windows(
    rng: np.random.Generator, data: dict[str, Stream], requests: int, tokens: int
) -> torch.Tensor:
    """Windows ``[requests, tokens + 1]`` at random places, domains drawn evenly."""
    domains = list(data)
    rows = []
    for choice in rng.integers(len(domains), size=requests):
        stream = data[domains[choice]]
        start = rng.integers(len(stream) - tokens)
        rows.append(stream[start : start + tokens + 1])
    return torch.from_numpy(np.stack(rows))


def unigram_loss(
    train: dict[str, Stream], held_out: dict[str, Stream], vocab: int
) -> dict[str, float]:
    """Cross-entropy (nats per token) of held-out text under the training token frequencies.

    What a model reaches that has learnt which tokens are common and nothing of their order;
    frequencies are smoothed by one and weigh the domains evenly, as the batches do.
    """
    shares = [(np.bincount(s, minlength=vocab) + 1.0) / (len(s) + vocab) for s in train.values()]
    log_frequency = np.log(np.mean(shares, axis=0))
    return {domain: float(-log_frequency[stream].mean()) for domain, stream in held_out.items()}


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer that `train_tokenizer` made."""
    return Tokenizer.from_file(str(path))
