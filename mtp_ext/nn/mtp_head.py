"""An MTP head for decoding, built on `mtp_ext.ops` with a paged KV cache of its own.

    head = load_head(trunk=trunk)                      # shipped weights; or load_head(path, ...)
    k_cache, v_cache = head.new_cache(num_pages, page_size)
    y = head.extend(token_ids, hidden, positions, k_cache, v_cache, block_table, cache_lens,
                    cu_q_lens, max_q_len)              # [T, H]
    logits, ids, lse = head.propose(y[last_rows], k)   # [M, k], ids of the trunk's vocabulary
    hidden = head.recur(y)                             # what the next depth's `extend` takes

Row i sits at position i of the head's cache, so the head's cache length equals the trunk's: after
the trunk has processed n tokens and one more is known, rows 0..n-1 of the head are computable. A
verification step rolls both caches back by length; the rows that drafting wrote are then extended
again with the trunk's hidden states of the accepted tokens.
"""

from torch import Tensor

from mtp_ext.nn.decoding_layer import DecodingLayer, Matrix, add_rms_norm, vector
from mtp_ext.nn.mtp_block import MTPBlock
from mtp_ext.ops import direct

eh_proj, head_topk = direct("eh_proj"), direct("head_topk")


class MTPHead:
    """An `MTPBlock` for decoding, over the custom operators.

    embedding [V, H] and lm_head [V, H] are the trunk's. With a token_map [Vd] of distinct ids only
    those rows of the LM head are drafted from. Weights and the projections' inputs have
    embedding's dtype; the residual stream is f32. With `int8` the LM head and the decoder layer's
    projections are kept in int8 with a scale per row: a draft need not be exact, and reading
    weights is what it costs. A row's result does not depend on the other rows of the call. Weights
    and inputs are detached: nothing here has a gradient. Experts synchronise with the host; latent
    attention is cached as one key and value per query head.

    Raises ValueError for a block that borrows the trunk's final norm where trunk_norm [H] is not
    given.
    """

    def __init__(
        self,
        block: MTPBlock,
        embedding: Tensor,
        lm_head: Tensor,
        *,
        trunk_norm: Tensor | None = None,
        token_map: Tensor | None = None,
        metadata: dict[str, str] | None = None,
        int8: bool = False,
    ):
        self.spec = spec = block.spec
        if spec.final_norm == "trunk" and trunk_norm is None:
            raise ValueError("a head without its own final norm needs trunk_norm")
        self.dtype, self.device = embedding.dtype, embedding.device
        self.embedding = embedding.detach()
        self.token_map = None if token_map is None else token_map.to(self.device)
        self.metadata = dict(metadata or {})

        drafted = lm_head if token_map is None else lm_head[self.token_map.long()]
        head = Matrix(drafted, embedding, int8)
        self.lm_head, self.lm_head_scale = head.weight, head.scale
        self.enorm = vector(block.enorm.weight, embedding) if block.enorm else None
        self.hnorm = vector(block.hnorm.weight, embedding) if block.hnorm else None
        self.eh_proj = vector(block.eh_proj.weight, embedding)
        self.layer = DecodingLayer(block, embedding, int8)
        self.norm = None
        if spec.final_norm != "none":
            own = spec.final_norm == "own"
            self.norm = vector(block.shared_head.norm.weight if own else trunk_norm, embedding)

    def new_cache(self, num_pages: int, page_size: int) -> tuple[Tensor, Tensor]:
        """Zeroed k_cache and v_cache, [pages, page_size, Hkv, D] each."""
        return self.layer.new_cache(num_pages, page_size)

    def extend(
        self,
        token_ids: Tensor,
        hidden: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cache_lens: Tensor,
        cu_q_lens: Tensor,
        max_q_len: int,
    ) -> Tensor:
        """Computes rows of the head and appends their keys and values to its cache.

        Args:
            token_ids: [T], int32 or int64: the token *after* each row's position.
            hidden: [T, H]: the trunk's hidden state at each row's position (`spec.h_source`), or
                `recur` of the previous depth.
            positions: int64 [T], cache_lens[b] + offset for row `offset` of request b.
            k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len: as in
                `ops.verify_attention`.

        Returns:
            y f32 [T, H], for `propose` and `recur`.
        """
        spec = self.spec
        projected = eh_proj(
            token_ids,
            hidden.detach().to(self.dtype),
            self.embedding,
            self.eh_proj,
            enorm_weight=self.enorm,
            hnorm_weight=self.hnorm,
            positions=positions if spec.zero_position0 else None,
            eps=spec.eps,
            gemma_norm=spec.gemma_norm,
            hidden_first=spec.concat == "he",
        )
        return self.layer(
            projected.float(),
            positions,
            k_cache,
            v_cache,
            block_table,
            cache_lens,
            cu_q_lens,
            max_q_len,
        )

    def propose(self, y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest next tokens of each row of y [M, H]: `ops.head_topk`'s results."""
        return head_topk(
            y.detach().to(self.dtype),
            self.lm_head,
            k,
            norm_weight=self.norm,
            weight_scale=self.lm_head_scale,
            token_map=self.token_map,
            eps=self.spec.eps,
            gemma_norm=self.spec.gemma_norm,
        )

    def recur(self, y: Tensor) -> Tensor:
        """What the next depth's `extend` takes as hidden."""
        y = y.detach()
        if self.spec.recur_source == "pre_norm" or self.norm is None:
            return y
        return add_rms_norm(y, self.norm, eps=self.spec.eps, gemma_norm=self.spec.gemma_norm)
