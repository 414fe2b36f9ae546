"""Training of the example model: AdamW, warm-up and cosine decay, a light load-balancing loss.

Losses are in nats per token. All randomness is seeded; on the same machine and corpus a run can be
repeated exactly.
"""

import csv
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from example_moe.corpus import collect, texts, write_manifest
from example_moe.model import ExampleMoE, ModelConfig, balance_loss
from example_moe.text import Stream, random_windows, streams, train_tokenizer, unigram_loss
from kernels_ref import Routing


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how the model is trained."""

    steps: int = 2600
    batch_tokens: int = 2048
    """Tokens of a step, over all its windows."""
    window: int = 256
    """Tokens of a window; the last steps use longer ones."""
    long_window: int = 512
    long_share: float = 0.12
    """Share of the steps, at the end, with the long window."""
    learning_rate: float = 2e-3
    warmup_steps: int = 120
    weight_decay: float = 0.1
    balance: float = 1e-2
    """Weight of the load-balancing loss: light, so that some skew stays, as in real models."""
    bytes_per_domain: int = 3_200_000
    eval_every: int = 100
    eval_windows: int = 8
    """Held-out windows per domain."""
    seed: int = 1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: ExampleMoE, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.97), fused=True)


def next_token_loss(model: ExampleMoE, windows: Tensor) -> tuple[Tensor, list[Routing]]:
    """Cross-entropy (nats per token) of each next token, and the routing."""
    logits_BSV, routings = model(windows[:, :-1])
    return functional.cross_entropy(logits_BSV.flatten(0, 1), windows[:, 1:].flatten()), routings


def load_max_over_mean(routings: list[Routing]) -> float:
    """Busiest expert's load over the mean load, mean over layers."""
    ratios = []
    for routing in routings:
        experts = routing.probs_TE.shape[1]
        load_E = torch.bincount(routing.topk_ids_TK.flatten(), minlength=experts).double()
        ratios.append(float(load_E.max() / load_E.mean()))
    return float(np.mean(ratios))


@torch.no_grad()
def held_out_losses(
    model: ExampleMoE, held_out: dict[str, Stream], config: TrainConfig
) -> dict[str, float]:
    """Loss per domain (nats per token) on the same held-out windows each time."""
    losses = {}
    for domain, stream in held_out.items():
        rng = np.random.default_rng(config.seed)
        windows = random_windows(rng, {domain: stream}, config.eval_windows, config.window)
        losses[domain] = next_token_loss(model, windows)[0].item()
    return losses


def train_step(
    model: ExampleMoE, optimizer: torch.optim.Optimizer, windows: Tensor, balance: float
) -> dict[str, float]:
    """One optimiser step; its losses and load skew."""
    loss, routings = next_token_loss(model, windows)
    even = balance_loss(routings)
    torch.autograd.backward(loss + balance * even)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "train_loss": loss.item(),
        "balance_loss": even.item(),
        "load_max_over_mean": load_max_over_mean(routings),
    }


def fit(
    model: ExampleMoE,
    train: dict[str, Stream],
    held_out: dict[str, Stream],
    config: TrainConfig,
    out: Path,
) -> None:
    """Train `model`; write ``training_log.csv`` and, now and then, ``model.pt`` into `out`."""
    optimizer = make_optimizer(model, config)
    rng = np.random.default_rng(config.seed)
    long_from = round(config.steps * (1 - config.long_share))
    recent: list[dict[str, float]] = []
    start = time.monotonic()
    with (out / "training_log.csv").open("w", newline="") as file:
        log = None
        for step in range(config.steps):
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            window = config.window if step < long_from else config.long_window
            windows = random_windows(rng, train, config.batch_tokens // window, window)
            recent.append(train_step(model, optimizer, windows, config.balance))
            done = step + 1
            if done % config.eval_every and done not in (1, config.steps):
                continue
            losses = held_out_losses(model, held_out, config)
            row: dict[str, float] = {"step": done, "tokens": done * config.batch_tokens}
            row["learning_rate"] = round(rate, 7)
            row |= {k: round(float(np.mean([r[k] for r in recent])), 4) for k in recent[0]}
            row |= {f"held_out_{domain}": round(loss, 4) for domain, loss in losses.items()}
            row["held_out_mean"] = round(float(np.mean(list(losses.values()))), 4)
            log = log or csv.DictWriter(file, list(row))
            if done == 1:
                log.writeheader()
            log.writerow(row)
            file.flush()
            recent.clear()
            speed = row["tokens"] / (time.monotonic() - start)
            print(
                f"step {done}/{config.steps}  train {row['train_loss']:.3f}  "
                f"held-out {row['held_out_mean']:.3f}  load max/mean "
                f"{row['load_max_over_mean']:.2f}  {speed:.0f} tokens/s",
                flush=True,
            )
            torch.save(model.state_dict(), out / "model.pt")


def run(model_config: ModelConfig, config: TrainConfig, out: Path) -> None:
    """Corpus, tokenizer, model, training: everything that recording needs, written into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    corpus = collect(config.bytes_per_domain)
    write_manifest(corpus, out / "manifest.json")
    tokenizer = train_tokenizer(texts(corpus, "train"), model_config.vocab_size)
    tokenizer.save(str(out / "tokenizer.json"))
    train, held_out = (streams(tokenizer, corpus, split) for split in ("train", "held_out"))
    print({domain: len(stream) for domain, stream in train.items()}, "training tokens")
    baseline = unigram_loss(train, held_out, model_config.vocab_size)
    model = ExampleMoE(model_config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters; unigram baseline {baseline}", flush=True)
    (out / "config.json").write_text(json.dumps(model_config.to_json(), indent=2) + "\n")
    facts = {
        "parameters": parameters,
        "train_tokens": {domain: len(stream) for domain, stream in train.items()},
        "held_out_tokens": {domain: len(stream) for domain, stream in held_out.items()},
        "unigram_loss": baseline,
        "settings": asdict(config),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    fit(model, train, held_out, config, out)
