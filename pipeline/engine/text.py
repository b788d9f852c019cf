"""Text around the engine, which knows only token ids: prompts, continuations, stop texts, and whole characters."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine, Token
from pipeline.engine.generator import SLOTS
from pipeline.engine.scheduler import FinishReason, Request
from pipeline.tokens import load_tokenizer, prompt_ids

BYTES = "bytes:"
"""The prefix of a token's text if the token is not made of whole characters: its bytes follow, spelled out."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as a client reads it."""

    text: str
    offset: int
    """The position of its first character in the text of the choice."""
    logprob: float | None
    top_logprobs: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """What a choice has gained in a step."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """The tokens that were drawn."""
    tokens: list[TokenText] = field(default_factory=list)
    """The tokens that the text completes; empty if no log-probabilities were asked for."""
    finish_reason: FinishReason | None = None

    @property
    def token_count(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TextCompletion:
    """One continuation, without its prompt."""

    text: str
    """The text up to the stop text, if one ended it."""
    token_ids: list[int]
    """All tokens that were drawn; the last ones may spell the stop text."""
    finish_reason: FinishReason


class TextGenerator:
    """An engine with its tokenizer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.token_texts = TokenTexts(tokenizer)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        precision: str = "auto",
        provider: str = "auto",
        threads: int | None = None,
        slots: int = SLOTS,
    ) -> "TextGenerator":
        """Load an exported engine and the tokenizer in its folder. Raises `UserError`."""
        engine = Engine.load(folder, precision=precision, provider=provider, threads=threads, slots=slots)
        return cls(engine, load_tokenizer(Path(folder)))

    def complete(self, prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[TextCompletion]:
        """Continue every prompt with its own parameters; with `n > 1`, choice j of prompt i is element `i * n + j`.

        A continuation frees its slot as soon as a stop text ends it. Raises `UserError` if a prompt does not fit.
        """
        pairs = [(prompt_ids(self.tokenizer, prompt), own) for prompt, own in zip(prompts, params, strict=True)]
        requests = self.submit(pairs)
        stops = [own.stop for _, own in pairs for _ in range(own.n)]
        choices = {
            request: Choice(index, request, self.tokenizer, stop)
            for index, (request, stop) in enumerate(zip(requests, stops, strict=True))
        }
        pieces: list[list[Piece]] = [[] for _ in requests]

        def advance(request: Request) -> bool:
            choice = choices[request]
            if (piece := choice.take()) is not None:
                pieces[choice.index].append(piece)
            return choice.finish_reason is not None

        self.engine.run(requests, advance)
        return [_completion(own) for own in pieces]

    def submit(self, prompts: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[Request]:
        """Queue the continuations of prompts in tokens, as `Engine.submit_all` does; the caller handles stop texts.

        Raises `UserError` if a prompt does not fit.
        """
        return self.engine.submit_all((ids, _for_engine(own)) for ids, own in prompts)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise `UserError` if `submit` would refuse a prompt. Safe to call from any thread."""
        self.engine.check(prompt, _for_engine(params))

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        """Continue a prompt, and yield pieces of whole characters as they come, up to a stop text.

        A character that the last token leaves incomplete is dropped.
        """
        tokens = self.engine.stream(prompt_ids(self.tokenizer, prompt), _for_engine(params))
        return detokenize(tokens, self.tokenizer, params.stop)


def detokenize(tokens: Iterator[Token], tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
    """Yield the text of tokens in pieces of whole characters, up to the stop text that is complete first."""
    detokenizer = Detokenizer(tokenizer, stop)
    for token in tokens:
        if token.token_id is None:
            break
        if piece := detokenizer.feed(token.token_id):
            yield piece
        if detokenizer.stopped:
            return
    if rest := detokenizer.finish():
        yield rest


class Detokenizer:
    """Token ids to text in pieces of whole characters, up to a stop text; text that may begin one is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._held = ""
        self.stopped = False
        """Whether a stop text is complete; no text comes after it."""

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes: often a word, sometimes nothing."""
        self._held += self._decoder.step(self._tokenizer, token_id) or ""
        end = _first_stop(self._held, self._stop)
        self.stopped = end is not None
        if end is None:
            end = len(self._held) - _possible_stop(self._held, self._stop)
        piece, self._held = self._held[:end], self._held[end:]
        return piece

    @property
    def held(self) -> int:
        """The number of characters that are held back."""
        return len(self._held)

    def finish(self) -> str:
        """Return the text that was held back for a stop text that did not come."""
        return "" if self.stopped else self._held


class TokenTexts:
    """The text of each token id; if it is not made of whole characters, its bytes as OpenAI's API spells them.

    For the byte-level BPE of GPT-2 (Radford et al. 2019), which writes a byte as a character of its own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._text_of(token_id)
        return text

    def describe(self, token: Token, begin: int, end: int) -> TokenText:
        """Return a token as a client reads it, which lengthened a text from `begin` to `end` characters.

        A token that is only bytes is placed where their character will begin. A token of whole characters is placed at
        the end of the text: anything between is the mark for earlier bytes that never became a character.
        """
        if token.token_id is None:
            raise ValueError("the token has no id")
        text, top = self[token.token_id], token.top_logprobs
        offset = begin if text.startswith(BYTES) else max(begin, end - len(text))
        return TokenText(text, offset, token.logprob, None if top is None else {self[i]: p for i, p in top.items()})

    def _text_of(self, token_id: int) -> str:
        written = self._tokenizer.id_to_token(token_id)
        if written is None:
            # An embedding may have more rows than the tokenizer has tokens.
            return ""
        if not all(character in _BYTES for character in written):
            return str(written)
        spelled = bytes(_BYTES[character] for character in written)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return BYTES + "".join(f"\\x{byte:02x}" for byte in spelled)


class Choice:
    """A continuation that is being drawn, read as text up to a stop text."""

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        texts: TokenTexts | None = None,
        begin: int = 0,
    ) -> None:
        """Read `request`, whose text begins after `begin` characters. `texts` is given if its tokens are reported."""
        self.index = index
        self.request = request
        self.finish_reason: FinishReason | None = None
        """Why it has ended; a stop text ends it, but not the request that draws its tokens."""
        self._detokenizer = Detokenizer(tokenizer, stop)
        self._texts = texts
        self._length = begin
        """The length of the choice's text up to here, in characters."""
        self._tokens: deque[TokenText] = deque()
        """The tokens of which no character has been returned yet."""

    def take(self) -> Piece | None:
        """Return what has been drawn since the last call; None if nothing has."""
        text, token_ids = "", []
        while self.request.tokens and self.finish_reason is None:
            token = self.request.tokens.popleft()
            if token.token_id is not None:
                token_ids.append(token.token_id)
                begin = self._length + len(text) + self._detokenizer.held
                text += self._detokenizer.feed(token.token_id)
                if self._texts is not None:
                    end = self._length + len(text) + self._detokenizer.held
                    self._tokens.append(self._texts.describe(token, begin, end))
            self.finish_reason = "stop" if self._detokenizer.stopped else token.finish_reason
        if self.finish_reason is not None:
            text += self._detokenizer.finish()
        if not text and not token_ids and self.finish_reason is None:
            return None
        self._length += len(text)
        return Piece(self.index, text, token_ids, self._complete_tokens(), self.finish_reason)

    def _complete_tokens(self) -> list[TokenText]:
        """Take the tokens of which a character has been returned; at the end all, except those of a stop text."""
        takes_all = self.finish_reason is not None and not self._detokenizer.stopped
        tokens = []
        while self._tokens and (takes_all or self._tokens[0].offset < self._length):
            tokens.append(self._tokens.popleft())
        return tokens


def _completion(pieces: Sequence[Piece]) -> TextCompletion:
    reason = pieces[-1].finish_reason
    if reason is None:
        raise ValueError("the request has not ended")
    return TextCompletion(
        "".join(piece.text for piece in pieces), [token_id for piece in pieces for token_id in piece.token_ids], reason
    )


def _for_engine(params: SamplingParams) -> SamplingParams:
    """Return the parameters without stop texts, as the engine reads only ids."""
    return replace(params, stop=())


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character: printable bytes are written as themselves, the others from 256 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the stop text that is complete first begins, which does not depend on how tokens cut the text."""
    complete = [(index + len(entry), index) for entry in stop if (index := text.find(entry)) >= 0]
    return min(complete)[1] if complete else None


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a stop text."""
    longest = max((len(entry) for entry in stop), default=1) - 1
    return next(
        (
            count
            for count in range(min(longest, len(text)), 0, -1)
            if any(entry.startswith(text[len(text) - count :]) for entry in stop)
        ),
        0,
    )
