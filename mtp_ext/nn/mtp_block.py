"""A multi-token-prediction head for training: one decoder layer that drafts for a trunk.

DeepSeek-AI 2024, "DeepSeek-V3 technical report", section 2.2. At depth 1, row i takes the token
t[i+1] and the trunk's hidden state h[i] and predicts t[i+2]:

    x = eh_proj(concat(enorm(E[t[i+1]]), hnorm(h[i])))     E and the LM head are the trunk's
    y = decoder_layer(x)                                   attends to rows 0..i of this head
    logits = lm_head(norm(y))

Deeper drafts recur: row i+1 takes the drafted t[i+2] and, in place of h[i+1], the head's own y.
Families differ in concatenation order, norms, the decoder layer and in which hidden states they
pass on; `MTPSpec` says all of it explicitly, `mtp_ext.nn.specs` has the published families.

`MTPBlock` is the trainable module, in plain PyTorch over [batch, sequence]; `MTPHead` is the same
function for decoding.
"""

import torch
from torch import Tensor, nn

from mtp_ext.nn.layers import DecoderLayer, RMSNorm, rms_norm
from mtp_ext.nn.specs import MTPSpec


class SharedHead(nn.Module):
    def __init__(self, spec: MTPSpec):
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, spec.eps, spec.gemma_norm)


class MTPBlock(DecoderLayer):
    """The head's own parameters, under DeepSeek's names, and its forward for training.

    The embedding and the LM head are the trunk's and are passed in or applied outside. Call
    `depth1` for the rows that read the trunk, then `deeper` once per further depth. Any float
    dtype; gradients flow to everything that is passed in.
    """

    def __init__(self, spec: MTPSpec):
        h = spec.hidden_size
        eh_proj = nn.Linear(2 * h, h, bias=False)  # drawn first: a seed's head stays what it was
        super().__init__(spec)

        def norm() -> RMSNorm:
            return RMSNorm(h, spec.eps, spec.gemma_norm)

        self.enorm = norm() if spec.embed_norm else None
        self.hnorm = norm() if spec.hidden_norm else None
        self.eh_proj = eh_proj
        self.shared_head = SharedHead(spec) if spec.final_norm == "own" else None

    def project(self, embedded: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """The head's prologue in autograd, as `ops.eh_proj` computes it."""
        if self.spec.zero_position0:
            embedded = embedded.masked_fill((positions == 0)[..., None], 0)
        e = self.enorm(embedded) if self.enorm else embedded
        h = self.hnorm(hidden) if self.hnorm else hidden
        return self.eh_proj(torch.cat([h, e] if self.spec.concat == "he" else [e, h], -1))

    def depth1(
        self,
        embedded: Tensor,
        hidden: Tensor,
        positions: Tensor,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Rows [B, S] with the trunk's hidden states, causal: returns y [B, S, H] and their (k, v).

        embedded: E[t[i+1]], [B, S, H]; hidden: h[i], [B, S, H]; positions int64 [B, S]. Padding
        goes to the end of a sequence, where causality keeps it from the rest. documents int
        [B, S]: a row attends only to rows of its own document.
        """
        return self.layer(self.project(embedded, hidden, positions), positions, documents)

    def deeper(
        self,
        embedded: Tensor,
        hidden: Tensor,
        rows: Tensor,
        trunk_kv: tuple[Tensor, Tensor],
        drafted_kv: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One recurrent depth for the drafts that start at `rows` [R], the same of each sequence.

        hidden [B, R, H] is the previous depth's `recur`, embedded [B, R, H] the next token after
        it. A draft that starts at row i sees the trunk-fed rows 0..i, what it wrote at its
        earlier depths (`drafted_kv`, one pair each) and itself, exactly as in decoding.
        """
        positions = (rows + len(drafted_kv) + 1).expand(embedded.shape[:2])
        x = self.project(embedded, hidden, positions)
        q, k, v, gate = self.heads(x, positions)
        group = q.shape[2] // k.shape[2]
        q = q.unflatten(2, (-1, group)).transpose(1, 2)  # [B, Hkv, R, G, D]
        q = q * self.self_attn.scale
        keys, values = (t.transpose(1, 2) for t in trunk_kv)  # [B, Hkv, S, D]
        scores = q.flatten(2, 3) @ keys.transpose(-1, -2)  # [B, Hkv, R G, S]
        hidden_keys = torch.arange(keys.shape[2], device=q.device) > rows[:, None]
        scores = scores.unflatten(2, (-1, group)).masked_fill(hidden_keys[:, None], float("-inf"))
        drafted = [(k, v), *drafted_kv]
        own = [(q * key.transpose(1, 2)[:, :, :, None]).sum(-1, keepdim=True) for key, _ in drafted]
        weights = torch.softmax(torch.cat([scores, *own], -1), -1)
        trunk_weights, own_weights = weights.split([keys.shape[2], len(own)], -1)
        out = (trunk_weights.flatten(2, 3) @ values).unflatten(2, (-1, group))
        for n, (_, value) in enumerate(drafted):
            out = out + own_weights[..., n, None] * value.transpose(1, 2)[:, :, :, None]
        return self.finish(x, out.transpose(1, 2).flatten(2, 3), gate), (k, v)

    def normed(self, y: Tensor, trunk_norm: Tensor | None = None) -> Tensor:
        """What the LM head multiplies; trunk_norm [H] is needed with `final_norm` "trunk"."""
        spec = self.spec
        if spec.final_norm == "none":
            return y
        if self.shared_head is not None:
            return self.shared_head.norm(y)
        if trunk_norm is None:
            raise ValueError("a head without its own final norm needs trunk_norm")
        return rms_norm(y, trunk_norm, spec.eps, spec.gemma_norm)

    def recur(self, y: Tensor, trunk_norm: Tensor | None = None) -> Tensor:
        """What the next depth takes in place of the trunk's hidden state."""
        return self.normed(y, trunk_norm) if self.spec.recur_source == "post_norm" else y
