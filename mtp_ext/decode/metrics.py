"""What a decoding run counted and where its time went."""

from dataclasses import dataclass, field


@dataclass
class Metrics:
    """A step counts once for every request that was past its prompt in it."""

    steps: int = 0
    tokens: int = 0  # that came out of those steps
    # Per depth: drafts that were judged because those before them had been accepted, and how many
    # of these were accepted.
    judged: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    # "draft", "verify" (trunk and logits), "sample" (with the host's wait), "schedule".
    seconds: dict[str, float] = field(default_factory=dict)

    def add_time(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def add_step(self, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        self.steps += 1
        self.tokens += num_tokens
        for depth in range(min(num_drafts, num_accepted + 1)):
            if depth == len(self.judged):
                self.judged.append(0)
                self.accepted.append(0)
            self.judged[depth] += 1
            self.accepted[depth] += depth < num_accepted

    def add(self, other: "Metrics") -> None:
        self.steps += other.steps
        self.tokens += other.tokens
        for mine, theirs in ((self.judged, other.judged), (self.accepted, other.accepted)):
            mine.extend([0] * (len(theirs) - len(mine)))
            for depth, count in enumerate(theirs):
                mine[depth] += count
        for phase, seconds in other.seconds.items():
            self.add_time(phase, seconds)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Per depth, given that the drafts before were accepted."""
        return [a / j for a, j in zip(self.accepted, self.judged)]
