"""What a head needs of its trunk in training: frozen weights, or a trunk that learns too."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mtp_ext.models import Llama
from mtp_ext.models.to_transformers import to_transformers
from mtp_ext.train.data import Batch


class FrozenTrunk(nn.Module):
    """The weights that a head borrows; hidden states come from the shards."""

    joint = False

    def __init__(self, embedding: Tensor, lm_head: Tensor, norm: Tensor):
        super().__init__()
        for name, weight in (("embedding", embedding), ("lm_head", lm_head), ("norm", norm)):
            self.register_buffer(name, weight.detach().float(), persistent=False)

    def hidden(self, batch: Batch) -> Tensor:
        return batch.hidden


class JointTrunk(nn.Module):
    """A Llama whose weights become parameters, in f32; tied weights stay one parameter.

    The model itself is trained: after the last step it generates as any other.
    """

    joint = True

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model
        self.weights = nn.ParameterDict()
        parameters: dict[int, nn.Parameter] = {}
        for name, holder, attribute in _weights(model):
            weight = getattr(holder, attribute)
            if id(weight) not in parameters:
                parameters[id(weight)] = nn.Parameter(weight.detach().float())
                self.weights[name] = parameters[id(weight)]
            setattr(holder, attribute, parameters[id(weight)])

    @property
    def embedding(self) -> Tensor:
        return self.model.embedding

    @property
    def lm_head(self) -> Tensor:
        return self.model.lm_head

    @property
    def norm(self) -> Tensor:
        return self.model.norm

    def hidden(self, batch: Batch) -> Tensor:
        """f32 [T, H], the residual stream before the final norm, differentiable."""
        return batch.unpad(self.model.forward_dense(batch.pad(batch.tokens)))

    def save(self, folder: Path) -> None:
        """A Hugging Face folder in bf16, for `mtp_ext.models.load_model` and for transformers."""
        to_transformers(self.model).to(torch.bfloat16).save_pretrained(folder)
        if self.model.tokenizer is not None:
            self.model.tokenizer.save(folder)


def _weights(model: Llama) -> Iterator[tuple[str, object, str]]:
    """A parameter's name, and where the model holds it."""
    for attribute in ("embedding", "norm", "lm_head"):
        yield attribute, model, attribute
    for i, layer in enumerate(model.layers):
        for attribute in layer.__slots__:
            yield f"layer{i}_{attribute}", layer, attribute
