"""Call single operators from a loop of your own.

The trunk here is a transformers model and the drafts come from no head at all: the loop looks for
the last two tokens earlier in the text and proposes what followed them then ("prompt lookup").
`torch.ops.mtp.rejection_sample` takes it from there: raw logits in, accepted tokens out, exactly
the model's distribution. Such drafts are certain, so q is one-hot and `draft_probs` is left out.

    python examples/own_loop.py
"""

import torch

import mtp_ext  # noqa: F401  (registers torch.ops.mtp)
from mtp_ext.models import load_model
from mtp_ext.models.to_transformers import to_transformers

MAX_DRAFT_LEN = 4
PROMPT = "Repeat this sentence three times: The quick brown fox jumps over the lazy dog."


def look_up(tokens: list[int]) -> list[int]:
    """What followed the most recent earlier occurrence of the last two tokens."""
    for end in range(len(tokens) - 1, 1, -1):
        if tokens[end - 2 : end] == tokens[-2:]:
            return tokens[end : end + MAX_DRAFT_LEN]
    return []


@torch.no_grad()
def generate(trunk, tokens: list[int], max_len: int, eos: int, seed: int, temperature: float):
    """Yields the tokens of every step."""
    from transformers import DynamicCache

    cache, cached = DynamicCache(config=trunk.config), 0
    while len(tokens) < max_len and tokens[-1] != eos:
        draft = look_up(tokens)
        rows = torch.tensor([tokens[cached:] + draft])
        logits = trunk(rows, past_key_values=cache).logits[0, -len(draft) - 1 :]
        token_ids, num_accepted, _ = torch.ops.mtp.rejection_sample(
            logits.contiguous(),
            torch.tensor(draft, dtype=torch.int64),
            torch.tensor([0, len(draft)], dtype=torch.int32),
            torch.tensor([seed]),
            torch.tensor([len(tokens)]),
            len(draft),
            temperature=torch.tensor([temperature]),
        )
        new = token_ids[0, : num_accepted[0] + 1].tolist()
        if eos in new:
            new = new[: new.index(eos) + 1]
        # Rejected drafts leave the cache by being cut off.
        rejected = len(draft) + 1 - len(new)
        if rejected:
            cache.crop(-rejected)
        cached = len(tokens) + len(new) - 1
        tokens = tokens + new
        yield new


def main() -> None:
    model = load_model(dtype=torch.float32)
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    steps = list(
        generate(to_transformers(model), prompt, len(prompt) + 64, model.config.eos_ids[0], 0, 0.0)
    )
    print(model.tokenizer.decode([token for step in steps for token in step]))
    print(f"\n{sum(map(len, steps))} tokens in {len(steps)} forward passes")


if __name__ == "__main__":
    main()
