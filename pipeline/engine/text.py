"""Text around the engine, which knows only token ids: prompts, continuations, stop texts, and whole characters."""

from codecs import getincrementaldecoder
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine, Token
from pipeline.engine.best import Candidate, badness
from pipeline.engine.generator import SLOTS
from pipeline.engine.scheduler import FinishReason, Request
from pipeline.errors import UserError
from pipeline.quality.lexicon import EMPTY_LEXICON, Lexicon, load_lexicon
from pipeline.tokens import load_tokenizer, prompt_ids

BYTES = "bytes:"
"""The prefix of a token's text if the token is not made of whole characters: its bytes follow, spelled out."""
MOST_CHARACTER_BYTES = 4
"""The most bytes of a character in UTF-8."""


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
    error: Exception | None = None
    """The error that ended the choice, if the finish reason is `error`."""

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


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt to continue."""

    ids: Sequence[int]
    text: str
    """The prompt as text, by which `best_of` judges how it is continued."""
    params: SamplingParams
    begin: int = 0
    """The number of characters that come before a continuation in the text that the caller returns."""


class TextGenerator:
    """An engine with its tokenizer and, for `best_of`, its lexicon."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, lexicon: Lexicon = EMPTY_LEXICON) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.lexicon = lexicon
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
        """Load an exported engine, and the tokenizer and the lexicon in its folder. Raises `UserError`."""
        engine = Engine.load(folder, precision=precision, provider=provider, threads=threads, slots=slots)
        return cls(engine, load_tokenizer(Path(folder)), load_lexicon(Path(folder)))

    def complete(self, prompts: Sequence[str], params: Sequence[SamplingParams]) -> list[TextCompletion]:
        """Continue every prompt with its own parameters; with `n > 1`, choice j of prompt i is element `i * n + j`.

        A continuation frees its slot as soon as a stop text ends it. Raises `UserError` if a prompt does not fit.
        """
        asked = [
            Asked(prompt_ids(self.tokenizer, prompt), prompt, own) for prompt, own in zip(prompts, params, strict=True)
        ]
        choices = {choice.request: choice for choice in self.begin(asked)}
        pieces: list[list[Piece]] = [[] for _ in range(sum(own.n for own in params))]

        def advance(request: Request) -> bool:
            choice = choices[request]
            for piece in choice.sift(choice.take()):
                pieces[piece.index].append(piece)
            return choice.finish_reason is not None

        self.engine.run(list(choices), advance)
        return [_completion(own) for own in pieces]

    def begin(self, asked: Sequence["Asked"], client: str | None = None) -> list["Choice"]:
        """Queue the continuations of prompts, and return them in order: `candidates` per prompt.

        Choice j of prompt i has the index `i * n + j`; so have the pieces that `Choice.sift` returns. `client` is as in
        `Scheduler.submit`. Raises `UserError` as `check` does, and then queues none of them.
        """
        # Those of one client's prompts are the same object, which may name the whole vocabulary.
        of_engine = {id(own.params): self._for_engine(own.params) for own in asked}
        begun = [begun_character(self.tokenizer, own.ids) for own in asked]
        requests = iter(self.engine.submit_all([(own.ids, of_engine[id(own.params)]) for own in asked], client))
        choices: list[Choice] = []
        first = 0
        for own, own_begun in zip(asked, begun, strict=True):
            group = _Candidates(own, first, self.lexicon) if own.params.best_of > 1 else None
            texts = self.token_texts if own.params.logprobs is not None else None
            choices += [
                Choice(
                    first + index,
                    request,
                    Detokenizer(self.tokenizer, own.params.stop, min_tokens=own.params.min_new_tokens, begun=own_begun),
                    texts=texts,
                    begin=own.begin,
                    group=group,
                )
                for index, request in enumerate(islice(requests, own.params.candidates))
            ]
            first += own.params.n
        return choices

    def check(self, prompts: Iterable[Sequence[int]], params: SamplingParams) -> None:
        """Raise `UserError` if a prompt does not fit, or needs what the engine lacks. Safe to call from any thread."""
        self.engine.check(prompts, self._for_engine(params))

    def _for_engine(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters without stop texts and `best_of`, as the engine reads only ids."""
        if params.best_of > 1 and not self.lexicon:
            raise UserError(
                "best_of: this engine holds no lexicon to judge texts by; export the checkpoint again, with "
                "export.verbatim_index set to true or a base that has a lexicon"
            )
        if params.best_of > 1:
            params = replace(params, n=params.best_of, best_of=1, logprobs=params.logprobs or 0)
        return replace(params, stop=()) if params.stop else params

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        """Continue a prompt, and yield pieces of whole characters as they come, up to a stop text.

        A character that the last token leaves incomplete is dropped.
        """
        if params.best_of > 1:
            return iter([completion.text for completion in self.complete([prompt], [params])])
        tokens = self.engine.stream(prompt_ids(self.tokenizer, prompt), self._for_engine(params))
        return detokenize(tokens, Detokenizer(self.tokenizer, params.stop, min_tokens=params.min_new_tokens))


def detokenize(tokens: Iterator[Token], detokenizer: "Detokenizer") -> Iterator[str]:
    """Yield the text of tokens in pieces of whole characters, up to the stop text that is complete first."""
    for token in tokens:
        if token.token_id is None:
            break
        if piece := detokenizer.feed(token.token_id):
            yield piece
        if detokenizer.stopped:
            return
    if rest := detokenizer.finish():
        yield rest


def begun_character(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """Return the bytes of a character that a prompt leaves to its continuation to complete; empty if there is none.

    The text of such a prompt ends in a mark for them.
    """
    decoder = getincrementaldecoder("utf-8")("replace")
    decoder.decode(b"".join(_spell(tokenizer, token_id) for token_id in ids[-MOST_CHARACTER_BYTES:]))
    begun, _ = decoder.getstate()
    return begun


class Detokenizer:
    """Token ids to text in pieces of whole characters, up to a stop text; text that may begin one is held back.

    For the byte-level BPE of GPT-2 (Radford et al. 2019), whose tokens are bytes.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, min_tokens: int = 0, begun: bytes = b""
    ) -> None:
        """Read the tokens that follow a prompt, which may have `begun` a character.

        A stop text counts if it is complete only after the first `min_tokens`, as in vLLM.
        """
        self._tokenizer = tokenizer
        self._stop = stop
        self._unstoppable_tokens = min_tokens
        self._unstoppable = 0
        """The number of characters held back that came with those tokens."""
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((begun, 0))
        self._held = ""
        self.stopped = False
        """Whether a stop text is complete; no text comes after it."""

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes: often a word, sometimes nothing."""
        self._held += self._decoder.decode(_spell(self._tokenizer, token_id))
        if self._unstoppable_tokens > 0:
            self._unstoppable_tokens -= 1
            self._unstoppable = len(self._held)
        end = _first_stop(self._held, self._stop, self._unstoppable)
        self.stopped = end is not None
        if end is None:
            end = len(self._held) - _possible_stop(self._held, self._stop)
        piece, self._held = self._held[:end], self._held[end:]
        self._unstoppable = max(0, self._unstoppable - end)
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
        spelled = _spell(self._tokenizer, token_id)
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
        detokenizer: Detokenizer,
        *,
        texts: TokenTexts | None = None,
        begin: int = 0,
        group: "_Candidates | None" = None,
    ) -> None:
        """Read `request`, whose text begins after `begin` characters.

        `texts` is given if its tokens are reported, `group` if it is one of several candidates.
        """
        self.index = index
        self.request = request
        self.finish_reason: FinishReason | None = None
        """Why it has ended; a stop text ends it, but not the request that draws its tokens."""
        self._detokenizer = detokenizer
        self.logprob = 0.0
        """The natural log-probability of what has been drawn, if it was asked for."""
        self._texts = texts
        self._group = group
        self._length = begin
        """The length of the choice's text up to here, in characters."""
        self._tokens: deque[TokenText] = deque()
        """The tokens of which no character has been returned yet."""

    def take(self) -> Piece | None:
        """Return what has been drawn since the last call; None if nothing has, as after its end."""
        if self.finish_reason is not None or not self.request.tokens:
            return None
        text, token_ids = "", []
        while self.request.tokens and self.finish_reason is None:
            token = self.request.tokens.popleft()
            if token.token_id is not None:
                token_ids.append(token.token_id)
                self.logprob += token.logprob or 0.0
                begin = self._length + len(text) + self._detokenizer.held
                text += self._detokenizer.feed(token.token_id)
                if self._texts is not None:
                    end = self._length + len(text) + self._detokenizer.held
                    self._tokens.append(self._texts.describe(token, begin, end))
            self.finish_reason = "stop" if self._detokenizer.stopped else token.finish_reason
        if self.finish_reason is not None:
            text += self._detokenizer.finish()
        self._length += len(text)
        error = self.request.error if self.finish_reason == "error" else None
        return Piece(self.index, text, token_ids, self._complete_tokens(), self.finish_reason, error)

    def sift(self, piece: Piece | None) -> list[Piece]:
        """Return what the caller reads once this piece is taken.

        That is the piece itself; for a candidate nothing, until all of its prompt have ended, and then the best ones.
        """
        if piece is None:
            return []
        return [piece] if self._group is None else self._group.add(self, piece)

    def _complete_tokens(self) -> list[TokenText]:
        """Take the tokens of which a character has been returned; at the end all, except those of a stop text."""
        takes_all = self.finish_reason is not None and not self._detokenizer.stopped
        tokens = []
        while self._tokens and (takes_all or self._tokens[0].offset < self._length):
            tokens.append(self._tokens.popleft())
        return tokens


