"""Continuations of many prompts: a file of JSON lines is read, and one is written, row by row in the same order.

A row is an object with `prompt` and, if it likes, `id`, `preset` and decoding parameters of its own, which override
those of all rows. Its result has the keys `row` (the number of its line, from 1), `id`, `prompt`, `text` and
`finish_reason`; the last two are lists if the row has `n > 1`. A row that cannot be continued has `error` instead of
the last three, and ends nothing else.

Results are appended to `OUT.partial`, which becomes `OUT` at the end. `OUT.meta.json` says what makes them: a rerun
with the same continues after the last whole row, and any other is refused.
"""

import hashlib
import json
import math
import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tqdm import tqdm

from pipeline.decoding import ModelDecoding, SamplingParams, merge_decoding
from pipeline.engine.generator import SLOTS
from pipeline.engine.manifest import MANIFEST_FILE, read_manifest
from pipeline.engine.text import Asked, Choice, Piece, TextGenerator, join_pieces, report_logprobs
from pipeline.errors import UserError
from pipeline.files import PARTIAL_SUFFIX, read_json, sha256_file, write_json
from pipeline.progress import progress
from pipeline.stage_process import LOCK_SUFFIX, LOCK_WAIT_S, only_writer
from pipeline.tokens import prompt_ids

META_SUFFIX = ".meta.json"
OWN_KEYS = ("prompt", "id", "preset")
"""The keys of a row besides decoding parameters."""
WAITING_BYTES = 64 * 2**20
"""The most bytes of results that wait in memory for an earlier row to end; no row begins while there are more."""
SHOWN_ROWS = 5
"""The number of bad rows that the last line names."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row to continue."""

    number: int
    kept: dict[str, Any]
    """The `id` of the row, if it has one."""
    prompt: str
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Result:
    """What is written of a row."""

    number: int
    values: dict[str, Any]
    tokens: int = 0
    """The number of tokens drawn for it."""

    @property
    def is_bad(self) -> bool:
        return "error" in self.values

    def line(self) -> bytes:
        # JSON's own escape takes the place of half a surrogate pair, which an id or an error may hold.
        text = json.dumps({"row": self.number, **self.values}, ensure_ascii=False, allow_nan=False)
        return text.encode(errors="backslashreplace") + b"\n"


