"""Training the trunk with its head, bf16, what a head can learn from noise, the plot."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_cases import (
    VOCAB,
    assert_same_gradients,
    make_objective,
    objective_for,
    random_shard,
    reference_loss,
    self_written,
    tiny_llama,
)

from mtp_ext.models import Tokenizer, load_model
from mtp_ext.models.llama import rope_frequencies
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.data import Batch, Documents
from mtp_ext.train.evaluate import evaluate
from mtp_ext.train.objective import HeadWeight, Objective
from mtp_ext.train.plot import plot, smoothed
from mtp_ext.train.trainer import Trainer

JOINT = TrainConfig(joint=True, labels="hard")


@pytest.mark.parametrize("tied", [True, False])
def test_joint_gradients_are_those_of_one_graph(tied: bool) -> None:
    """One backward per loss and one through the trunk, against autograd through everything."""
    model = tiny_llama()
    if not tied:
        model.lm_head = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(3))
    objective = objective_for(model, JOINT)
    names = dict(objective.trunk.named_parameters())
    assert ("weights.lm_head" in names) == (not tied) and len(names) == 2 + 2 * 6 + (not tied)
    shard = random_shard([9, 12, 5])
    shard.answer[:4] = False
    rows, weights = torch.tensor([0, 4, 6]), torch.tensor([0.3, 0.2, 0.1])
    loss, report = objective(Documents(shard).batch([0, 1, 2]), rows, weights)
    torch.testing.assert_close((report.loss * weights).sum() + report.next_token, loss)
    expected = reference_loss(objective, shard, (0.3, 0.2, 0.1), rows.tolist())
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(objective, loss, expected)


def test_losses_share_one_gradient_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many depths there are, the LM head's gradient exists once per LM head."""
    made, init = [], HeadWeight.__init__

    def counting(self: HeadWeight, *arguments) -> None:
        init(self, *arguments)
        made.append(self.grad)

    monkeypatch.setattr(HeadWeight, "__init__", counting)
    objective = objective_for(tiny_llama(), JOINT)
    batch = Documents(random_shard([9, 12])).batch([0, 1])
    objective(batch, torch.tensor([0, 3]), torch.ones(3))
    # The drafted rows', and that of all rows for the next token.
    assert [grad.dtype for grad in made] == [torch.float32] * 2


def test_joint_training_improves_trunk_and_head() -> None:
    model = tiny_llama()
    documents = Documents(self_written(tiny_llama(), 32))
    config = TrainConfig(joint=True, labels="hard", epochs=6, lr=5e-3, trunk_lr=0.2)
    objective = objective_for(model, config)
    before = evaluate(objective, documents)
    embedding = model.embedding.detach().clone()
    Trainer(objective, documents).run()
    assert not torch.equal(model.embedding, embedding)
    assert evaluate(objective, documents).conditional[0] > before.conditional[0] + 0.2


def test_joint_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    documents = Documents(random_shard([20, 24, 17, 30]))
    config = TrainConfig(joint=True, labels="hard", epochs=3, batch_size=2)
    whole, first = (Trainer(objective_for(tiny_llama(), config), documents) for _ in range(2))
    whole.run()
    first.run(until=4)
    first.save(tmp_path / "head.ckpt")
    second = Trainer(objective_for(tiny_llama(), config, seed=1), documents)
    second.load(tmp_path / "head.ckpt")
    second.run()
    for name, p in whole.objective.state_dict().items():
        assert torch.equal(p, second.objective.state_dict()[name]), name
    assert torch.equal(
        whole.objective.trunk.model.layers[0].qkv, second.objective.trunk.model.layers[0].qkv
    )


def test_a_trained_trunk_is_saved_as_a_hugging_face_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    model = tiny_llama()
    tokens = ["<s>", "a", "b", "c", "ab"]
    model.tokenizer = Tokenizer.byte_level_bpe(
        tokens,
        ["a b"],
        [3, 1, 1, 1, 1],
        "gpt-2",
        bos_id=0,
        add_bos=True,
        chat_template="{{ messages[0].content }}",
    )
    objective = objective_for(model, JOINT)
    objective.trunk.save(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(rope_frequencies(loaded.config), rope_frequencies(model.config))
    assert loaded.config.eos_ids == model.config.eos_ids and loaded.lm_head is loaded.embedding
    assert torch.equal(loaded.layers[1].qkv, model.layers[1].qkv.bfloat16())
    assert torch.equal(loaded.embedding, model.embedding.bfloat16())
    for text in ("cab", "abba"):
        assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)
    message = [{"role": "user", "content": "abc"}]
    assert loaded.tokenizer.encode_chat(message) == model.tokenizer.encode_chat(message)