class _Candidates:
    """The candidates of one prompt."""

    def __init__(self, asked: Asked, first: int, lexicon: Lexicon) -> None:
        self._asked = asked
        self._first = first
        self._lexicon = lexicon
        self._pieces: dict[Choice, list[Piece]] = defaultdict(list)
        self._judged: list[tuple[tuple[bool, float, float], int, Piece]] = []
        """The candidates that have ended: how bad each is, its index, and all of it."""

    def add(self, choice: Choice, piece: Piece) -> list[Piece]:
        """Keep a piece of a candidate; return the best candidates, a piece each, if it was the last of them all."""
        self._pieces[choice].append(piece)
        params = self._asked.params
        if piece.finish_reason is None:
            return []
        # Each when it ends: to judge many at once would hold up the others' tokens.
        whole = join_pieces(self._pieces.pop(choice))
        candidate = Candidate(
            whole.text,
            whole.token_ids,
            whole.finish_reason == "stop",
            choice.logprob / max(1, whole.token_count),
        )
        is_failed = whole.error is not None
        self._judged.append(((is_failed, *badness(self._asked.text, candidate, self._lexicon)), choice.index, whole))
        if len(self._judged) < params.candidates:
            return []
        best = sorted(self._judged, key=itemgetter(0, 1))[: params.n]
        return [replace(piece, index=self._first + rank) for rank, (_, _, piece) in enumerate(best)]


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """Return the pieces of one choice as a single one."""
    return Piece(
        pieces[-1].index,
        "".join(piece.text for piece in pieces),
        [token_id for piece in pieces for token_id in piece.token_ids],
        [token for piece in pieces for token in piece.tokens],
        pieces[-1].finish_reason,
        pieces[-1].error,
    )