def row_seed(seed: int, number: int) -> int:
    """Return the seed of a row that has none of its own: the first 63 bits of the SHA-256 of `SEED ROW` in decimals."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def decoding_of_rows(own: ModelDecoding, preset: str | None, values: Mapping[str, Any]) -> ModelDecoding:
    """Return a model's decoding for rows whose defaults are a preset and `values`, which override a row's preset, too.

    Raises `UserError` if a value is wrong, or does not agree with a preset.
    """
    presets = {}
    for name, params in own.presets.items():
        try:
            presets[name] = merge_decoding(params, values)
        except UserError as error:
            raise UserError(f"preset {name}: {error}") from None
    return ModelDecoding(merge_decoding(own.preset(preset), values), presets)


def read_rows(lines: Iterable[bytes], last: int, decoding: ModelDecoding, seed: int) -> Iterator[Row | Result]:
    """Yield the rows after line `last`; a line of white space is no row."""
    for number, line in islice(enumerate(lines, 1), last, None):
        if line.strip():
            yield read_row(number, line, decoding, seed)


def read_row(number: int, line: bytes, decoding: ModelDecoding, seed: int) -> Row | Result:
    """Return the row in a line, or a result with the error that keeps it from being continued."""
    kept: dict[str, Any] = {}
    try:
        values = _read_object(line)
        kept = _read_id(values)
        for name in values:
            if name not in OWN_KEYS and name not in SamplingParams.__dataclass_fields__:
                raise UserError(
                    f"{name}: is no decoding parameter, and none of {', '.join(OWN_KEYS)}; id keeps what you join by"
                )
        prompt = values.get("prompt")
        if not isinstance(prompt, str):
            found = f"got {prompt!r:.40}" if "prompt" in values else "the row has none"
            raise UserError(f"prompt: expected a text to continue, {found}; '' starts from nothing")
        preset = values.get("preset")
        if preset is not None and not isinstance(preset, str):
            raise UserError(f"preset: expected a name, got {preset!r:.40}")
        defaults = replace(decoding.preset(preset), seed=row_seed(seed, number))
        own = {name: value for name, value in values.items() if name not in OWN_KEYS}
        return Row(number, kept, prompt, merge_decoding(defaults, own) if own else defaults)
    except UserError as error:
        return Result(number, {**kept, "error": str(error)})


def _read_object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig").rstrip(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"expected an object with a prompt, got {values!r:.40}")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _read_id(values: Mapping[str, Any]) -> dict[str, Any]:
    if "id" not in values:
        return {}
    value = values["id"]
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise UserError(f"id: expected a text or a whole number, got {value!r:.40}")
    return {"id": value}


@dataclass(eq=False, slots=True)
class _Running:
    """A row that is being continued."""

    row: Row
    choices: list[Choice]
    """Those that have not ended."""
    pieces: list[list[Piece]]
    """What each continuation has gained."""

    def advance(self, generator: TextGenerator) -> Result | None:
        """Take what the last step has drawn; return the result if that was the last of it."""
        for choice in list(self.choices):
            for piece in choice.sift(choice.take()):
                if piece.error is not None:
                    self.cancel(generator)
                    return Result(self.row.number, {**self.row.kept, "error": _describe(piece.error)})
                self.pieces[piece.index].append(piece)
            if choice.finish_reason is not None:
                # A stop text ends the text, but not yet the request that draws it.
                generator.engine.scheduler.cancel(choice.request)
                self.choices.remove(choice)
        return None if self.choices else self._result()

    def cancel(self, generator: TextGenerator) -> None:
        for choice in self.choices:
            generator.engine.scheduler.cancel(choice.request)

    def _result(self) -> Result:
        row, whole = self.row, [join_pieces(pieces) for pieces in self.pieces]
        values: dict[str, list[Any]] = {
            "text": [own.text for own in whole],
            "finish_reason": [own.finish_reason for own in whole],
        }
        if row.params.logprobs is not None:
            values["logprobs"] = [report_logprobs(own.tokens) for own in whole]
        shown = values if row.params.n > 1 else {name: value for name, (value,) in values.items()}
        tokens = sum(own.token_count for own in whole)
        return Result(row.number, {**row.kept, "prompt": row.prompt, **shown}, tokens)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _begin(generator: TextGenerator, row: Row) -> _Running | Result:
    """Queue the continuations of a row; return a result with the error if it does not fit."""
    try:
        choices = generator.begin([Asked(prompt_ids(generator.tokenizer, row.prompt), row.prompt, row.params)])
    except UserError as error:
        return Result(row.number, {**row.kept, "error": str(error)})
    return _Running(row, choices, [[] for _ in range(row.params.n)])


def complete_rows(generator: TextGenerator, rows: Iterator[Row | Result]) -> Iterator[tuple[Result, bytes]]:
    """Continue rows, and yield the result of each and its line, in their order.

    A row begins as soon as a slot may be free for it. What is drawn for it depends on other rows only through rounding.
    Only the rows in the slots, those that are next, and the results that wait for an earlier row are in memory.
    """
    scheduler, slots = generator.engine.scheduler, generator.engine.session.slots
    running: list[_Running] = []
    order: deque[int] = deque()
    """The rows that were read and not yet returned."""
    waiting: dict[int, tuple[Result, bytes]] = {}
    waiting_bytes = 0

    def keep(result: Result) -> int:
        waiting[result.number] = result, result.line()
        return len(waiting[result.number][1])

    try:
        while True:
            # As many wait as may get a slot in the next step.
            while scheduler.waiting < slots and waiting_bytes < WAITING_BYTES:
                row = next(rows, None)
                if row is None:
                    break
                order.append(row.number)
                begun = _begin(generator, row) if isinstance(row, Row) else row
                if isinstance(begun, Result):
                    waiting_bytes += keep(begun)
                else:
                    running.append(begun)
            if not order:
                return
            if running:
                # No caller waits for a first token: each prompt is read as soon as it has a slot.
                scheduler.step(prefill_tokens=math.inf)
            for own in list(running):
                result = own.advance(generator)
                if result is not None:
                    running.remove(own)
                    waiting_bytes += keep(result)
            while order and order[0] in waiting:
                result, line = waiting.pop(order.popleft())
                waiting_bytes -= len(line)
                yield result, line
    finally:
        for own in running:
            own.cancel(generator)


@dataclass
class Tally:
    """What an output file holds."""

    rows: int = 0
    last: int = 0
    """The number of the last row."""
    tokens: int = 0
    bad_rows: int = 0
    first_bad: list[int] = field(default_factory=list)

    def add(self, number: int, *, is_bad: bool, tokens: int = 0) -> None:
        self.rows += 1
        self.last = number
        self.tokens += tokens
        if is_bad:
            self.bad_rows += 1
            if len(self.first_bad) < SHOWN_ROWS:
                self.first_bad.append(number)


@dataclass(frozen=True, slots=True)
class ManyPrompts:
    """A file of prompts, and how it is continued."""

    prompts: Path
    out: Path
    engine: Path
    decoding: ModelDecoding
    """The defaults of rows: see `decoding_of_rows`."""
    seed: int | None = None
    """The number from which, and from its own, a row without a seed has one; None takes that of the interrupted run, or
    a fresh one."""
    precision: str = "auto"
    provider: str = "auto"
    threads: int | None = None
    slots: int = SLOTS

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + PARTIAL_SUFFIX)

    @property
    def meta(self) -> Path:
        return self.out.with_name(self.out.name + META_SUFFIX)


def generate_many(many: ManyPrompts) -> str:
    """Continue every prompt, or those that an interrupted run has left; return a line about it.

    Raises `UserError`: before anything is loaded, if the output cannot be written, or holds rows that were made
    otherwise; after the last row, if some could not be continued.
    """
    read_manifest(many.engine)
    if not many.prompts.is_file():
        raise UserError(f"{many.prompts}: is not a file; --prompts names one with a JSON object per line")
    if many.out.exists() and (not many.out.is_file() or many.out.samefile(many.prompts)):
        found = "the file of prompts" if many.out.is_file() else "not a file"
        raise UserError(f"{many.out}: is {found}; name another --out")
    with only_writer(many.out, LOCK_WAIT_S):
        try:
            tally, text = _finish(many)
        finally:
            # Windows does not remove a file that is open.
            with suppress(PermissionError):
                many.out.with_name(many.out.name + LOCK_SUFFIX).unlink()
    if tally.bad_rows:
        rest = tally.bad_rows - len(tally.first_bad)
        numbers = ", ".join(map(str, tally.first_bad)) + (f" and {rest:,} more" if rest else "")
        raise UserError(
            f"{many.prompts}: {tally.bad_rows:,} of {tally.rows:,} rows could not be continued: {numbers}; {many.out} "
            "has the error of each, and the texts of the others"
        )
    return text


def _finish(many: ManyPrompts) -> tuple[Tally, str]:
    """Write what is missing of the output; return what it holds, and a line about it."""
    digest, rows = _digest_rows(many.prompts)
    made = {
        "prompts_sha256": digest,
        "engine_sha256": sha256_file(many.engine / MANIFEST_FILE),
        # What "auto" is shows when the engine is loaded; until then, and without a seed, any will do.
        "provider": None if many.provider == "auto" else many.provider,
        "precision": None if many.precision == "auto" else many.precision,
        "seed": many.seed,
        "decoding": _as_json(many.decoding.default),
        "presets": {name: _as_json(params) for name, params in many.decoding.presets.items()},
    }
    if many.out.exists():
        _check_same(many.out, many.meta, made)
        tally, _ = _read_tally(many.out)
        return tally, f"{many.out}: is complete; nothing to do"
    tally, whole_bytes = Tally(), 0
    if many.partial.exists() and many.partial.stat().st_size > 0:
        made["seed"] = _check_same(many.partial, many.meta, made)["seed"]
        tally, whole_bytes = _read_tally(many.partial)
    try:
        # Before the model is loaded, which may take long: what cannot be written must show now.
        with many.partial.open("ab") as file:
            file.truncate(whole_bytes)
            text = _append(many, made, file, tally, rows)
            os.fsync(file.fileno())
        many.partial.replace(many.out)
    except OSError as error:
        # The operating system does not name the file that a full disk cuts off.
        error.filename = error.filename or str(many.partial)
        raise
    finally:
        if many.partial.exists() and many.partial.stat().st_size == 0:
            many.partial.unlink()
    return tally, text


def _append(many: ManyPrompts, made: Mapping[str, Any], file: BinaryIO, tally: Tally, rows: int) -> str:
    """Load the engine, append the rows that `tally` lacks, and return a line about it."""
    generator = TextGenerator.load(
        many.engine, precision=many.precision, provider=many.provider, threads=many.threads, slots=many.slots
    )
    session = generator.engine.session
    seed = secrets.randbits(63) if made["seed"] is None else made["seed"]
    made = {**made, "provider": session.provider, "precision": session.precision, "seed": seed}
    if tally.rows:
        # This machine may take "auto" for something else than the one that began.
        _check_same(many.partial, many.meta, made)
        print(f"{many.partial}: going on after {tally.rows:,} rows", file=sys.stderr)
    else:
        write_json(many.meta, made)
    done, began_s = tally.rows, time.perf_counter()
    with (
        many.prompts.open("rb") as lines,
        _ended_by_signals(tally),
        progress(total=rows, initial=done, description=many.out.name, unit="row") as bar,
    ):
        append_rows(generator, read_rows(lines, tally.last, many.decoding, seed), file, tally, bar)
    seconds = time.perf_counter() - began_s
    return (
        f"{many.out}: {tally.rows:,} rows, {tally.rows - done:,} of them now, with {tally.tokens:,} tokens in "
        f"{seconds:,.1f} s ({tally.tokens / seconds:,.0f} tokens/s)"
    )


def append_rows(
    generator: TextGenerator, rows: Iterator[Row | Result], file: BinaryIO, tally: Tally, bar: "tqdm[Any]"
) -> None:
    """Append the result of each row to a file, count it in `tally`, and show how far that is."""
    began_s = time.perf_counter()
    for result, line in complete_rows(generator, rows):
        file.write(line)
        # A kill loses at most a line.
        file.flush()
        tally.add(result.number, is_bad=result.is_bad, tokens=result.tokens)
        bar.set_postfix_str(f"{tally.tokens / (time.perf_counter() - began_s):,.0f} tokens/s", refresh=False)
        bar.update()


def _check_same(file: Path, meta: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the rows in a file were made. Raises `UserError` if that is not how they would be made now."""
    if not meta.is_file():
        raise UserError(
            f"{file}: exists, but not {meta}, which would say how its rows were made; remove it, or name another --out"
        )
    try:
        recorded = read_json(meta)
    except ValueError as error:
        raise UserError(f"{meta}: not JSON: {error}; remove it and {file}") from error
    if not isinstance(recorded, dict) or recorded.keys() != made.keys():
        raise UserError(f"{meta}: does not say how the rows of {file} were made; remove both")
    if differences := list(_find_differences(recorded, made)):
        raise UserError(
            f"{file}: its rows were made with {', '.join(differences)}; ask for the same, remove the file, or name "
            "another --out"
        )
    return recorded


