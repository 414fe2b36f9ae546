"""The `workload` section of a scenario: a step, requests that come over time, or users who wait.

One of four shapes: the tokens of a step; a file of arrivals; arrivals drawn at a rate; a closed
loop of so many users. The last two take request lengths from a file or have one pair for all, as a
plan's sweep over batch sizes does.
"""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from basis.errors import InputError
from basis.schema import Strict
from planner.layouts_question import Sweep
from simulator.deployment import Workload
from simulator.serving import ClosedLoop
from traces.arrivals import (
    Arrivals,
    Lengths,
    deterministic,
    gamma,
    poisson,
    read_arrivals,
    read_lengths,
)

_REQUESTS = 300


class ScenarioWorkload(Strict):
    """What the cluster is asked to do."""

    decode_batch: int | None = Field(default=None, ge=1)
    """Tokens of a decode step over all ranks: one for each running request."""
    prefill_tokens: int | None = Field(default=None, ge=1)
    """Budget of prompt tokens of a prefill step over all ranks."""
    arrivals: str | None = None
    """Path of request arrivals: Azure, BurstGPT or own CSV, Mooncake or Qwen JSONL."""
    rate: float | None = Field(default=None, gt=0)
    """Requests per second: of drawn arrivals, or what a file's times are rescaled to."""
    cv: float | None = Field(default=None, ge=0)
    """Burstiness of arrivals drawn at ``rate``: standard deviation of the gaps over their mean,
    gamma distributed. 1, the default, is Poisson; more comes in bursts; 0 comes evenly."""
    concurrency: int | tuple[int, ...] | None = None
    """Users of a closed loop, each with one request at a time; in a plan of layouts, the batch
    sizes to compare."""
    input_tokens: int | None = Field(default=None, ge=1)
    """Tokens of every prompt."""
    output_tokens: int | None = Field(default=None, ge=1)
    """Tokens generated for every request."""
    lengths: str | None = None
    """Path of a file whose pairs of input and output tokens are drawn with replacement: one of
    arrivals, or custom JSONL of vLLM's bench with prompt_len and output_tokens."""
    requests: int | None = Field(default=None, ge=1)
    """Requests in all; default: a file's, or 300."""

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        shapes = [
            self.decode_batch is not None,
            self.prefill_tokens is not None,
            self.arrivals is not None,
            self._has_lengths,
        ]
        if sum(shapes) != 1:
            raise ValueError(
                "give exactly one of decode_batch, prefill_tokens, arrivals, or lengths or "
                "input_tokens with output_tokens"
            )
        if (self.input_tokens is None) != (self.output_tokens is None):
            raise ValueError("input_tokens and output_tokens belong together -- give both")
        if self.lengths is not None and self.input_tokens is not None:
            raise ValueError(
                "lengths and input_tokens -- lengths come from a file, or are the same for every "
                "request; leave one out"
            )
        self._refuse_strays()
        self._check_concurrency()
        return self

    def _check_concurrency(self) -> None:
        given = self.concurrency
        if given is None:
            return
        every = (given,) if isinstance(given, int) else given
        if not every:
            raise ValueError("concurrency [] -- give at least one, or leave it out")
        if min(every) < 1:
            raise ValueError(f"concurrency {min(every)} -- must be at least 1")

    def _refuse_strays(self) -> None:
        lengths = self._has_lengths
        allowed = {
            "concurrency": lengths,
            "rate": (lengths and self.concurrency is None) or self.arrivals is not None,
            "cv": lengths and self.rate is not None,
            "requests": lengths or self.arrivals is not None,
        }
        for name, fits in allowed.items():
            if getattr(self, name) is not None and not fits:
                raise ValueError(
                    f"{name} does not go with this workload -- concurrency or rate go with "
                    "input_tokens and output_tokens or with lengths, cv with rate and these, rate "
                    "and requests also with arrivals"
                )

    @property
    def _has_lengths(self) -> bool:
        named = (self.input_tokens, self.output_tokens, self.lengths)
        return any(value is not None for value in named)

    @property
    def step(self) -> Workload | None:
        """The tokens of a step, where that is the question."""
        if self.decode_batch is None and self.prefill_tokens is None:
            return None
        return Workload(decode_batch=self.decode_batch, prefill_tokens=self.prefill_tokens)

    @property
    def sweep(self) -> Sweep | None:
        """Request lengths and batch sizes for a plan of layouts."""
        if self.input_tokens is None or self.output_tokens is None:
            return None
        return Sweep(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            concurrency=self.concurrency,
        )

    def source(self, folder: Path, seed: int) -> Arrivals | ClosedLoop:
        """Return the requests; paths are relative to ``folder``.

        Raises
        ------
        InputError
            If the workload does not say when requests come, or the file is bad.
        """
        if self.arrivals is not None:
            return self._from_file(_file("arrivals", folder, self.arrivals))
        count = self.requests or _REQUESTS
        if self.rate is not None:
            return self._drawn(self.rate, count, self._lengths(folder), seed)
        if not isinstance(self.concurrency, int):
            raise InputError(
                f"workload: concurrency {self.concurrency} -- to simulate requests give one "
                "concurrency, or a rate; a list of them is for a plan of layouts"
            )
        return ClosedLoop(
            concurrency=self.concurrency, requests=count, lengths=self._lengths(folder)
        )

    def _drawn(self, rate: float, count: int, lengths: Lengths, seed: int) -> Arrivals:
        if self.cv is None or self.cv == 1:
            return poisson(rate, count, lengths, seed)
        if self.cv == 0:
            return deterministic(rate, count, lengths, seed)
        return gamma(rate, self.cv, count, lengths, seed)

    def _lengths(self, folder: Path) -> Lengths:
        if self.lengths is not None:
            return read_lengths(_file("lengths", folder, self.lengths))
        return Lengths.fixed(self.input_tokens or 1, self.output_tokens or 1)

    def _from_file(self, path: Path) -> Arrivals:
        arrivals = read_arrivals(path)
        if self.requests is not None:
            arrivals = arrivals.first(self.requests)
        return arrivals if self.rate is None else arrivals.scaled_to(self.rate)


def _file(key: str, folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise InputError(
            f"{key}: {path} does not exist -- give a path relative to the scenario's file"
        )
    return path
