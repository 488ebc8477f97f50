"""MTP heads: the form for decoding against the trainable one, every switch of the spec, files."""

import dataclasses

import pytest
import torch
from torch import Tensor

from mtp_ext.nn import (
    LatentSpec,
    MoESpec,
    MTPBlock,
    MTPHead,
    MTPSpec,
    default_head_path,
    load_head,
    read_head,
    save_head,
)

VOCAB = 61
SPEC = MTPSpec(
    hidden_size=64,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=80,
    max_positions=64,
)
SWITCHES = {
    "default": {},
    "concat": {"concat": "he"},
    "embed_norm": {"embed_norm": False},
    "hidden_norm": {"hidden_norm": False},
    "gemma_norm": {"gemma_norm": True},
    "recur_source": {"recur_source": "post_norm"},
    "trunk_norm": {"final_norm": "trunk"},
    "no_norm": {"final_norm": "none"},
    "zero_position0": {"zero_position0": True},
    "qk_norm": {"qk_norm": True},
    "qkv_bias": {"qkv_bias": True},
    "output_gate": {"output_gate": True},
    "rotary_dim": {"rotary_dim": 4},
    "rope_interleaved": {"rope_interleaved": True},
    "all_of_a_layer": {
        "qk_norm": True,
        "gemma_norm": True,
        "qkv_bias": True,
        "output_gate": True,
        "rotary_dim": 12,
        "rope_interleaved": True,
    },
    "yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    },
    "moe": {"moe": MoESpec(num_experts=4, top_k=2, intermediate_size=24, shared_size=16)},
    "latent": {
        "latent": LatentSpec(q_lora_rank=20, kv_lora_rank=24, nope_dim=16, rope_dim=8, v_dim=12),
        "rope_interleaved": True,
    },
    "latent_without_q_lora": {
        "latent": LatentSpec(q_lora_rank=None, kv_lora_rank=24, nope_dim=8, rope_dim=8, v_dim=16),
    },
}
LENGTHS = [7, 1, 12]  # rows with the trunk's hidden states, per request
DEPTHS = 3


