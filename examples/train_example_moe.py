"""Train a small MoE language model on text of this machine and record its routing.

    python examples/train_example_moe.py train     # about 40 minutes on one core
    python examples/train_example_moe.py record    # about a minute; can be redone without training
    python examples/train_example_moe.py all --miniature --work DIR   # the same path in a minute

``train`` leaves model, tokenizer, corpus manifest and log in the work folder; ``record`` runs
held-out text through the model and writes the trace and its statistics.
"""

import argparse
import os
from pathlib import Path

import torch
from example_moe import record, report, train
from example_moe.model import ModelConfig

HERE = Path(__file__).parent
MINIATURE_MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    moe_intermediate_size=16,
    max_position_embeddings=256,
    initializer_range=0.1,
)
"""Twelve layers of 32 experts as well, but narrow."""
MINIATURE_TRAINING = train.TrainConfig(
    steps=240,
    batch_tokens=512,
    window=64,
    long_window=128,
    learning_rate=5e-3,
    warmup_steps=15,
    bytes_per_domain=150_000,
    eval_every=50,
    eval_windows=4,
)
MINIATURE_RECORDING = record.RecordConfig(
    requests=28, max_tokens=192, prompt_median=20.0, output_median=50.0
)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "record", "all"])
    parser.add_argument("--work", type=Path, default=HERE.parent / "out" / "example-moe")
    parser.add_argument("--data", type=Path, help="where the trace goes; default examples/data")
    parser.add_argument(
        "--reference", type=Path, help="trace of a real model, its statistics to be put beside"
    )
    parser.add_argument("--miniature", action="store_true", help="narrow and short; needs --data")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.miniature and arguments.data is None:
        parser.error("--miniature without --data would overwrite the bundled trace -- add --data")
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(arguments.threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if arguments.what in ("train", "all"):
        model = MINIATURE_MODEL if arguments.miniature else ModelConfig()
        settings = MINIATURE_TRAINING if arguments.miniature else train.TrainConfig()
        train.run(model, settings, arguments.work)
    if arguments.what in ("record", "all"):
        settings_ = MINIATURE_RECORDING if arguments.miniature else record.RecordConfig()
        trace = record.run(arguments.work, settings_)
        report.write(trace, arguments.work, arguments.data or HERE / "data", arguments.reference)


if __name__ == "__main__":
    main()