def report_logprobs(tokens: Sequence[TokenText]) -> dict[str, list[Any]]:
    """Return tokens with their log-probabilities in the shape of OpenAI's API."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.top_logprobs for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _completion(pieces: Sequence[Piece]) -> TextCompletion:
    whole = join_pieces(pieces)
    if whole.finish_reason is None:
        raise ValueError("the request has not ended")
    return TextCompletion(whole.text, whole.token_ids, whole.finish_reason)


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character: printable bytes are written as themselves, the others from 256 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _spell(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return the bytes of a token, as the tokenizer decodes it: a token that is not written in bytes is itself.

    An embedding may have more rows than the tokenizer has tokens; they have no bytes.
    """
    written: str = tokenizer.id_to_token(token_id) or ""
    try:
        return bytes(_BYTES[character] for character in written)
    except KeyError:
        return written.encode()


def _first_stop(text: str, stop: Sequence[str], unstoppable: int) -> int | None:
    """Return where the stop text that is complete first begins, which does not depend on how tokens cut the text.

    One that ends within the first `unstoppable` characters does not count.
    """
    starts = [(text.find(entry, max(0, unstoppable + 1 - len(entry))), entry) for entry in stop]
    complete = [(start + len(entry), start) for start, entry in starts if start >= 0]
    return min(complete)[1] if complete else None


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a stop text."""
    return max((_overlap(text, entry) for entry in stop), default=0)


def _overlap(text: str, entry: str) -> int:
    """Return the length of the longest beginning of `entry`, but not all of it, that `text` ends with."""
    counts = range(min(len(entry) - 1, len(text)), 0, -1)
    return next((count for count in counts if text.endswith(entry[:count])), 0)