@pytest.mark.parametrize("joint", [False, True])
def test_bf16_computes_what_f32_does_nearly(joint: bool) -> None:
    batch = Documents(random_shard([19, 12, 25])).batch([0, 1, 2])
    rows, gradients = torch.tensor([0, 3, 7]), []
    for bf16 in (False, True):
        config = TrainConfig(bf16=bf16, joint=joint, labels="hard" if joint else "soft")
        objective = objective_for(tiny_llama(), config) if joint else make_objective(config)
        loss, _ = objective(batch, rows, torch.ones(3))
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in objective.parameters())
        gradients.append([p.grad for p in objective.parameters()])
    for exact, rounded in zip(*gradients):
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).norm() < 0.05 * exact.norm()


# ---- leakage -------------------------------------------------------------------------------------


class LeakyObjective(Objective):
    """Rows of depth 1 read the token that they predict."""

    def depth1(self, batch: Batch, hidden: Tensor):
        return super().depth1(replace(batch, tokens=batch.tokens.roll(-1)), hidden)


@pytest.mark.parametrize("leak", [False, True])
def test_noise_is_learned_only_by_leakage(leak: bool) -> None:
    """Texts of independent tokens: who does better than chance on new ones has seen the answer."""
    chance, lens = 1 / 8, [25] * 64
    train, fresh = random_shard(lens, 1), random_shard(lens[:32], 2)
    for shard in (train, fresh):
        shard.tokens %= 8
    objective = make_objective(TrainConfig(labels="hard", epochs=12, lr=1e-2))
    if leak:
        objective.__class__ = LeakyObjective
    trainer = Trainer(objective, Documents(train))
    trainer.run()
    hits, valid = objective.hits(Documents(fresh).batch(list(range(32))), 3)
    accuracy = [hits[n, :, : 23 - n].float().mean().item() for n in range(3)]
    if leak:
        assert accuracy[0] > 5 * chance, accuracy
    else:
        # 32 x 21 rows or more: a standard deviation is below 0.013.
        assert all(abs(a - chance) < 5 * 0.013 for a in accuracy), accuracy
        assert valid.sum() == 32 * 23


# ---- the curriculum and the plot -----------------------------------------------------------------


def test_depths_join_on_schedule() -> None:
    config = TrainConfig(depth_starts=(0.0, 0.25, 0.5), depth_weights=(1.0, 0.5, 0.25))
    assert [config.depths_at(x) for x in (0.0, 0.24, 0.25, 0.49, 0.5, 0.99)] == [1, 1, 2, 2, 3, 3]
    assert config.weights_at(0.0) == [1.0]
    assert config.weights_at(0.3) == pytest.approx([2 / 3, 1 / 3])
    joint = TrainConfig(joint=True, labels="hard", mtp_weight=(0.4, 0.2))
    assert [sum(joint.weights_at(x)) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.3, 0.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth_starts": (0.1, 0.5, 0.6)}, "ascend from 0"),
        ({"depth_starts": (0.0, 0.7, 0.6)}, "ascend from 0"),
        ({"depth_weights": (1.0, 0.5)}, "must be 3 positive numbers"),
        ({"joint": True}, "hard labels"),
    ],
)
def test_a_wrong_configuration_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_the_course_of_a_training_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Documents(random_shard([20, 24, 17, 30]))
    trainer = Trainer(make_objective(TrainConfig(epochs=5, batch_size=2)), documents)
    trainer.run()
    assert trainer.history[:6, :, 1:].isnan().all() and not trainer.history[6:].isnan().any()
    trainer.note(evaluate(trainer.objective, documents))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in plot(trainer, tmp_path / "no.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    path = tmp_path / "head.png"
    assert plot(trainer, path) == f"wrote {path}" and path.stat().st_size > 1000


def test_smoothed_is_a_trailing_mean() -> None:
    assert smoothed(torch.tensor([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]
    assert smoothed(torch.empty(0)).tolist() == []
