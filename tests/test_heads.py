"""The published MTP families, each against a transcription of its own formula.

The transcriptions below read the published tensors under their published names and share nothing
with `mtp_ext.nn`: rotations are products of complex numbers, attention goes head by head, experts
token by token, all in f64. A family's spec must reproduce its transcription; the spec with any one
option swapped must not.
"""

import dataclasses
import math

import published_heads
import pytest
import torch
from published_heads import CONFIGS, LAYERS, H, V
from torch import Tensor

from mtp_ext.nn import MTPBlock, MTPHead, MTPSpec, load_checkpoint
from mtp_ext.nn.layers import DecoderLayer

S = 9  # rows with a state of the trunk
AT = f"model.layers.{LAYERS}"
Weights = dict[str, Tensor]


# ---- the pieces, transcribed ---------------------------------------------------------------------


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


def turn(x: Tensor, inverse: Tensor, neighbours: bool = False) -> Tensor:
    """Rotates x [S, 2 n] by position * inverse [n]: element i with i + n, or 2i with 2i + 1."""
    angle = torch.arange(len(x)).double()[:, None] * inverse
    z = torch.polar(torch.ones_like(angle), angle)
    if neighbours:
        return torch.view_as_real(torch.view_as_complex(x.reshape(len(x), -1, 2)) * z).flatten(1)
    n = x.shape[1] // 2
    z = torch.complex(x[:, :n], x[:, n:]) * z
    return torch.cat([z.real, z.imag], 1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    rows = [torch.softmax(k[: i + 1] @ q[i] * scale, 0) @ v[: i + 1] for i in range(len(q))]
    return torch.stack(rows)


def swiglu(w: Weights, at: str, x: Tensor) -> Tensor:
    gate = x @ w[f"{at}.gate_proj.weight"].T
    return (gate * gate.sigmoid() * (x @ w[f"{at}.up_proj.weight"].T)) @ w[
        f"{at}.down_proj.weight"
    ].T


def around(w: Weights, at: str, x: Tensor, eps: float, attention, mlp, gemma=0.0) -> Tensor:
    x = x + attention(norm(x, gemma + w[f"{at}.input_layernorm.weight"], eps))
    return x + mlp(norm(x, gemma + w[f"{at}.post_attention_layernorm.weight"], eps))


def sigmoid_experts(w: Weights, at: str, x: Tensor, groups: int, best: int) -> Tensor:
    """Eight experts, three per token, in groups of equal size; weights sum to 2.5."""
    out = []
    for row in x:
        score = (w[f"{at}.gate.weight"] @ row).sigmoid()
        biased = (score + w[f"{at}.gate.e_score_correction_bias"]).tolist()
        size = 8 // groups
        strength = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        open_groups = sorted(range(groups), key=strength.__getitem__)[-best:]
        allowed = [e for e in range(8) if e // size in open_groups]
        chosen = sorted(allowed, key=biased.__getitem__)[-3:]
        total = sum(score[e] for e in chosen)
        y = sum(score[e] / total * 2.5 * swiglu(w, f"{at}.experts.{e}", row) for e in chosen)
        out.append(y + swiglu(w, f"{at}.shared_experts", row))
    return torch.stack(out)


def inverse_frequencies(n: int, theta: float) -> Tensor:
    return torch.tensor([theta ** (-i / n) for i in range(n)], dtype=torch.float64)


# ---- the families: layer(x) -> y, and the wiring around it ---------------------------------------


def deepseek_layer(w: Weights, x: Tensor) -> Tensor:
    """Latent attention, rotated in neighbours at YaRN frequencies, and grouped experts."""
    factor, trained = 4, 16
    inverse = inverse_frequencies(4, 10000)
    for i in range(4):
        # Which element turns 32 times and which once within the trained length.
        low = max(0, math.floor(4 * math.log(trained / (32 * 2 * math.pi)) / math.log(10000)))
        high = min(7, math.ceil(4 * math.log(trained / (1 * 2 * math.pi)) / math.log(10000)))
        part = min(max((i - low) / (high - low), 0), 1)
        inverse[i] = inverse[i] / factor * part + inverse[i] * (1 - part)
    temperature = (0.1 * math.log(factor) + 1) ** 2

    def attention(x: Tensor) -> Tensor:
        at = f"{AT}.self_attn"
        q = norm(x @ w[f"{at}.q_a_proj.weight"].T, w[f"{at}.q_a_layernorm.weight"], 1e-6)
        q = q @ w[f"{at}.q_b_proj.weight"].T
        down = x @ w[f"{at}.kv_a_proj_with_mqa.weight"].T
        kv = norm(down[:, :20], w[f"{at}.kv_a_layernorm.weight"], 1e-6)
        kv = kv @ w[f"{at}.kv_b_proj.weight"].T
        shared_key = turn(down[:, 20:], inverse, neighbours=True)
        heads = []
        for n in range(4):
            query, key_value = q[:, 24 * n : 24 * n + 24], kv[:, 26 * n : 26 * n + 26]
            query = torch.cat([query[:, :16], turn(query[:, 16:], inverse, neighbours=True)], 1)
            key = torch.cat([key_value[:, :16], shared_key], 1)
            heads.append(attend(query, key, key_value[:, 16:], 24**-0.5 * temperature))
        return torch.cat(heads, 1) @ w[f"{at}.o_proj.weight"].T

    return around(w, AT, x, 1e-6, attention, lambda x: sigmoid_experts(w, f"{AT}.mlp", x, 4, 2))


def grouped_query(w: Weights, at: str, x: Tensor, d: int, prepare) -> Tensor:
    """Four query heads and two key heads of d elements; prepare(x, "q" or "k") norms and turns."""
    q, k, v = (x @ w[f"{at}.{p}_proj.weight"].T + w.get(f"{at}.{p}_proj.bias", 0) for p in "qkv")
    heads = []
    for n in range(4):
        m = n // 2
        query = prepare(q[:, d * n : d * n + d], "q")
        key = prepare(k[:, d * m : d * m + d], "k")
        heads.append(attend(query, key, v[:, d * m : d * m + d], d**-0.5))
    return torch.cat(heads, 1)


def glm_layer(w: Weights, x: Tensor) -> Tensor:
    """Half of a head of 16 turns; norms and biases on q and k."""
    at = f"{AT}.self_attn"

    def prepare(x: Tensor, which: str) -> Tensor:
        x = norm(x, w[f"{at}.{which}_norm.weight"], 1e-5)
        return torch.cat([turn(x[:, :8], inverse_frequencies(4, 1e6)), x[:, 8:]], 1)

    return around(
        w,
        AT,
        x,
        1e-5,
        lambda x: grouped_query(w, at, x, 16, prepare) @ w[f"{at}.o_proj.weight"].T,
        lambda x: sigmoid_experts(w, f"{AT}.mlp", x, 1, 1),
    )


def qwen_layer(w: Weights, x: Tensor) -> Tensor:
    """Norms of 1 + w, a quarter of a head turns, and every query head brings its output gate."""
    at, mlp = "mtp.layers.0.self_attn", "mtp.layers.0.mlp"
    both = w[f"{at}.q_proj.weight"]
    query = torch.cat([both[32 * n : 32 * n + 16] for n in range(4)])
    gate = torch.cat([both[32 * n + 16 : 32 * n + 32] for n in range(4)])
    split = {**w, f"{at}.q_proj.weight": query}

    def prepare(x: Tensor, which: str) -> Tensor:
        x = norm(x, 1 + w[f"{at}.{which}_norm.weight"], 1e-6)
        return torch.cat([turn(x[:, :4], inverse_frequencies(2, 1e7)), x[:, 4:]], 1)

    def attention(x: Tensor) -> Tensor:
        y = grouped_query(split, at, x, 16, prepare) * (x @ gate.T).sigmoid()
        return y @ w[f"{at}.o_proj.weight"].T

    def experts(x: Tensor) -> Tensor:
        out = []
        for row in x:
            p = torch.softmax(w[f"{mlp}.gate.weight"] @ row, 0)
            chosen = sorted(range(8), key=p.tolist().__getitem__)[-3:]
            total = sum(p[e] for e in chosen)
            y = sum(p[e] / total * swiglu(w, f"{mlp}.experts.{e}", row) for e in chosen)
            open_ = (w[f"{mlp}.shared_expert_gate.weight"] @ row).sigmoid()
            out.append(y + open_ * swiglu(w, f"{mlp}.shared_expert", row))
        return torch.stack(out)

    return around(w, "mtp.layers.0", x, 1e-6, attention, experts, gemma=1.0)


def plain_layer(w: Weights, at: str, x: Tensor, d: int, theta: float, neighbours: bool) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        inverse = inverse_frequencies(d // 2, theta)
        y = grouped_query(w, f"{at}.self_attn", x, d, lambda x, _: turn(x, inverse, neighbours))
        return y @ w[f"{at}.self_attn.o_proj.weight"].T

    return around(w, at, x, 1e-5, attention, lambda x: swiglu(w, f"{at}.mlp", x))


@dataclasses.dataclass
class Trunk:
    """What a head is given: states around the final norm, embedding, LM head, and tokens."""

    state: Tensor  # [S, H], before the final norm
    norm: Tensor  # the final norm's weight
    normed: Tensor
    embedding: Tensor
    lm_head: Tensor
    tokens: Tensor  # [S + 2]


def trunk(gemma: bool = False, eps: float = 1e-5) -> Trunk:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    state, weight = 3 * draw(S, H), 0.4 * draw(H) + (not gemma)
    normed = norm(state, gemma + weight, eps)
    tokens = torch.randint(V, (S + 2,), generator=generator)
    return Trunk(state, weight, normed, draw(V, H), draw(V, H), tokens)


def chain(t: Trunk, h: Tensor, project, layer, passed_on, logits) -> tuple[Tensor, Tensor]:
    """Logits of all rows at depth 1 [S, V], and of the draft behind the last one [V].

    Depth 1: row i takes E[t[i+1]] and h[i]. Depth 2 is one more row, which takes the next token
    and what the head passed on.
    """
    e = t.embedding[t.tokens[1 : S + 1]]
    x = project(e, h, torch.arange(S))
    y = layer(x)
    e = t.embedding[t.tokens[S + 1 :]]
    more = project(e, passed_on(y[-1:]), torch.tensor([S]))
    return logits(y), logits(layer(torch.cat([x, more]))[-1])


def deepseek(w: Weights, t: Trunk, layer=deepseek_layer, eps=1e-6) -> tuple[Tensor, Tensor]:
    def project(e: Tensor, h: Tensor, _: Tensor) -> Tensor:
        e, h = norm(e, w[f"{AT}.enorm.weight"], eps), norm(h, w[f"{AT}.hnorm.weight"], eps)
        return torch.cat([e, h], -1) @ w[f"{AT}.eh_proj.weight"].T

    def final(y: Tensor) -> Tensor:
        return norm(y, w[f"{AT}.shared_head.norm.weight"], eps)

    return chain(
        t, t.normed, project, lambda x: layer(w, x), final, lambda y: final(y) @ t.lm_head.T
    )


def glm(w: Weights, t: Trunk) -> tuple[Tensor, Tensor]:
    return deepseek(w, t, glm_layer, 1e-5)


def qwen(w: Weights, t: Trunk) -> tuple[Tensor, Tensor]:
    def project(e: Tensor, h: Tensor, _: Tensor) -> Tensor:
        e = norm(e, 1 + w["mtp.pre_fc_norm_embedding.weight"], 1e-6)
        h = norm(h, 1 + w["mtp.pre_fc_norm_hidden.weight"], 1e-6)
        return torch.cat([e, h], -1) @ w["mtp.fc.weight"].T

    def final(y: Tensor) -> Tensor:
        return norm(y, 1 + w["mtp.norm.weight"], 1e-6)

    return chain(
        t, t.normed, project, lambda x: qwen_layer(w, x), final, lambda y: final(y) @ t.lm_head.T
    )


def mimo(w: Weights, t: Trunk) -> tuple[Tensor, Tensor]:
    at = "model.mtp_layers.0"

    def project(e: Tensor, h: Tensor, _: Tensor) -> Tensor:
        e = norm(e, w[f"{at}.token_layernorm.weight"], 1e-5)
        h = norm(h, w[f"{at}.hidden_layernorm.weight"], 1e-5)
        return torch.cat([h, e], -1) @ w[f"{at}.input_proj.weight"].T

    return chain(
        t,
        t.state,
        project,
        lambda x: plain_layer(w, at, x, 24, 640000, neighbours=False),
        lambda y: y,
        lambda y: norm(y, w[f"{at}.final_layernorm.weight"], 1e-5) @ t.lm_head.T,
    )


def ernie_project(w: Weights, e: Tensor, h: Tensor) -> Tensor:
    e = norm(e, w["model.mtp_emb_norm.0.weight"], 1e-5)
    h = norm(h, w["model.mtp_hidden_norm.0.weight"], 1e-5)
    return torch.cat([e, h], -1) @ w["model.mtp_linear_proj.0.weight"].T


def ernie(w: Weights, t: Trunk) -> tuple[Tensor, Tensor]:
    return chain(
        t,
        t.state,
        lambda e, h, _: ernie_project(w, e, h),
        lambda x: plain_layer(w, "model.mtp_block.0", x, 16, 500000, neighbours=True),
        lambda y: y,
        lambda y: norm(y, t.norm, 1e-5) @ t.lm_head.T,
    )


def ernie_in_vllm(w: Weights, t: Trunk) -> tuple[Tensor, Tensor]:
    def project(e: Tensor, h: Tensor, positions: Tensor) -> Tensor:
        e = torch.stack([row * (position != 0) for row, position in zip(e, positions)])
        return ernie_project(w, e, h)

    return chain(
        t,
        t.state,
        project,
        lambda x: plain_layer(w, "model.mtp_block.0", x, 16, 500000, neighbours=True),
        lambda y: y,
        lambda y: y @ t.lm_head.T,
    )


# name: family, transcription, what the spec changes
CASES = {
    "deepseek_v3": ("deepseek_v3", deepseek, {}),
    "glm4_moe": ("glm4_moe", glm, {}),
    "qwen3_next": ("qwen3_next", qwen, {}),
    "mimo": ("mimo", mimo, {}),
    "ernie4_5_moe": ("ernie4_5_moe", ernie, {}),
    "ernie_in_vllm": (
        "ernie4_5_moe",
        ernie_in_vllm,
        {"final_norm": "none", "zero_position0": True},
    ),
}


# ---- the blocks against them ---------------------------------------------------------------------


def given(case: str, tmp_path) -> tuple[MTPBlock, Weights, Trunk]:
    """The block, loaded from a synthetic checkpoint, in f64, with its tables too."""
    family, _, changes = CASES[case]
    weights = published_heads.tensors(family)
    published_heads.write(tmp_path, CONFIGS[family], weights)
    block = load_checkpoint(tmp_path, dtype=torch.float64, **changes)
    return (
        block,
        {name: w.double() for name, w in weights.items()},
        trunk(block.spec.gemma_norm, block.spec.eps),
    )


@torch.no_grad()
def run(block: MTPBlock, t: Trunk) -> tuple[Tensor, Tensor]:
    """What `chain` returns, by the block."""
    e = t.embedding[t.tokens][None]
    h = t.normed if block.spec.h_source == "post_norm" else t.state
    y, trunk_kv = block.depth1(e[:, 1 : S + 1], h[None], torch.arange(S)[None])
    more, _ = block.deeper(
        e[:, S + 1 :], block.recur(y[:, -1:], t.norm), torch.tensor([S - 1]), trunk_kv, []
    )
    return (
        block.normed(y[0], t.norm) @ t.lm_head.T,
        block.normed(more[0, 0], t.norm) @ t.lm_head.T,
    )


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("case", CASES)
def test_a_family_is_its_formula(case: str, tmp_path) -> None:
    block, weights, t = given(case, tmp_path)
    for ours, theirs in zip(run(block, t), CASES[case][1](weights, t)):
        assert distance(ours, theirs) < 1e-5  # rotation tables are f32


@pytest.mark.parametrize("case", CASES)
def test_a_family_decodes_to_its_formula(case: str, tmp_path) -> None:
    """The loaded head over the operators, with a paged cache: rows in two steps, then a draft.

    None of it has a gradient, though the caller's tensors and the block's weights want one.
    """
    block, weights, t = given(case, tmp_path)
    assert all(p.requires_grad for p in block.parameters())
    shared = [p.float().requires_grad_() for p in (t.embedding, t.lm_head)]
    head = MTPHead(block, *shared, trunk_norm=t.norm.float())
    caches, table = head.new_cache(3, 4), torch.tensor([[2, 0, 1]], dtype=torch.int32)
    h = (t.normed if block.spec.h_source == "post_norm" else t.state).float().requires_grad_()

    def extend(ids: Tensor, hidden: Tensor, begin: int) -> Tensor:
        end = begin + len(ids)
        lens = torch.tensor([begin], dtype=torch.int32)
        cu = torch.tensor([0, len(ids)], dtype=torch.int32)
        positions = torch.arange(begin, end)
        return head.extend(ids, hidden, positions, *caches, table, lens, cu, len(ids))

    first = extend(t.tokens[1:4], h[:3], 0)
    y = torch.cat([first, extend(t.tokens[4 : S + 1], h[3:], 3)])
    draft = extend(t.tokens[S + 1 :], head.recur(y[-1:]), S)
    assert not any(x.requires_grad for x in (y, draft, *caches))
    for state, expected in zip((y, draft), CASES[case][1](weights, t)):
        logits, ids, lse = head.propose(state, 5)
        assert not logits.requires_grad and not lse.requires_grad
        expected = expected.view(len(state), V)
        top = expected.topk(5, -1)
        torch.testing.assert_close(logits.double(), top.values, rtol=1e-3, atol=1e-3)
        assert torch.equal(ids, top.indices)
        torch.testing.assert_close(lse.double(), expected.logsumexp(-1), rtol=1e-4, atol=1e-4)


# option: its other values; what a family's own value is depends on the family
SWAPS = {
    "concat": ("eh", "he"),
    "gemma_norm": (False, True),
    "h_source": ("pre_norm", "post_norm"),
    "recur_source": ("pre_norm", "post_norm"),
    "final_norm": ("own", "trunk", "none"),
    "zero_position0": (False, True),
    "rope_interleaved": (False, True),
    "rope_theta": (100.0,),
    "rope_scaling": (None,),
    "rotary_dim": (None, 8),
    "embed_norm": (False,),
    "hidden_norm": (False,),
}


def swapped(spec: MTPSpec) -> list[tuple[str, object]]:
    """Every other value of every option that the family's weights allow."""
    latent = ("rotary_dim",) if spec.latent else ()
    return [
        (name, value)
        for name, values in SWAPS.items()
        for value in values
        if value != getattr(spec, name)
        and name not in latent
        and not (name == "final_norm" and value == "own")  # a weight that is not there
        and not (name == "rotary_dim" and value is None and spec.rotary_dim == spec.head_dim)
        # Nothing follows the final norm but the LM head and what recurs.
        and not (name == "recur_source" and spec.final_norm == "none")
    ]


@pytest.mark.parametrize("case", CASES)
def test_every_swapped_option_is_noticed(case: str, tmp_path) -> None:
    block, weights, t = given(case, tmp_path)
    theirs = CASES[case][1](weights, t)
    names = set()
    for name, value in swapped(block.spec):
        other = MTPBlock(dataclasses.replace(block.spec, **{name: value})).double()
        other.load_state_dict(block.state_dict(), strict=False)
        ours = run(other, t)
        # At the second depth only what recurs is different; that option acts nowhere else.
        depths = (1,) if name == "recur_source" else (0, 1)
        for depth in depths:
            assert distance(ours[depth], theirs[depth]) > 1e-2, f"{name} = {value}, {depth}"
        if name == "recur_source":
            assert distance(ours[0], theirs[0]) < 1e-5
        names.add(name)
    assert {"concat", "gemma_norm", "h_source", "zero_position0"} <= names


# ---- the layers against transformers -------------------------------------------------------------


def transformers_layer(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A decoder layer of the library's own, and its rotary embedding."""
    transformers = pytest.importorskip("transformers")
    config = dict(CONFIGS[family])
    kind = config.pop("model_type")
    if kind == "deepseek_v3":
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

        c = transformers.DeepseekV3Config(**config)
        return m.DeepseekV3DecoderLayer(c, LAYERS), m.DeepseekV3RotaryEmbedding(c)
    if kind == "glm4_moe":
        from transformers.models.glm4_moe import modeling_glm4_moe as m

        c = transformers.Glm4MoeConfig(**config)
        return m.Glm4MoeDecoderLayer(c, LAYERS), m.Glm4MoeRotaryEmbedding(c)
    if kind == "qwen3_next":
        from transformers.models.qwen3_next import modeling_qwen3_next as m

        c = transformers.Qwen3NextConfig(**config, layer_types=["full_attention"] * LAYERS)
        return m.Qwen3NextDecoderLayer(c, 0), m.Qwen3NextRotaryEmbedding(c)
    if kind == "mimo":
        from transformers.models.qwen2 import modeling_qwen2 as m

        c = transformers.Qwen2Config(**config)
        return m.Qwen2DecoderLayer(c, 0), m.Qwen2RotaryEmbedding(c)
    from transformers.models.ernie4_5 import modeling_ernie4_5 as m

    c = transformers.Ernie4_5Config(**config)
    return m.Ernie4_5DecoderLayer(c, 0), m.Ernie4_5RotaryEmbedding(c)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_layer_is_that_of_transformers(family: str, tmp_path) -> None:
    layer, rotary = transformers_layer(family)
    published_heads.write(tmp_path, CONFIGS[family], published_heads.tensors(family))
    block = load_checkpoint(tmp_path)
    state = dict(DecoderLayer.state_dict(block))
    if block.spec.moe is not None:  # the library packs the experts
        pack = [
            [state.pop(f"mlp.experts.{e}.{p}_proj.weight") for e in range(8)]
            for p in ("gate", "up", "down")
        ]
        gate, up, down = map(torch.stack, pack)
        state["mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        state["mlp.experts.down_proj"] = down
    state = {
        name.replace("shared_experts", "shared_expert") if family == "qwen3_next" else name: t
        for name, t in state.items()
        if not name.startswith(("enorm", "hnorm", "eh_proj", "shared_head"))
    }
    layer.load_state_dict(state)
    layer.eval()
    x = torch.randn(2, S, H, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(S).expand(2, S)
    mask = torch.full((S, S), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        theirs = layer(
            x,
            position_embeddings=rotary(x, positions),
            attention_mask=mask,
            position_ids=positions,
        )
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        ours, _ = block.layer(x, positions)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