def _as_json(params: SamplingParams) -> dict[str, Any]:
    """Return parameters as they are read from JSON, without a seed: rows have their own."""
    values: dict[str, Any] = json.loads(json.dumps(replace(params, seed=None).to_mapping()))
    return values


def _digest_rows(prompts: Path) -> tuple[str, int]:
    """Return the SHA-256 of a file, and the number of its lines that are not white space."""
    digest, rows = hashlib.sha256(), 0
    with prompts.open("rb") as lines:
        for line in lines:
            digest.update(line)
            rows += bool(line.strip())
    return digest.hexdigest(), rows


def _find_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words what differs; None differs from nothing."""
    for name, words in (("prompts_sha256", "other prompts"), ("engine_sha256", "another engine")):
        if recorded[name] != now[name]:
            yield words
    for name in ("provider", "precision", "seed"):
        if now[name] not in (None, recorded[name]):
            yield f"{name} {recorded[name]}, not {now[name]}"
    before, after, neutral = recorded["decoding"], now["decoding"], SamplingParams()
    for name in sorted(before.keys() | after.keys()):
        own, other = (values.get(name, getattr(neutral, name, None)) for values in (before, after))
        if own != other:
            yield f"{name} {own}, not {other}"
    if recorded["presets"] != now["presets"]:
        yield "other presets"


def _read_tally(file: Path) -> tuple[Tally, int]:
    """Return what an output file holds, and the bytes of its whole rows: a kill may cut off the last one.

    Raises `UserError` if another line is not a row.
    """
    tally, whole_bytes = Tally(), 0
    with file.open("rb") as lines:
        for line in lines:
            row = _whole_row(line)
            if row is None:
                if lines.read(1):
                    raise UserError(f"{file}: line {tally.rows + 1} is not a row that this command wrote; remove it")
                break
            tally.add(row["row"], is_bad="error" in row)
            whole_bytes += len(line)
    return tally, whole_bytes


def _whole_row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line of an output file; None if it is not whole."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("row"), int)
    return row if is_row else None


@contextmanager
def _ended_by_signals(tally: Tally) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block at once, and say how to go on; the exit code is that of a shell."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit:
        print(f"stopped after {tally.rows:,} rows; the same command goes on from there", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
