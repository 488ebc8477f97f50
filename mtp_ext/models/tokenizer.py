"""Text to token ids and back, chat templates, and text that is streamed token by token."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

# The pre-tokeniser that a GGUF file names in tokenizer.ggml.pre. `digits`: every digit is a word
# of its own. `pattern`: how the rest is split before byte-level BPE; None: GPT-2's own pattern.
GGUF_PRE_TOKENIZERS: dict[str, dict] = {
    "gpt-2": {"digits": False, "pattern": None},
    "smollm": {"digits": True, "pattern": None},
    "llama-bpe": {
        "digits": False,
        "pattern": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    },
}
GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4  # token types that never come out of merges


class Tokenizer:
    """A `tokenizers.Tokenizer` with the model's chat template."""

    def __init__(
        self,
        inner: "tokenizers.Tokenizer",
        chat_template: str | None = None,
        bos_id: int | None = None,
        add_bos: bool = False,
    ):
        self.inner = inner
        self.chat_template = chat_template
        self.bos_id = bos_id
        self.add_bos = add_bos

    @classmethod
    def byte_level_bpe(
        cls,
        tokens: list[str],
        merges: list[str],
        token_types: list[int],
        pre: str,
        **options,
    ) -> "Tokenizer":
        """From the lists of a GGUF file."""
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Inner

        if pre not in GGUF_PRE_TOKENIZERS:
            known = ", ".join(GGUF_PRE_TOKENIZERS)
            raise ValueError(f"GGUF pre-tokeniser {pre!r} is not supported ({known} are)")
        rule = GGUF_PRE_TOKENIZERS[pre]
        inner = Inner(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=[tuple(merge.split(" ")) for merge in merges],
            )
        )
        steps = [pre_tokenizers.Digits(individual_digits=True)] if rule["digits"] else []
        if rule["pattern"] is not None:
            steps.append(pre_tokenizers.Split(Regex(rule["pattern"]), "isolated"))
        steps.append(
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule["pattern"] is None)
        )
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
        inner.decoder = decoders.ByteLevel()
        of_type = lambda kind: [t for t, k in zip(tokens, token_types) if k == kind]  # noqa: E731
        inner.add_special_tokens([AddedToken(t, special=True) for t in of_type(GGUF_CONTROL)])
        inner.add_tokens([AddedToken(t, normalized=False) for t in of_type(GGUF_USER_DEFINED)])
        return cls(inner, **options)

    def encode(self, text: str) -> list[int]:
        ids = self.inner.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self.add_bos and self.bos_id is not None else ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages: list[dict[str, str]], for_answer: bool = True) -> list[int]:
        """Messages ({"role", "content"}) through the chat template, ready for an answer or not."""
        if self.chat_template is None:
            return self.encode("\n\n".join(message["content"] for message in messages))
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

        def refuse(message: str) -> None:
            raise ValueError(f"chat template: {message}")

        bos = "" if self.bos_id is None else self.inner.id_to_token(self.bos_id)
        text = environment.from_string(self.chat_template).render(
            messages=messages,
            add_generation_prompt=for_answer,
            bos_token=bos,
            raise_exception=refuse,
        )
        return self.inner.encode(text, add_special_tokens=False).ids

    def save(self, folder: Path) -> None:
        """The files of a Hugging Face folder that say how text becomes tokens."""
        self.inner.save(str(folder / "tokenizer.json"))
        options: dict = {"tokenizer_class": "PreTrainedTokenizerFast"}
        options["add_bos_token"] = self.add_bos
        if self.chat_template is not None:
            options["chat_template"] = self.chat_template
        if self.bos_id is not None:
            options["bos_token"] = self.inner.id_to_token(self.bos_id)
        (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=2))


class TextStream:
    """Turns tokens that arrive a few at a time into text, never half a character.

    A token may end inside a UTF-8 sequence, and what a token looks like may depend on the one
    before. So text is decoded from a little before what was already shown, and held back while
    its last character is incomplete.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.context = 0  # tokens before here no longer matter
        self.shown = 0  # tokens before here are in the text returned so far

    def push(self, ids: list[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self.ids.extend(ids)
        text = self._pending()
        if text.endswith("\ufffd") or not text:
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return text

    def finish(self) -> str:
        """What is left: broken characters show as U+FFFD."""
        text = self._pending()
        self.context = self.shown = len(self.ids)
        return text

    def _pending(self) -> str:
        before = self.tokenizer.decode(self.ids[self.context : self.shown])
        return self.tokenizer.decode(self.ids[self.context :])[len(before) :]
