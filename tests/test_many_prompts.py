"""Files of prompts: what is written of each row, and that no kill, no change and no bad row spoils it."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gpt2 import TINY_LEXICON
from tokenizers import Tokenizer

from pipeline import many_prompts
from pipeline.decoding import ModelDecoding, SamplingParams, merge_decoding
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError, report_errors
from pipeline.files import read_json, read_jsonl, write_json
from pipeline.many_prompts import (
    ManyPrompts,
    Row,
    complete_rows,
    decoding_of_rows,
    generate_many,
    read_row,
    row_seed,
)

DECODING = ModelDecoding(
    SamplingParams(temperature=0.9, max_new_tokens=12),
    {"faithful": SamplingParams(temperature=0.0, max_new_tokens=6), "short": SamplingParams(max_new_tokens=2)},
)
PATIENCE_S = 60
PROMPTS = ("The lamp", "", "They say the tide", "The lamp", "Nobody on the rock had seen the lamp")


@pytest.fixture
def generator(tiny_engine: Engine, tiny_tokenizer: Tokenizer) -> TextGenerator:
    return TextGenerator(tiny_engine, tiny_tokenizer, TINY_LEXICON)


@pytest.fixture
def many(tiny_engine_folder: Path, tmp_path: Path) -> ManyPrompts:
    """Forty rows of very different lengths, some with parameters of their own."""
    rows: list[dict[str, Any]] = [{"prompt": PROMPTS[index % len(PROMPTS)]} for index in range(40)]
    rows[0]["max_new_tokens"] = 55
    rows[3] |= {"id": "fourth", "preset": "faithful"}
    rows[5] |= {"seed": 5, "n": 2}
    rows[7] |= {"max_new_tokens": 1}
    rows[20] |= {"id": 21, "temperature": 2.0, "max_new_tokens": 50}
    return asked(tmp_path, tiny_engine_folder, rows)


def asked(folder: Path, engine: Path, rows: list[Any], **others: Any) -> ManyPrompts:
    prompts = folder / "prompts.jsonl"
    prompts.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    options = {"seed": 7, "precision": "float32", "provider": "cpu", "threads": 1, "slots": 4} | others
    return ManyPrompts(prompts, folder / "texts.jsonl", engine, DECODING, **options)


def results(many: ManyPrompts) -> list[dict[str, Any]]:
    generate_many(many)
    return list(read_jsonl(many.out))


def refused(many: ManyPrompts) -> str:
    with pytest.raises(UserError) as caught:
        generate_many(many)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files_of(many: ManyPrompts) -> list[str]:
    return sorted(file.name for file in many.out.parent.iterdir())


def test_each_row_is_continued_as_it_would_be_alone(many: ManyPrompts, generator: TextGenerator) -> None:
    found = results(many)
    assert [row["row"] for row in found] == list(range(1, 41))
    assert [row.get("id") for row in found] == [{3: "fourth", 20: 21}.get(index) for index in range(40)]
    for number, (own, row) in enumerate(zip(read_jsonl(many.prompts), found, strict=True), 1):
        values = {name: value for name, value in own.items() if name not in ("prompt", "id", "preset")}
        defaults = replace(DECODING.preset(own.get("preset")), seed=row_seed(7, number))
        expected = generator.complete([own["prompt"]], [merge_decoding(defaults, values)])
        texts, reasons = [done.text for done in expected], [done.finish_reason for done in expected]
        is_list = own.get("n", 1) > 1
        assert row["prompt"] == own["prompt"]
        assert row["text"] == (texts if is_list else texts[0])
        assert row["finish_reason"] == (reasons if is_list else reasons[0])
    assert files_of(many) == ["prompts.jsonl", "texts.jsonl", "texts.jsonl.meta.json"]


def test_equal_prompts_differ_but_not_from_run_to_run(tiny_engine_folder: Path, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "The lamp"}] * 6 + [{"prompt": "The lamp", "seed": 3}] * 2
    many = asked(tmp_path, tiny_engine_folder, rows)
    texts = [row["text"] for row in results(many)]
    assert len(set(texts)) == 7
    assert texts[6] == texts[7]
    again = [row["text"] for row in results(replace(many, out=tmp_path / "again", slots=3))]
    other = [row["text"] for row in results(replace(many, out=tmp_path / "other", seed=8))]
    assert again == texts
    assert set(other[:6]).isdisjoint(texts[:6])
    assert other[6:] == texts[6:]


def test_the_seed_of_a_row_is_a_documented_hash() -> None:
    assert row_seed(7, 12) == int(hashlib.sha256(b"7 12").hexdigest()[:16], 16) // 2
    assert len({row_seed(seed, number) for seed in range(30) for number in range(30)}) == 900


def test_log_probabilities_and_the_best_of_several_are_written(many: ManyPrompts) -> None:
    many.prompts.write_text('{"prompt": "The", "logprobs": 2}\n{"prompt": "The", "best_of": 3, "n": 2}\n')
    first, second = results(many)
    assert set(first["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(first["logprobs"]["tokens"]).startswith(first["text"][:1])
    assert len(second["text"]) == 2
    assert "logprobs" not in second


BAD = {
    b"{": "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    b'{"prompt": "a", "temperature": NaN}': "not JSON: NaN is no number",
    b'{"prompt": "\xff"}': "not JSON: 'utf-8' codec can't decode byte 0xff in position 12: invalid start byte",
    b"[" * 100_000: "not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
    b'"The lamp"': "expected an object with a prompt, got 'The lamp'",
    b"{}": "prompt: expected a text to continue, the row has none; '' starts from nothing",
    b'{"prompt": ["a"]}': "prompt: expected a text to continue, got ['a']; '' starts from nothing",
    b'{"prompt": "\\ud800"}': "prompt: its character 0 is not valid Unicode; give the text as UTF-8",
    b'{"prompt": "a", "temprature": 1}': "temprature: is no decoding parameter, and none of prompt, id, preset; id "
    "keeps what you join by",
    b'{"prompt": "a", "top_p": 2}': "top_p: 2 is out of range, must be in (0, 1]",
    b'{"prompt": "a", "preset": "x"}': "preset: 'x' is none of faithful, short",
    b'{"prompt": "a", "preset": {}}': "preset: expected a name, got {}",
    b'{"prompt": "a", "id": {}}': "id: expected a text or a whole number, got {}",
    b'{"prompt": "a", "banned_token_ids": [300]}': "banned_token_ids: no token has the id 300",
    json.dumps({"prompt": "lamp " * 64}).encode(): " leave no room in the context of 64; shorten it, or set context_o",
    json.dumps(
        {"prompt": "a", "banned_token_ids": list(range(300)), "ignore_eos": True}
    ).encode(): "leave no token to draw",
}


def test_a_bad_row_ends_nothing_else(tiny_engine_folder: Path, tmp_path: Path) -> None:
    good = [{"prompt": prompt, "id": prompt, "seed": 3} for prompt in PROMPTS]
    (tmp_path / "alone").mkdir()
    alone = results(asked(tmp_path / "alone", tiny_engine_folder, good))
    rows = [*good[:2], *BAD, *good[2:]]
    many = asked(tmp_path, tiny_engine_folder, rows)
    message = refused(many)
    numbers = f"3, 4, 5, 6, 7 and {len(BAD) - 5} more"
    assert message == (
        f"{many.prompts}: {len(BAD)} of {len(rows)} rows could not be continued: {numbers}; {many.out} has the error "
        "of each, and the texts of the others"
    )
    found = list(read_jsonl(many.out))
    assert [row["row"] for row in found] == list(range(1, len(rows) + 1))
    assert [{**row, "row": 0} for row in found if "text" in row] == [{**row, "row": 0} for row in alone]
    for row, error in zip(found[2:-3], BAD.values(), strict=True):
        assert set(row) == {"row", "error"}
        assert error in row["error"]
    # It says so again, and does nothing.
    written = many.out.read_bytes()
    assert refused(many) == message
    assert many.out.read_bytes() == written


def test_a_bad_row_keeps_its_id(many: ManyPrompts) -> None:
    # Half of a surrogate pair is no character, but JSON can hold it.
    many.prompts.write_text('{"id": "\\ud800 é", "prompt": 3}\n')
    refused(many)
    assert many.out.read_bytes().startswith(b'{"row": 1, "id": "\\ud800 \xc3\xa9", "error": ')
    (row,) = read_jsonl(many.out)
    assert row["id"] == "\ud800 é"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
names = st.sampled_from(["prompt", "id", "preset", *SamplingParams.__dataclass_fields__]) | st.text(max_size=3)
lines = st.dictionaries(names, json_values, max_size=4).map(lambda values: json.dumps(values).encode())


@given(line=lines | st.binary(max_size=20) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_row_or_an_error_in_one_line(line: bytes) -> None:
    row = read_row(3, line, DECODING, 7)
    assert row.number == 3
    if isinstance(row, Row):
        values = json.loads(line.decode("utf-8-sig"))
        assert (row.prompt, row.params.seed) == (values["prompt"], values.get("seed") or row.params.seed)
    else:
        written = row.line()
        assert written.count(b"\n") == 1
        assert set(json.loads(written)) - {"id"} == {"row", "error"}


def test_white_space_is_no_row_and_rows_are_named_by_their_lines(tiny_engine_folder: Path, tmp_path: Path) -> None:
    many = asked(tmp_path, tiny_engine_folder, [])
    many.prompts.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    assert [(row["row"], row["prompt"]) for row in results(many)] == [(1, "a"), (4, "b")]
    empty = replace(many, prompts=tmp_path / "empty", out=tmp_path / "none")
    empty.prompts.touch()
    assert results(empty) == []


def test_options_override_presets_of_rows_too() -> None:
    decoding = decoding_of_rows(DECODING, "short", {"temperature": 0.5})
    assert decoding.default == SamplingParams(temperature=0.5, max_new_tokens=2)
    assert decoding.preset("faithful") == SamplingParams(temperature=0.5, max_new_tokens=6)
    row = read_row(1, b'{"prompt": "a", "preset": "faithful", "top_k": 3, "seed": 9}', decoding, 7)
    assert isinstance(row, Row)
    assert row.params == SamplingParams(temperature=0.5, max_new_tokens=6, top_k=3, seed=9)
    with pytest.raises(UserError, match=r"^preset short: min_new_tokens: 5 is out of range"):
        decoding_of_rows(DECODING, None, {"min_new_tokens": 5})


def test_a_long_row_keeps_no_slot_waiting(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = generator.engine.scheduler
    busy: list[int] = []
    step = scheduler.step

    def counted(**options: float) -> None:
        step(**options)
        busy.append(scheduler.running)

    monkeypatch.setattr(scheduler, "step", counted)
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for number in range(1, 200):
            read = number
            tokens = 41 if number == 1 else 3
            params = SamplingParams(max_new_tokens=tokens, ignore_eos=True, seed=number)
            yield Row(number, {}, "The", params)

    done = complete_rows(generator, rows())
    assert next(done)[0].number == 1
    # A prompt is read and continued by two tokens in a step. The others fill seven slots for two steps each.
    assert len(busy) == 40
    assert busy[::2] == [8] * 20
    assert read > 140
    assert [result.number for result, _ in done] == list(range(2, 200))
    assert scheduler.running == scheduler.waiting == 0
    # What waits is bounded: then slots stay free, and the order is the same.
    monkeypatch.setattr(many_prompts, "WAITING_BYTES", 1000)
    done = complete_rows(generator, rows())
    assert next(done)[0].number == 1
    assert read < 50
    assert [result.number for result, _ in done] == list(range(2, 200))


def test_rows_that_are_left_free_their_slots(generator: TextGenerator) -> None:
    short, long = (SamplingParams(max_new_tokens=tokens, ignore_eos=True) for tokens in (3, 30))
    rows = (Row(number, {}, "The", short if number == 1 else long) for number in range(1, 100))
    done = complete_rows(generator, rows)
    next(done)
    assert generator.engine.scheduler.running > 0
    done.close()  # type: ignore[attr-defined]
    assert generator.engine.scheduler.running == generator.engine.scheduler.waiting == 0


def test_the_same_again_does_nothing(many: ManyPrompts, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_many(many)
    written = many.out.read_bytes()
    monkeypatch.setattr(TextGenerator, "load", None)
    assert generate_many(many) == f"{many.out}: is complete; nothing to do"
    assert generate_many(replace(many, seed=None, precision="auto", provider="auto")).endswith("nothing to do")
    assert many.out.read_bytes() == written


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "partial"])
def test_rows_made_otherwise_are_neither_kept_nor_overwritten(
    is_whole: bool, many: ManyPrompts, tiny_engine_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_many(many)
    file = many.out if is_whole else many.out.rename(many.partial)
    written = file.read_bytes()
    monkeypatch.setattr(TextGenerator, "load", None)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a"}\n')
    engine = tmp_path / "engine"
    engine.mkdir()
    manifest = read_json(tiny_engine_folder / "engine.json")
    write_json(engine / "engine.json", {**manifest, "files": {}})
    warmer = ModelDecoding(replace(DECODING.default, temperature=1.5, top_k=4), DECODING.presets)
    presets = ModelDecoding(DECODING.default, {"faithful": SamplingParams()})
    for changed, difference in (
        (replace(many, prompts=other), "other prompts"),
        (replace(many, engine=engine), "another engine"),
        (replace(many, precision="int8"), "precision float32, not int8"),
        (replace(many, seed=8), "seed 7, not 8"),
        (replace(many, decoding=warmer), "temperature 0.9, not 1.5, top_k 0, not 4"),
        (replace(many, decoding=presets), "other presets"),
        (replace(many, prompts=other, seed=8), "other prompts, seed 7, not 8"),
    ):
        assert refused(changed) == (
            f"{file}: its rows were made with {difference}; ask for the same, remove the file, or name another --out"
        )
    write_json(many.meta, [])
    assert refused(many) == f"{many.meta}: does not say how the rows of {file} were made; remove both"
    many.meta.write_text("{")
    assert refused(many).startswith(f"{many.meta}: not JSON: Expecting")
    many.meta.unlink()
    assert refused(many).startswith(f"{file}: exists, but not {many.meta}, which would say how its rows were made; ")
    assert file.read_bytes() == written


def test_what_auto_stands_for_must_be_the_same(many: ManyPrompts) -> None:
    generate_many(many)
    many.out.rename(many.partial)
    write_json(many.meta, {**read_json(many.meta), "precision": "float16", "provider": "cuda"})
    auto = replace(many, precision="auto", provider="auto")
    written = many.partial.read_bytes()
    assert "with provider cuda, not cpu, precision float16, not float32; ask for" in refused(auto)
    assert many.partial.read_bytes() == written


@pytest.fixture(scope="module")
def whole(tiny_engine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ManyPrompts:
    rows = [{"prompt": prompt} for prompt in PROMPTS * 2]
    rows[4] = {"prompt": 3}  # type: ignore[dict-item]
    many = asked(tmp_path_factory.mktemp("whole"), tiny_engine_folder, rows, seed=None)
    refused(many)
    return many


@settings(max_examples=12)
@given(share=st.floats(0, 1))
def test_any_beginning_of_the_output_is_completed(share: float, whole: ManyPrompts) -> None:
    written = whole.out.read_bytes()
    whole.out.unlink()
    whole.partial.write_bytes(written[: int(share * len(written))] or written[:1])
    assert " 1 of 10 rows could not be continued: 5; " in refused(whole)
    assert whole.out.read_bytes() == written
    assert not whole.partial.exists()


def test_a_line_that_no_run_wrote_is_not_cut_off(many: ManyPrompts) -> None:
    generate_many(many)
    first, _, *rest = many.out.read_bytes().splitlines(keepends=True)
    many.out.unlink()
    many.partial.write_bytes(first + b"\0\0\n" + b"".join(rest))
    assert refused(many) == f"{many.partial}: line 2 is not a row that this command wrote; remove it"
    many.partial.write_bytes(first + b"\0\0\0")
    generate_many(many)


def test_what_cannot_be_written_shows_before_the_model_is_loaded(
    many: ManyPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextGenerator, "load", None)
    assert refused(replace(many, out=tmp_path)) == f"{tmp_path}: is not a file; name another --out"
    assert refused(replace(many, out=many.prompts)) == f"{many.prompts}: is the file of prompts; name another --out"
    missing = replace(many, prompts=tmp_path / "no")
    assert refused(missing) == f"{tmp_path / 'no'}: is not a file; --prompts names one with a JSON object per line"
    with pytest.raises(OSError) as caught:  # noqa: PT011
        generate_many(replace(many, out=many.prompts / "texts.jsonl"))
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
    assert refused(replace(many, engine=tmp_path)).startswith(f"{tmp_path}: holds no engine")
    assert files_of(many) == ["prompts.jsonl"]


def test_an_engine_that_does_not_load_leaves_nothing(many: ManyPrompts) -> None:
    assert refused(replace(many, precision="int3")).startswith("precision: ")
    assert files_of(many) == ["prompts.jsonl"]


def test_a_full_disk_loses_no_row(many: ManyPrompts, capsys: pytest.CaptureFixture[str]) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    generate_many(many)
    written = many.out.read_bytes()
    many.out.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) // 2, hard))
    try:
        with pytest.raises(SystemExit), report_errors():
            generate_many(many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == f"error: {many.partial}: File too large\n"
    assert many.partial.stat().st_size == len(written) // 2
    generate_many(many)
    assert many.out.read_bytes() == written


def test_a_second_process_is_kept_out(many: ManyPrompts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_prompts, "LOCK_WAIT_S", 0)
    with FileLock(f"{many.out}.lock"):
        assert refused(many).startswith(f"{many.out}.lock: another process writes to {many.out}; ")


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "file"])
def test_it_shows_how_far_it_is(is_terminal: bool, many: ManyPrompts, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("pipeline.progress.LINE_S", 0)
    text = generate_many(many)
    assert text.startswith(f"{many.out}: 40 rows, 40 of them now, with ")
    if is_terminal:
        assert "texts.jsonl: 100%" in shown.getvalue()
        assert "40/40" in shown.getvalue()
        assert " tokens/s" in shown.getvalue()
    else:
        assert len(shown.getvalue().splitlines()) == 41
        assert "texts.jsonl: 40 of 40 row, " in shown.getvalue()


GENERATE = """
import sys
from pathlib import Path
from pipeline.decoding import ModelDecoding, read_decoding
from pipeline.errors import report_errors
from pipeline.many_prompts import ManyPrompts, generate_many