class Trunk:
    """The part of a trunk that a head shares."""

    def __init__(self, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(dtype)

        self.embedding = draw(VOCAB, SPEC.hidden_size)
        self.lm_head = draw(VOCAB, SPEC.hidden_size)
        self.norm = 1 + 0.3 * draw(SPEC.hidden_size)


def make_block(**switches) -> MTPBlock:
    """Random weights, norms included, that bf16 holds exactly; the same whatever the switches."""
    block = MTPBlock(dataclasses.replace(SPEC, **switches))
    for name, p in block.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise / p.shape[1] ** 0.5 if p.ndim == 2 else 1 + 0.3 * noise
        p.data = p.data.to(torch.bfloat16).float()
    return block


def inputs() -> list[tuple[Tensor, Tensor]]:
    """Per request: tokens [n + DEPTHS] and the trunk's hidden states [n, H]."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randint(VOCAB, (n + DEPTHS,), generator=generator),
            3 * torch.randn(n, SPEC.hidden_size, generator=generator).to(torch.bfloat16).float(),
        )
        for n in LENGTHS
    ]


def run_block(block: MTPBlock, dtype: torch.dtype) -> list[list[Tensor]]:
    """y of every request and depth: of all rows at depth 1, of the last draft behind it."""
    block, trunk = block.to(dtype), Trunk(dtype)
    results = []
    for tokens, hidden in inputs():
        n = len(hidden)
        e = trunk.embedding[tokens][None]
        y, trunk_kv = block.depth1(e[:, 1 : n + 1], hidden[None].to(dtype), torch.arange(n)[None])
        outputs, drafted, rows = [y[0]], [], torch.tensor([n - 1])
        y = y[:, -1:]
        for depth in range(2, DEPTHS + 1):
            recurring = block.recur(y, trunk.norm)
            y, kv = block.deeper(e[:, rows + depth], recurring, rows, trunk_kv, drafted)
            drafted.append(kv)
            outputs.append(y[0])
        results.append([out.detach() for out in outputs])
    return results


def make_head(block: MTPBlock, dtype: torch.dtype, **options) -> MTPHead:
    trunk = Trunk(dtype)
    norm = trunk.norm if block.spec.final_norm == "trunk" else None
    return MTPHead(block, trunk.embedding, trunk.lm_head, trunk_norm=norm, **options)


def run_head(head: MTPHead, page: int = 4) -> list[list[Tensor]]:
    """The same as run_block, for the whole batch at once over a paged cache."""
    requests = inputs()
    pages_each = -(-(max(LENGTHS) + DEPTHS) // page)
    k_cache, v_cache = head.new_cache(len(requests) * pages_each, page)
    order = torch.arange(len(requests) * pages_each, dtype=torch.int32).flip(0)
    table = order.view(len(requests), pages_each)
    ends = torch.tensor(LENGTHS).cumsum(0)
    starts = torch.tensor([0, *ends[:-1].tolist()])

    y = head.extend(
        torch.cat([tokens[1 : n + 1] for (tokens, _), n in zip(requests, LENGTHS)]),
        torch.cat([hidden for _, hidden in requests]),
        torch.cat([torch.arange(n) for n in LENGTHS]),
        k_cache,
        v_cache,
        table,
        torch.zeros(len(requests), dtype=torch.int32),
        torch.tensor([0, *ends.tolist()], dtype=torch.int32),
        max(LENGTHS),
    )
    results = [[y[a:b].clone()] for a, b in zip(starts, ends)]
    y = y[ends - 1]
    for depth in range(2, DEPTHS + 1):
        lens = torch.tensor(LENGTHS) + depth - 2
        y = head.extend(
            torch.stack([tokens[n - 1 + depth] for (tokens, _), n in zip(requests, LENGTHS)]),
            head.recur(y),
            lens,
            k_cache,
            v_cache,
            table,
            lens.to(torch.int32),
            torch.arange(len(requests) + 1, dtype=torch.int32),
            1,
        )
        for result, row in zip(results, y):
            result.append(row[None].clone())
    return results


def errors(actual: list[list[Tensor]], exact: list[list[Tensor]]) -> Tensor:
    """Largest error relative to the rows' scale, per depth."""
    per_depth = [
        [((a.double() - e).abs().max() / e.abs().mean()) for a, e in zip(*pair)]
        for pair in zip(actual, exact)
    ]
    return torch.tensor(per_depth).amax(0)


# Rounding to bf16 changes which experts are chosen.
F32_ONLY = ("moe",)


@pytest.mark.parametrize(
    "switch, dtype",
    [(s, torch.float32) for s in SWITCHES]
    + [(s, torch.bfloat16) for s in SWITCHES if s not in F32_ONLY],
)
def test_decoding_equals_training(switch: str, dtype: torch.dtype) -> None:
    exact = run_block(make_block(**SWITCHES[switch]), torch.float64)
    eager = errors(run_block(make_block(**SWITCHES[switch]), dtype), exact)
    ours = errors(run_head(make_head(make_block(**SWITCHES[switch]), dtype)), exact)
    assert (ours <= 2 * eager + 1e-6).all(), f"{ours} against eager's {eager}"


@pytest.mark.parametrize("switch", [s for s in SWITCHES if s != "default"])
def test_every_switch_changes_the_result(switch: str) -> None:
    """A head that ignored a switch could not pass the test above."""
    plain = run_block(make_block(), torch.float64)
    switched = run_block(make_block(**SWITCHES[switch]), torch.float64)
    if switch in ("trunk_norm", "no_norm"):  # acts where logits and recurring states are made
        trunk, y = Trunk(torch.float32), plain[0][0].float()
        one, other = make_block(), make_block(**SWITCHES[switch])
        assert (one.normed(y, trunk.norm) - other.normed(y, trunk.norm)).abs().max() > 0.1
        return
    difference = errors(switched, plain)
    # Position 0 is a row of depth 1; recurrence begins at depth 2.
    depth = 1 if switch == "recur_source" else 0
    assert difference[depth] > 0.1
    if switch == "recur_source":
        assert difference[0] == 0


@pytest.mark.parametrize("switch", ["default", "all_of_a_layer", "moe", "latent"])
def test_rows_do_not_depend_on_the_batch(switch: str) -> None:
    head = make_head(make_block(**SWITCHES[switch]), torch.bfloat16)
    together = run_head(head, page=4)
    for paged in zip(together, run_head(head, page=16)):
        for a, b in zip(*paged):
            assert torch.equal(a, b)
    # One row after the other, from the beginning.
    for (tokens, hidden), rows in zip(inputs(), together):
        caches, table = head.new_cache(4, 4), torch.arange(4, dtype=torch.int32)[None]
        for i in range(len(hidden)):
            y = head.extend(
                tokens[i + 1 : i + 2],
                hidden[i : i + 1],
                torch.tensor([i]),
                *caches,
                table,
                torch.tensor([i], dtype=torch.int32),
                torch.tensor([0, 1], dtype=torch.int32),
                1,
            )
            assert torch.equal(y[0], rows[0][i]), i


def test_propose_is_the_lm_head() -> None:
    block = make_block()
    trunk = Trunk(torch.float32)
    token_map = torch.tensor([3, 8, 9, 20, 41, 60], dtype=torch.int32)
    head = make_head(block, torch.float32, token_map=token_map)
    y = torch.randn(4, SPEC.hidden_size, generator=torch.Generator().manual_seed(0))
    logits, ids, lse = head.propose(y, 3)
    expected = block.normed(y) @ trunk.lm_head[token_map.long()].T
    top = expected.topk(3, -1)
    assert torch.equal(ids, token_map.long()[top.indices])
    torch.testing.assert_close(logits, top.values.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected.logsumexp(-1).detach(), rtol=1e-4, atol=1e-4)


def test_head_files_round_trip(tmp_path) -> None:
    block = make_block(concat="he", gemma_norm=True)
    path = tmp_path / "head.safetensors"
    save_head(path, block, torch.arange(5), trunk="tiny", acceptance={"conditional": [0.5]})
    again, token_map, metadata = read_head(path)
    assert again.spec == block.spec and metadata["trunk"] == "tiny"
    assert token_map.tolist() == [0, 1, 2, 3, 4]
    for name, p in block.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    head = load_head(path, trunk=Trunk(torch.bfloat16))
    assert head.lm_head.shape == (5, SPEC.hidden_size) and head.dtype == torch.bfloat16


def test_a_head_of_another_model_is_refused(tmp_path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(path, make_block(), torch.tensor([VOCAB + 3]))
    with pytest.raises(ValueError, match="vocabulary"):
        load_head(path, trunk=Trunk(torch.float32))
    trunk = Trunk(torch.float32)
    trunk.embedding = trunk.embedding[:, :32]
    with pytest.raises(ValueError, match="hidden_size 64, the trunk 32"):
        load_head(path, trunk=trunk)


@pytest.mark.parametrize("own_norm", [True, False])
def test_specs_of_older_files(own_norm: bool) -> None:
    values = SPEC.to_dict()
    for name in ("final_norm", "qk_norm", "latent", "moe"):
        del values[name]
    spec = MTPSpec.from_dict({**values, "own_norm": own_norm})
    assert spec == dataclasses.replace(SPEC, final_norm="own" if own_norm else "trunk")


def test_experts_keep_their_correction_bias_in_a_file(tmp_path) -> None:
    block = make_block(**SWITCHES["moe"])
    block.mlp.gate.e_score_correction_bias += torch.arange(4) / 7
    save_head(tmp_path / "head.safetensors", block)
    again, _, _ = read_head(tmp_path / "head.safetensors")
    assert again.spec == block.spec
    for name, p in block.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name


def test_shipped_head() -> None:
    path = default_head_path()
    assert path.stat().st_size <= 9e6
    block, token_map, metadata = read_head()
    assert block.spec.hidden_size == 576 and "SmolLM2-135M-Instruct" in metadata["trunk"]
    assert {"training", "acceptance"} <= metadata.keys()
    assert torch.equal(token_map, token_map.unique()) and token_map[0] >= 0
    assert token_map[-1] < 49152


def test_int8_head_drafts_nearly_the_same() -> None:
    exact, rough = (run_head(make_head(make_block(), torch.float32, int8=i)) for i in (False, True))
    for a, b in zip(exact, rough):
        for x, y in zip(a, b):
            assert (x - y).norm() < 0.03 * x.norm()
    heads = [make_head(make_block(), torch.float32, int8=i) for i in (False, True)]
    y = torch.randn(40, SPEC.hidden_size, generator=torch.Generator().manual_seed(0))
    (a, ids, lse), (b, rough_ids, rough_lse) = (head.propose(y, 4) for head in heads)
    assert (ids[:, 0] == rough_ids[:, 0]).float().mean() > 0.9
    # Rounding to 1/127 of a row's largest weight, about 3 sigma, is 0.7 % of sigma per product.
    spread = (y @ heads[0].lm_head.T).std()
    assert (a - b).square().mean().sqrt() < 0.02 * spread
    assert (lse - rough_lse).square().mean().sqrt() < 0.02 * spread
