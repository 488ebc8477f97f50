"""Random models small enough for exact enumeration and fast tests."""

import itertools

import torch

from mtp_ext.models.llama import Llama, LlamaConfig
from mtp_ext.nn import MTPBlock, MTPHead, MTPSpec


def tiny_config(vocab_size: int = 61, **changes) -> LlamaConfig:
    values = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": vocab_size,
        "max_positions": 512,
        **changes,
    }
    return LlamaConfig(**values)


def tiny_llama(
    dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = False, **changes
) -> Llama:
    """Weights large enough that the next token depends strongly on the context."""
    config = tiny_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    h, f = config.hidden_size, config.intermediate_size
    shapes = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    shapes |= {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}

    def tensor(name: str) -> torch.Tensor | None:
        if name == "lm_head.weight" and tied:
            return None
        if "norm" in name:
            return 1 + 0.1 * torch.randn(h, generator=generator)
        if "embed" in name or "lm_head" in name:
            return torch.randn(config.vocab_size, h, generator=generator) * 0.4
        shape = shapes[name.split(".")[-2]]
        return torch.randn(shape, generator=generator) * 1.5 * shape[1] ** -0.5

    return Llama.from_tensors(config, tensor, dtype)


def tiny_head(trunk: Llama, seed: int = 1, **spec) -> MTPHead:
    """An untrained head: its drafts are sometimes right by chance, and always well defined."""
    c = trunk.config
    torch.manual_seed(seed)
    block = MTPBlock(
        MTPSpec(
            hidden_size=c.hidden_size,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            intermediate_size=64,
            **spec,
        )
    )
    return MTPHead(block, trunk.embedding, trunk.lm_head, trunk_norm=trunk.norm)


class OracleHead:
    """Stands in for an `MTPHead`: proposes the true continuation, wrong where `wrong` says so.

    It looks up what follows a token at a position in the texts it is given, which must not
    contradict each other. It checks on the way that it is fed every position once, in order.
    """

    def __init__(self, trunk: Llama, texts: list[list[int]], wrong=lambda position: False):
        self.spec = MTPSpec(1, 1, 1, 8, 1)
        self.lm_head = trunk.lm_head
        self.wrong = wrong
        self.next_token: dict[tuple[int, int], int] = {}
        for text in texts:
            for position, pair in enumerate(itertools.pairwise(text)):
                self.next_token[position, pair[0]] = pair[1]

    def new_cache(self, num_pages: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(num_pages, page_size), torch.zeros(num_pages, page_size)

    def extend(
        self,
        token_ids,
        hidden,
        positions,
        k_cache,
        v_cache,
        table,
        cache_lens,
        cu_q_lens,
        max_q_len,
    ) -> torch.Tensor:
        lens, cu = cache_lens.tolist(), cu_q_lens.tolist()
        expected = [n + i for n, a, b in zip(lens, cu, cu[1:]) for i in range(b - a)]
        assert positions.tolist() == expected and len(hidden) == len(expected)
        assert max_q_len == max(b - a for a, b in itertools.pairwise(cu))
        page_size = k_cache.shape[1]
        assert table.shape[1] * page_size >= max(lens)
        answers = []
        for token, position in zip(token_ids.tolist(), positions.tolist()):
            answer = self.next_token.get((position + 1, token), 0)
            answers.append((answer + self.wrong(position + 2)) % len(self.lm_head))
        return torch.tensor(answers)[:, None].float()

    def propose(self, y: torch.Tensor, k: int):
        first = y[:, :1].long()
        ids = (first + torch.arange(k)) % len(self.lm_head)
        logits = -torch.arange(k).float().expand(len(y), k)
        return logits.contiguous(), ids, torch.logsumexp(logits, -1)

    def recur(self, y: torch.Tensor) -> torch.Tensor:
        return y
