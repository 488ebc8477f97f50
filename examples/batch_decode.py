"""Decode several requests at once with mtp_ext.decode.

Requests have their own sampling parameters and seeds, join and leave at any step, and share a
paged cache. The planner picks the draft length of every step from measured times and acceptance.

    python examples/batch_decode.py
"""

import torch

from mtp_ext.decode import Decoder, DraftPlanner, SamplingParams, measure_step_seconds
from mtp_ext.models import load_model
from mtp_ext.nn import load_head

QUESTIONS = (
    ("Why do leaves turn red in autumn?", SamplingParams(max_new_tokens=64)),
    ("Suggest a name for a grey cat.", SamplingParams(48, temperature=0.8, top_p=0.95, seed=1)),
    ("Suggest a name for a grey cat.", SamplingParams(48, temperature=0.8, top_p=0.95, seed=2)),
    ("What is 12 times 12?", SamplingParams(max_new_tokens=32)),
)


def main() -> None:
    model = load_model(dtype=torch.bfloat16)
    head = load_head(trunk=model)
    planner = DraftPlanner(measure_step_seconds(model, head, batch_size=len(QUESTIONS)))

    decoder = Decoder(model, head, num_tokens=2048)
    requests = []
    for question, params in QUESTIONS:
        prompt = model.tokenizer.encode_chat([{"role": "user", "content": question}])
        requests.append(decoder.submit(prompt, params))
    for _ in decoder.run(planner):
        pass  # each step yields the requests that got tokens, for streaming

    for (question, params), request in zip(QUESTIONS, requests):
        print(f"> {question}  (temperature {params.temperature:g}, seed {params.seed})")
        print(model.tokenizer.decode(request.output).strip(), "\n")
    metrics = decoder.metrics
    acceptance = ", ".join(f"{a:.2f}" for a in metrics.acceptance)
    print(f"{metrics.tokens_per_step:.2f} tokens per step; acceptance per depth {acceptance}")


if __name__ == "__main__":
    main()