prompts, out, engine, decoding, presets = map(Path, sys.argv[1:6])
seed = int(sys.argv[6]) if sys.argv[6] else None
with report_errors():
    own = read_decoding(decoding, presets)
    print(generate_many(ManyPrompts(prompts, out, engine, own, seed, "float32", "cpu", 1, 4)))
"""


@pytest.fixture(scope="module")
def long(tiny_engine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ManyPrompts:
    """A run that takes long enough to be stopped in the middle, with its whole output."""
    rows = [{"prompt": PROMPTS[index % len(PROMPTS)], "max_new_tokens": 1 + index * 7 % 50} for index in range(240)]
    many = asked(tmp_path_factory.mktemp("long"), tiny_engine_folder, rows)
    generate_many(many)
    return many


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(long: ManyPrompts, tmp_path: Path) -> None:
    # Without a seed, a run goes on with that of the interrupted one.
    killed = replace(long, out=tmp_path / "texts.jsonl", seed=None)
    files = [tmp_path / "decoding.json", tmp_path / "presets.json"]
    write_json(files[0], DECODING.default.to_mapping())
    write_json(files[1], {name: params.to_mapping() for name, params in DECODING.presets.items()})
    command = [sys.executable, "-c", GENERATE, *map(str, (long.prompts, killed.out, long.engine, *files))]
    rows = 0
    for seed in ("7", "", ""):
        with subprocess.Popen([*command, seed], stderr=subprocess.PIPE, text=True) as process:
            rows = wait_for_rows(killed.partial, rows + 30, process)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not killed.out.exists()
    assert generate_many(killed).startswith(f"{killed.out}: 240 rows, ")
    assert killed.out.read_bytes() == long.out.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="sends no SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_line_on_how_to_go_on(
    number: signal.Signals, long: ManyPrompts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = replace(long, out=tmp_path / "texts.jsonl")

    def stop() -> None:
        wait_for_rows(stopped.partial, 20)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, report_errors():
        generate_many(stopped)
    thread.join()
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    rows = stopped.partial.read_bytes().count(b"\n")
    assert 20 <= rows < 240
    assert capsys.readouterr().err.endswith(f"stopped after {rows} rows; the same command goes on from there\n")
    generate_many(stopped)
    assert stopped.out.read_bytes() == long.out.read_bytes()


GENERATE = """
import sys
from pathlib import Path
from pipeline.decoding import read_decoding
from pipeline.many_prompts import ManyPrompts, generate_many

prompts, out, engine, decoding, presets = map(Path, sys.argv[1:6])
seed = int(sys.argv[6]) if sys.argv[6] else None
generate_many(ManyPrompts(prompts, out, engine, read_decoding(decoding, presets), seed, "float32", "cpu", 1, 4))
"""


def wait_for_rows(partial: Path, rows: int, process: subprocess.Popen[str] | None = None) -> int:
    """Wait until a run has written as many rows; return how many there are."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        found = partial.read_bytes().count(b"\n") if partial.exists() else 0
        if found >= rows:
            return found
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.002)
