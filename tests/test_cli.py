"""The commands: what they print, and one line for each error."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest
from isolated_store import isolated_store
from unused_model import log_unused_model

import pipeline
from pipeline.__main__ import main
from pipeline.decoding import SamplingParams
from pipeline.files import read_jsonl, write_json, write_jsonl
from pipeline.many_prompts import row_seed
from pipeline.params.section import PARAMS_FILE
from pipeline.quality.lexicon import load_lexicon
from pipeline.tokens import load_tokenizer, tokenizer_sha256, write_tokens
from pipeline.tracking import registry, runs, store

ROOT = Path(pipeline.__file__).parents[1]
PROMPT = "The lamp"
NAME = "harbour-tales"
PRESETS = {
    "balanced": SamplingParams(temperature=0.9, min_p=0.02, max_new_tokens=14, seed=6),
    "faithful": SamplingParams(temperature=0.0, max_new_tokens=10),
    "adventurous": SamplingParams(temperature=1.3, typical_p=0.95, max_new_tokens=16, seed=7),
}
NEUTRAL = ("--temperature", "1", "--top-k", "0", "--top-p", "1", "--repetition-penalty", "1")
"""Turns off what evaluate.decoding sets."""


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> Iterator[None]:
    """A folder with the committed parameters and an empty store."""
    shutil.copy(ROOT / PARAMS_FILE, tmp_path)
    with isolated_store(tmp_path):
        yield


@pytest.fixture
def engine(tiny_engine_folder: Path) -> str:
    return str(tiny_engine_folder)


@pytest.fixture
def champion(tiny_engine_folder: Path, tmp_path: Path) -> str:
    """A registered model that by default draws three tokens; its code is not what a command runs."""
    write_decoding(tmp_path / "registered")
    return register_champion(tiny_engine_folder, tmp_path, "decoding", "presets")


@pytest.fixture
def old_champion(tiny_engine_folder: Path, tmp_path: Path) -> str:
    """The same as it was registered before there were presets."""
    write_decoding(tmp_path / "registered")
    return register_champion(tiny_engine_folder, tmp_path, "decoding")


def write_decoding(folder: Path) -> None:
    """Decoding and presets as evaluate writes them."""
    write_json(folder / "decoding.json", SamplingParams(max_new_tokens=3, seed=5).to_mapping())
    write_json(folder / "presets.json", {name: preset.to_mapping() for name, preset in PRESETS.items()})


def register_champion(engine: Path, tmp_path: Path, *names: str) -> str:
    client = store.connect()
    artifacts = {"engine": str(engine), **{name: str(tmp_path / "registered" / f"{name}.json") for name in names}}
    with runs.start_run("register", {}) as run:
        uri = log_unused_model(run.run_id, tmp_path, artifacts)
    version = mlflow.register_model(uri, NAME)
    client.set_registered_model_alias(NAME, "champion", version.version)
    return f"models:/{NAME}@champion"


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `generate` writes for the prompt."""
    capsys.readouterr()
    main(["generate", PROMPT, "--provider", "cpu", *arguments])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command that cannot run ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_a_command_of_its_own_streams_prompt_and_text(engine: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "generate", PROMPT, "--model", engine, "--seed", "7"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    done = subprocess.run(
        [*command, "--max-new-tokens", "8"], cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT.encode())
    assert len(done.stdout) > len(PROMPT) + 1
    assert done.stdout.endswith(b"\n")


def test_text_is_written_as_it_is_drawn(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        """Keeps what stood there at each flush."""

        def __init__(self) -> None:
            super().__init__()
            self.shown: list[str] = []

        def flush(self) -> None:
            self.shown.append(self.getvalue())

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    main(["generate", PROMPT, "--model", engine, "--provider", "cpu", "--seed", "7", "--max-new-tokens", "16"])
    assert terminal.shown[0] == PROMPT
    assert len(set(terminal.shown)) > 8
    assert all(later.startswith(earlier) for earlier, later in pairwise(terminal.shown))


def test_the_same_seed_gives_the_same_text(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", engine, "--max-new-tokens", "16", "--seed")
    text = generated(capsys, *options, "7")
    assert generated(capsys, *options, "7") == text
    assert generated(capsys, *options, "8") != text


def test_what_is_not_set_comes_from_the_parameters(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = (tmp_path / PARAMS_FILE).read_text()
    (tmp_path / PARAMS_FILE).write_text(committed.replace("    max_new_tokens: 400", "    max_new_tokens: 5"))
    assert committed != (tmp_path / PARAMS_FILE).read_text()
    options = ("--model", engine, "--seed", "7")
    text = generated(capsys, *options)
    assert text == generated(capsys, *options, "--max-new-tokens", "5")
    assert text != generated(capsys, *options, "--max-new-tokens", "6")
    assert text != generated(capsys, *options, "--temperature", "100", "--top-k", "0", "--top-p", "1")


def test_an_engine_of_the_last_export_is_the_default(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(engine, tmp_path / "out" / "export" / "engine")
    options = ("--max-new-tokens", "8", "--seed", "7")
    assert generated(capsys, *options) == generated(capsys, "--model", engine, *options)


def test_lists_and_biases_are_options(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ("--model", engine, "--seed", "7", "--max-new-tokens", "4", "--temperature", "0", "--ignore-eos")
    only = ("--allowed-token-ids", "65", "--repetition-penalty", "1")
    text = generated(capsys, *plain, *only).removeprefix(PROMPT).rstrip("\n")
    assert len(text) == 4
    assert len(set(text)) == 1
    assert generated(capsys, *plain, "--logit-bias", "65=100", "66=-1.5", "--repetition-penalty", "1") == (
        f"{PROMPT}{text}\n"
    )
    assert generated(capsys, *plain, *only, "--stop", text[0]) == f"{PROMPT}\n"


def test_a_loop_ends_the_text(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", engine, "--max-new-tokens", "20", "--logit-bias", "65=100", "--repetition-penalty", "1")
    text = generated(capsys, *options, "--repetition-detection", "4", "3").removeprefix(PROMPT)
    assert (len(text), len(set(text))) == (4, 2)  # three times the same, and the end of the line


def test_a_registered_model_brings_its_own_decoding(
    engine: str, champion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generated(capsys, "--model", champion)
    assert text == generated(capsys, "--model", engine, *NEUTRAL, "--max-new-tokens", "3", "--seed", "5")
    assert len(generated(capsys, "--model", champion, "--max-new-tokens", "20")) > len(text)


def test_a_registered_model_brings_presets(engine: str, champion: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(capsys, "--model", champion, "--preset", "faithful")
    faithful = ("--temperature", "0", "--max-new-tokens", "10")
    assert text == generated(capsys, "--model", engine, *NEUTRAL, *faithful)
    text = generated(capsys, "--model", champion, "--preset", "adventurous", "--temperature", "0.5", "--seed", "9")
    changed = ("--temperature", "0.5", "--typical-p", "0.95", "--max-new-tokens", "16", "--seed", "9")
    assert text == generated(capsys, "--model", engine, *NEUTRAL, *changed)
    message = refused(capsys, "generate", PROMPT, "--model", champion, "--preset", "x")
    assert message == "error: preset: 'x' is none of balanced, faithful, adventurous\n"


def test_a_model_from_before_there_were_presets_has_none(
    engine: str, old_champion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--max-new-tokens", "3", "--seed", "5")
    assert generated(capsys, "--model", old_champion) == generated(capsys, "--model", engine, *NEUTRAL, *own)
    message = refused(capsys, "generate", PROMPT, "--model", old_champion, "--preset", "faithful")
    assert message == "error: preset: this model has no presets, got 'faithful'; leave it out\n"


def test_the_latest_export_is_decoded_as_it_was_evaluated(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(engine, tmp_path / "out" / "export" / "engine")
    before = refused(capsys, "generate", PROMPT, "--preset", "faithful")
    write_decoding(tmp_path / "out" / "evaluate")
    own = ("--max-new-tokens", "3", "--seed", "5")
    assert generated(capsys) == generated(capsys, "--model", engine, *NEUTRAL, *own)
    faithful = ("--temperature", "0", "--max-new-tokens", "10")
    assert generated(capsys, "--preset", "faithful") == generated(capsys, "--model", engine, *NEUTRAL, *faithful)
    # A folder by name may be any engine, of which evaluate has said nothing.
    named = refused(capsys, "generate", PROMPT, "--model", "out/export/engine", "--preset", "faithful")
    assert before == named == "error: preset: this model has no presets, got 'faithful'; leave it out\n"


def test_a_registered_model_needs_no_parameters_file(
    champion: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / PARAMS_FILE).unlink()
    assert generated(capsys, "--model", champion).startswith(PROMPT)


def test_many_prompts_are_continued_with_the_decoding_of_the_model(
    champion: str, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": PROMPT}, {"prompt": PROMPT, "preset": "faithful", "id": "f"}])
    many = ("generate", "--prompts", "prompts.jsonl", "--out", "new/texts.jsonl", "--provider", "cpu", "--threads", "1")
    main([*many, "--model", champion, "--top-k", "9"])
    printed = capsys.readouterr().out
    assert printed.startswith("new/texts.jsonl: 2 rows, 2 of them now, with ")
    first, second = read_jsonl(tmp_path / "new" / "texts.jsonl")
    neutral = ("--model", engine, *NEUTRAL, "--top-k", "9", "--max-new-tokens")
    # The seed of the model's decoding is 5.
    assert generated(capsys, *neutral, "3", "--seed", str(row_seed(5, 1))) == f"{PROMPT}{first['text']}\n"
    assert generated(capsys, *neutral, "10", "--temperature", "0") == f"{PROMPT}{second['text']}\n"
    assert (first.keys(), second["id"]) == ({"row", "prompt", "text", "finish_reason"}, "f")
    refusal = refused(capsys, *many, "--model", champion)
    assert refusal.startswith("error: new/texts.jsonl: its rows were made with top_k 9, not 0, other presets; ask for")
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    bad = refused(capsys, *many[:3], "--out", "bad.jsonl", "--provider", "cpu", "--model", champion)
    assert bad.endswith("error: prompts.jsonl: 1 of 1 rows could not be continued: 1; bad.jsonl has the error of each, "
                        "and the texts of the others\n")  # fmt: skip


def test_generate_takes_one_prompt_or_a_file_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    message = "error: prompt: give a text to continue, or --prompts FILE with --out FILE, and not both\n"
    assert refused(capsys, "generate") == message
    assert refused(capsys, "generate", PROMPT, "--prompts", "a", "--out", "b") == message
    message = "error: --out: names the file to write for --prompts; give both or neither\n"
    assert refused(capsys, "generate", "--prompts", "a") == message
    assert refused(capsys, "generate", PROMPT, "--out", "b") == message


@pytest.mark.parametrize("model", ["models:/nobody@champion", "models:/nobody/1", "models:nobody", "models:/"])
def test_an_unknown_model_is_reported(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "generate", PROMPT, "--model", model)
    assert message.startswith(f"error: {model}: the registry does not hold it (")


def test_a_folder_without_engine_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "generate", PROMPT, "--model", "nowhere").startswith("error: nowhere: holds no engine")


def test_without_an_export_it_says_how_to_make_one(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "generate", PROMPT)
    assert message.startswith("error: out/export/engine: holds no engine")
    assert "`dvc repro export` makes one" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-p", "1.5"), "top_p: 1.5 is out of range, must be in (0, 1]"),
        (("--temperature", "nan"), "temperature: expected a finite number, got nan"),
        (("--repetition-detection", "20"), "repetition_detection: expected the longest run and its repetitions"),
        (("--max-new-tokens", "0"), "max_new_tokens: 0 is out of range, must be at least 1"),
        (("--banned-token-ids", "-1"), "banned_token_ids: -1 is out of range"),
        (("--logit-bias", "5=101"), "logit_bias: 101.0 is out of range, must be in [-100, 100]"),
        (("--precision", "int3"), "precision: "),
        (("--provider", "tpu"), "provider: 'tpu' is none of auto, cpu, cuda"),
    ],
)
def test_a_wrong_option_is_reported_by_name(
    options: tuple[str, ...], message: str, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, "generate", PROMPT, "--model", engine, *options).startswith(f"error: {message}")


def test_an_option_is_not_taken_for_another_that_begins_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", PROMPT, "--n", "4"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --n 4" in capsys.readouterr().err


def test_a_bias_that_is_none_is_reported(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", PROMPT, "--model", engine, "--logit-bias", "five"])
    assert caught.value.code == 2
    assert "--logit-bias: expected ID=BIAS, got 'five'" in capsys.readouterr().err


def test_export_makes_an_engine_that_generate_reads(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(tiny_checkpoint), str(tmp_path / "engine"), "--precision", "int8,int4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"{tmp_path / 'engine' / name}" for name in ("int8", "int4")]
    options = ("--model", str(tmp_path / "engine"), "--max-new-tokens", "8", "--seed", "7")
    assert generated(capsys, *options).startswith(PROMPT)
    assert generated(capsys, *options, "--precision", "int4").startswith(PROMPT)


def test_export_takes_the_training_text_along(
    tiny_checkpoint: Path, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    tokenizer, digest = load_tokenizer(tiny_checkpoint), tokenizer_sha256(tiny_checkpoint)
    options = ("--max-new-tokens", "8", "--logit-bias", "65=100", "--repetition-penalty", "1", "--seed", "7")
    copied = generated(capsys, "--model", engine, *options).removeprefix(PROMPT).rstrip("\n")
    assert (len(copied), len(set(copied))) == (8, 1)
    write_tokens(tmp_path / "train", [copied], tokenizer, digest)
    out = str(tmp_path / "engine")
    main(["export", str(tiny_checkpoint), out, "--verbatim-index", str(tmp_path / "train")])
    assert generated(capsys, "--model", out, *options) == f"{PROMPT}{copied}\n"
    limited = generated(capsys, "--model", out, *options, "--max-verbatim-tokens", "2").removeprefix(PROMPT)
    assert limited.startswith(copied[:2])
    assert copied[:3] not in limited
    message = refused(capsys, "generate", PROMPT, "--model", engine, "--max-verbatim-tokens", "2")
    assert message.startswith("error: max_verbatim_tokens: this engine holds no index of its training text; export it")
    missing = refused(capsys, "export", str(tiny_checkpoint), out, "--verbatim-index", str(tmp_path))
    assert missing.startswith(f"error: {tmp_path}: holds no token arrays")


@pytest.fixture
def split(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Some text as the tokenize stage writes it."""
    folder = tmp_path / "split"
    folder.mkdir()
    tokenizer, digest = load_tokenizer(tiny_checkpoint), tokenizer_sha256(tiny_checkpoint)
    write_tokens(folder, ["The lamp went out. " * 30, "They say", ""], tokenizer, digest)
    return folder


@pytest.mark.parametrize("precision", [None, "f16", "q8_0", "q4_0"])
def test_export_makes_a_gguf_file_and_says_how_close_it_is(
    precision: str | None,
    split: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "tiny.gguf"
    chosen = () if precision is None else ("--precision", precision)
    main(["export", str(tiny_checkpoint), str(file), "--format", "gguf", *chosen, "--compare", str(split)])
    size, closeness = capsys.readouterr().out.splitlines()
    assert size.startswith(f"{file}: ")
    assert closeness.startswith(f"{precision or 'f32'}: the next token agrees with PyTorch's at ")
    assert file.read_bytes().startswith(b"GGUF")
    if precision is None:
        assert "100.000% of" in closeness
        assert "KL divergence 0 nats" in closeness


def test_export_says_how_close_an_engine_is(
    split: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engine"
    main(["export", str(tiny_checkpoint), str(out), "--precision", "float32,int4", "--compare", str(split)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"{out / 'float32'}", f"{out / 'int4'}", "float32", "int4"]
    assert "100.000% of" in lines[2]
    assert "100.000% of" not in lines[3]


def test_export_refuses_what_does_not_belong_to_the_format(
    split: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("export", str(tiny_checkpoint), str(tmp_path / "tiny.gguf"))
    for options, message in (
        ((), f"{tmp_path / 'tiny.gguf'}: is the name of a GGUF file; add --format gguf, or name a folder"),
        (("--format", "gguf", "--cache-bits", "8"), "--cache-bits: belongs to an engine; leave it out with --format"),
        (("--format", "gguf", "--verbatim-index", str(split)), "--verbatim-index: belongs to an engine; leave it out"),
        (("--format", "gguf", "--precision", "float32"), "precision: 'float32' is none of f32, f16, q8_0, q4_0"),
        (("--format", "gguf", "--compare", str(tmp_path)), f"{tmp_path}: holds no token arrays"),
    ):
        assert refused(capsys, *command, *options).startswith(f"error: {message}")
    named = refused(capsys, "export", str(tiny_checkpoint), str(tmp_path / "tiny"), "--format", "gguf")
    assert named == f"error: {tmp_path / 'tiny'}: must be a file whose name ends in .gguf\n"
    assert not list(tmp_path.glob("tiny*"))


def test_pack_writes_a_base(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pack", str(tiny_checkpoint), str(tmp_path / "base")])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'base' / 'model.safetensors'}: 0.")
    assert (tmp_path / "base" / "tokenizer.json").is_file()
    assert load_lexicon(tmp_path / "base") == frozenset()


def test_pack_writes_the_words_that_come_twice(tiny_checkpoint: Path, tmp_path: Path) -> None:
    documents = tmp_path / "train.jsonl"
    write_jsonl(documents, [{"text": "The lamp was lit."}, {"text": "The LAMP went out."}])
    main(["pack", str(tiny_checkpoint), str(tmp_path / "base"), "--words-of", str(documents)])
    assert load_lexicon(tmp_path / "base") == {"the", "lamp"}
    # A base that is packed again keeps its words.
    main(["pack", str(tmp_path / "base"), str(tmp_path / "again")])
    assert load_lexicon(tmp_path / "again") == {"the", "lamp"}


def test_export_names_what_is_wrong(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "engine")
    assert refused(capsys, "export", str(tiny_checkpoint), out, "--precision", "int3").startswith(
        "error: precision: 'int3' is none of float32, float16, int8, int4, int8_float16"
    )
    missing = refused(capsys, "export", str(tmp_path), out)
    assert missing.startswith(f"error: {tmp_path}: holds no config.json; a checkpoint is a GPT-2 as save_pretrained")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert refused(capsys, "export", str(tmp_path), out).startswith(f"error: {tmp_path}: is a llama model; ")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert refused(capsys, "export", str(tmp_path), out).startswith(f"error: {tmp_path}: holds no model.safetensors")
    assert not Path(out).exists()


def test_no_store_is_made_where_a_registered_model_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.delenv("DVC_ROOT")
    message = refused(capsys, "generate", PROMPT, "--model", "models:/nobody@champion")
    assert message.startswith(f"error: {tmp_path / 'empty' / 'mlflow.db'}: there is no tracking store here; go to")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_reader_that_goes_away_ends_it_in_silence(engine: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "generate", PROMPT, "--model", engine, "--provider", "cpu"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 2


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.__main__._engine_and_decoding", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(["generate", PROMPT])
    assert (caught.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_every_parameter_of_one_continuation_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = capsys.readouterr().out
    names = set(SamplingParams.__dataclass_fields__) - {"n", "logprobs"}
    assert {name for name in names if f"--{name.replace('_', '-')} " not in shown.replace("]", " ")} == set()


def test_a_section_that_no_stage_owns_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / PARAMS_FILE).open("a") as file:
        file.write("tokenise: {}\n")
    assert refused(capsys, "restore") == "error: params.yaml: tokenise: no such parameter\n"


def test_the_ui_shows_the_store_that_is_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, list[str], str]] = []

    def execv(program: Path, arguments: list[str]) -> None:
        ran.append((str(program), arguments[1:], os.environ["MLFLOW_BACKEND_STORE_URI"]))

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "")
    main(["ui", "--port", "5050"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    main(["ui"])
    assert [(arguments, uri) for _, arguments, uri in ran] == [
        (["ui", "--port", "5050"], f"sqlite:///{tmp_path}/mlflow.db"),
        (["ui", "--port", "5000"], f"sqlite:///{tmp_path}/other.db"),
    ]
    assert (tmp_path / "other.db").exists()
    assert Path(ran[0][0]).is_file()


def test_restore_without_outputs_says_what_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "restore") == "error: out/register/version.json: is missing; run `dvc repro` first\n"


def test_promote_moves_the_alias_to_the_version_of_the_tree(
    tiny_engine_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, "promote") == "error: out/register/version.json: is missing; run `dvc repro` first\n"
    write_json(tmp_path / "out" / "register" / "version.json", {"name": NAME, "fingerprint": "f"})
    assert refused(capsys, "promote").startswith(f"error: {NAME}: the registry does not hold this version; run python ")
    write_decoding(tmp_path / "registered")
    for _ in range(2):
        register_champion(tiny_engine_folder, tmp_path, "decoding")
    client = store.connect()
    client.set_model_version_tag(NAME, "1", registry.FINGERPRINT_TAG, "f")
    capsys.readouterr()
    main(["promote"])
    assert capsys.readouterr().out == f"{NAME} version 1 is champion\n"
    assert int(client.get_model_version_by_alias(NAME, "champion").version) == 1


def test_restore_with_outputs_half_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "out" / "register" / "version.json", {"name": NAME, "fingerprint": "f"})
    assert refused(capsys, "restore").startswith("error: out/finetune/loss_train.csv: No such file")
