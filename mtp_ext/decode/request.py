"""What is asked for, and how far it has come."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # the text depends on it, never on the other requests
    stop_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence ids
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        for name, bits in (("top_k", 32), ("seed", 64)):
            value, end = getattr(self, name), 2 ** (bits - 1)
            if not -end <= value < end:
                raise ValueError(f"{name} must fit int{bits}, got {value}")


@dataclass(eq=False)
class Request:
    """tokens[:cache_len] are in the trunk's cache, tokens[1:head_len + 1] in the head's."""

    prompt_len: int
    tokens: list[int]
    params: SamplingParams
    max_len: int  # of prompt and output together
    stop_ids: frozenset[int]
    # Of each new token: the depth of the accepted draft it was, 0 if the trunk sampled it.
    depths: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "cancelled"
    status: int = 0  # all status bits that rejection_sample reported

    pages: list[int] = field(default_factory=list)
    cache_len: int = 0
    head_len: int = 0
    # The trunk's hidden states at positions head_len..cache_len-1, which the head has yet to see.
    pending_hidden: list[Tensor] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token: int, depth: int) -> bool:
        """Adds a new token; False once the request is finished by it."""
        self.tokens.append(token)
        self.depths.append(depth)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_len:
            self.finish_reason = "length"
        return not self.finished
