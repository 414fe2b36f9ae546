"""Recording: held-out text through the trained model, its routing into a trace.

Requests look as in serving, a prompt (prefill, step 0) and then one token per step (decode), but
the decoded tokens are the held-out text itself: *teacher-forced*. Attention is causal, so one pass
over a whole request routes each token as a token-by-token decode would.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from example_moe.corpus import Document, read_held_out
from example_moe.model import ExampleMoE, ModelConfig
from example_moe.text import Stream, encode, load_tokenizer
from traces.recorder import RoutingRecorder
from traces.routing_trace import RoutingTrace

NOTE = (
    "routing of a small MoE language model trained by this project's script; not a production "
    "model. Decode is teacher-forced: the decoded tokens are held-out text."
)


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Which requests are recorded; lengths in tokens."""

    requests: int = 224
    min_tokens: int = 64
    max_tokens: int = 512
    prompt_median: float = 60.0
    """Prompts are lognormal with sigma 0.7."""
    output_median: float = 170.0
    """Outputs are lognormal with sigma 0.6."""
    batch: int = 8
    seed: int = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request."""

    tokens: Stream
    prompt: int
    """How many of the tokens are the prompt; at least 1."""
    domain: str


def draw_requests(
    held_out: dict[Document, str], tokenizer_path: Path, config: RecordConfig
) -> list[Request]:
    """Cut requests out of held-out text, no text twice, domains evenly and in random order."""
    tokenizer = load_tokenizer(tokenizer_path)
    rng = np.random.default_rng(config.seed)
    blocks: dict[str, list[Stream]] = {}
    for document, text in held_out.items():
        tokens = encode(tokenizer, text)
        pieces = np.split(tokens, range(config.max_tokens, len(tokens), config.max_tokens))
        usable = [piece for piece in pieces if len(piece) >= config.min_tokens]
        blocks.setdefault(document.domain, []).extend(usable)
    requests = []
    for domain, pieces in blocks.items():
        chosen = rng.permutation(len(pieces))[: -(-config.requests // len(blocks))]
        for index in chosen:
            prompt = max(8, round(rng.lognormal(np.log(config.prompt_median), 0.7)))
            output = max(16, round(rng.lognormal(np.log(config.output_median), 0.6)))
            tokens = pieces[index][: prompt + output]
            requests.append(
                Request(tokens=tokens, prompt=min(prompt, len(tokens) // 2), domain=domain)
            )
    return [requests[i] for i in rng.permutation(len(requests))[: config.requests]]


@torch.no_grad()
def record_requests(model: ExampleMoE, requests: list[Request], batch: int) -> RoutingTrace:
    """Run the requests through the model, `batch` at a time, padded on the right."""
    with RoutingRecorder(model, num_experts=model.config.num_experts) as recorder:
        for first in range(0, len(requests), batch):
            group = requests[first : first + batch]
            width = max(len(request.tokens) for request in group)
            position = np.arange(width)
            prompt = np.array([request.prompt for request in group])[:, None]
            mask = position < np.array([len(request.tokens) for request in group])[:, None]
            ids = np.zeros(mask.shape, dtype=np.int64)
            ids[mask] = np.concatenate([request.tokens for request in group])
            recorder.begin(
                request_ids=range(first, first + len(group)),
                phase=np.where(position < prompt, "prefill", "decode"),
                step=np.maximum(position - prompt + 1, 0),
                domains=[request.domain for request in group],
                mask=mask,
            )
            model(torch.from_numpy(ids))
    return recorder.trace(
        model="moeplan-example-moe-12x32",
        source="examples/train_example_moe.py, on held-out files of examples/data/manifest.json",
        licence="Apache-2.0",
        note=NOTE,
    )


def load_model(work: Path) -> ExampleMoE:
    """Read the model that training left in `work`."""
    model = ExampleMoE(ModelConfig.from_json(json.loads((work / "config.json").read_text())))
    model.load_state_dict(torch.load(work / "model.pt", weights_only=True))
    return model.eval()


def run(work: Path, config: RecordConfig) -> RoutingTrace:
    """Record held-out text with the model, tokenizer and manifest in `work`, without weights.

    The combine weights are left out: they would triple the file.
    """
    held_out = read_held_out(work / "manifest.json")
    requests = draw_requests(held_out, work / "tokenizer.json", config)
    trace = record_requests(load_model(work), requests, config.batch)
    return replace(trace, weights=None)
