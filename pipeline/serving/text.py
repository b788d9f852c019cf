"""Text around the engine: prompts in, continuations out, stop texts, and characters never cut in a stream."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine, Token
from pipeline.errors import UserError
from pipeline.tokens import load_tokenizer, prompt_ids


class TextGenerator:
    """An engine with its tokenizer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: str | Path, *, precision: str = "auto", provider: str = "auto") -> "TextGenerator":
        """Load an exported engine and the tokenizer beside it. Raises `UserError`."""
        return cls(Engine.load(folder, precision=precision, provider=provider), load_tokenizer(Path(folder)))

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        """The continuation of every prompt, without it; choice j of prompt i stands at `i * n + j`."""
        ids = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        completions = self.engine.generate(ids, params)
        return [
            "".join(self._pieces((Token(token_id) for token_id in completion.token_ids), params.stop))
            for completion in completions
        ]

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        """The continuation in pieces of whole characters, as they come.

        It ends before the stop text that is complete first. A last character of which some bytes are missing, as the
        last token may leave one, is no part of it.
        """
        return self._pieces(self.engine.stream(prompt_ids(self.tokenizer, prompt), params), params.stop)

    def _pieces(self, tokens: Iterator[Token], stop: Sequence[str]) -> Iterator[str]:
        decoder = DecodeStream(skip_special_tokens=False)
        held = ""
        for token in tokens:
            if token.token_id is None:
                break
            held += decoder.step(self.tokenizer, token.token_id) or ""
            if (end := _first_stop(held, stop)) is not None:
                if end > 0:
                    yield held[:end]
                return
            kept = _possible_stop(held, stop)
            if piece := held[: len(held) - kept]:
                yield piece
            held = held[len(held) - kept :]
        if held:
            yield held


def merge_decoding(defaults: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """`defaults` with each value that was given; null and an empty list mean the default."""
    given = {name: value for name, value in values.items() if value is not None and value != []}
    return SamplingParams.from_mapping({**defaults.to_mapping(), **given})


def bias_of(ids: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    """`logit_bias` from the two lists that a signature can declare."""
    if len(ids) != len(values):
        raise UserError(f"logit_bias_values: {len(values)} values for {len(ids)} ids in logit_bias_ids")
    return dict(zip(ids, values, strict=True))


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop text begins that is complete first: the same however tokens cut the text."""
    complete = [(index + len(entry), index) for entry in stop if (index := text.find(entry)) >= 0]
    return min(complete)[1] if complete else None


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    longest = max((len(entry) for entry in stop), default=1) - 1
    return next(
        (
            count
            for count in range(min(longest, len(text)), 0, -1)
            if any(entry.startswith(text[len(text) - count :]) for entry in stop)
        ),
        0,
    )
