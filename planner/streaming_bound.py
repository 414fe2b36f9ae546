"""How many tokens per second a machine can serve that streams its weights in every pass.

The weights lie in the host's memory and come over one link, layer by layer, once per pass over
the model; each pass serves every running sequence, as many as the KV cache holds. The bound of
MoE-Lens (Yuan et al. 2025, section 5.2). Tokens, bytes and seconds.
"""

from dataclasses import dataclass

from basis.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StreamingBound:
    """Requests of equal length, evenly staggered, with prompts mixed into the decode passes.

    Raises
    ------
    InputError
        If a count, a size or a rate is not positive.
    """

    prompt: float
    """p: tokens of a prompt, 0 or more."""
    output: float
    """g: tokens generated per request; a pass generates one."""
    cached_tokens: float
    """M: tokens that the KV cache holds."""
    streamed_bytes: float
    """Weights that cross the link in a pass."""
    bandwidth: float
    """Of the link, bytes per second."""
    processor_tokens_per_second: float = float("inf")
    """T_GPU: prompt and output tokens that the processor could pass without waiting."""

    def __post_init__(self) -> None:
        names = ("output", "cached_tokens", "streamed_bytes", "bandwidth")
        for name in (*names, "processor_tokens_per_second"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} {getattr(self, name)} -- must be positive")
        if self.prompt < 0:
            raise InputError(f"prompt {self.prompt} -- tokens of a prompt, from 0")

    @property
    def pass_seconds(self) -> float:
        """Delta: no pass is shorter than the weights' way over the link."""
        return self.streamed_bytes / self.bandwidth

    @property
    def sequences(self) -> float:
        """Sequences that run at a time: each holds ``p + g / 2`` tokens on average."""
        return self.cached_tokens / (self.prompt + self.output / 2)

    @property
    def per_cached_token(self) -> float:
        """PME: tokens processed per pass and token of cache, ``2 (p + g) / ((2 p + g) g)``."""
        p, g = self.prompt, self.output
        return 2 * (p + g) / ((2 * p + g) * g)

    @property
    def tokens_per_second(self) -> float:
        """T_max, prompt and output tokens: ``min(PME M / delta, T_GPU)``."""
        linked = self.per_cached_token * self.cached_tokens / self.pass_seconds
        return min(linked, self.processor_tokens_per_second)

    @property
    def generated_per_second(self) -> float:
        """Output tokens only: ``g / (p + g)`` of them."""
        return self.tokens_per_second * self.output / (self.prompt + self.output)
