"""Stages read from an object store and write to one: the same bytes, and one line for each fault."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pandas
import pytest
import requests
from moto.server import ThreadedMotoServer
from upath import UPath

from pipeline.corpus.preparation import prepare
from pipeline.errors import UserError
from pipeline.object_store import find_folder, find_output, list_files, name_store_in_errors, open_output, upload
from pipeline.params.file import load_section
from pipeline.params.prepare import PrepareParams
from pipeline.stages import prepare as prepare_stage

ROOT = Path(__file__).parents[1]
ACCOUNT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 server with an empty bucket `texts`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    requests.post(f"http://127.0.0.1:{port}/moto-api/reset", timeout=10)  # all servers of a process have one content
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    system = fsspec.filesystem("s3")
    system.mkdir("texts")
    yield system
    server.stop()
    system.clear_instance_cache()


def write_texts(folder: Path) -> Path:
    """Write a file of each kind, a hidden one, and a folder in the folder."""
    folder.mkdir()
    rows = [{"text": f"The lamp of row {row} was lit again, and {row * row} gulls saw it."} for row in range(90)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    pandas.DataFrame(rows[20:60]).to_csv(folder / "rows.csv", index=False)
    pandas.DataFrame(rows[50:]).to_parquet(folder / "rows.parquet")
    (folder / "README.md").write_text("what this is")
    (folder / ".notes.txt").write_text("hidden")
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_bytes("The café of the harbour.\n\nNo ship came in.\n".encode("utf-16"))
    return folder


def put(store: fsspec.AbstractFileSystem, folder: Path, place: str) -> None:
    """Copy files, and mark folders by empty objects, as consoles of stores do."""
    for path in (folder, *folder.rglob("*")):
        key = f"{place}/{path.relative_to(folder).as_posix()}".removesuffix("/.")
        store.pipe(f"{key}/" if path.is_dir() else key, b"" if path.is_dir() else path.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=os.environ | environment, text=True, capture_output=True
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_from_a_store_are_those_of_the_same_files(
    store: fsspec.AbstractFileSystem, tmp_path: Path, workers: int
) -> None:
    data = write_texts(tmp_path / "data")
    put(store, data, "texts/some/data")
    params = load_section("prepare", PrepareParams).model_copy(update={"validation_share": 0.2, "test_share": 0.2})
    report = prepare(find_folder("s3://texts/some/data"), tmp_path / "remote", params, workers=workers)
    prepare(data, tmp_path / "local", params)
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert [file.source.name for file in report.files] == ["books/one.txt", "rows.csv", "rows.jsonl", "rows.parquet"]


def test_stages_hand_over_through_a_store(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    base = ROOT / "base"
    if not (base / "tokenizer.json").is_file():
        pytest.skip("the bundled base is not checked out (make data)")
    put(store, ROOT / "data", "texts/data")
    store.pipe("texts/out/report.json", b"of an earlier run")
    remote = run("pipeline.stages.prepare", "s3://texts/data", "s3://texts/out")
    local = run("pipeline.stages.prepare", "data", str(tmp_path / "out"))
    assert (remote.returncode, remote.stdout) == (0, local.stdout)
    files = contents(tmp_path / "out")
    assert {name: store.cat(f"texts/out/{name}") for name in files} == files
    assert not [path for path in (ROOT / "out").glob("out-*") if path.suffix != ".lock"]
    tokens = []
    for name, documents in (("remote", "s3://texts/out"), ("local", str(tmp_path / "out"))):
        done = run("pipeline.stages.tokenize", documents, str(base), str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        tokens.append((tmp_path / name / "train" / "tokens.npy").read_bytes())
    assert tokens[0] == tokens[1]


NO_SERVER = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}


@pytest.mark.parametrize(
    ("data", "out", "changes", "line"),
    [
        ("s3://texts/none", "OUT", {}, "s3://texts/none: no such folder; put text files there"),
        ("s3://none/data", "OUT", {}, "s3://none/data: no such folder; put text files there"),
        ("DATA", "s3://none/out", {}, "s3://none/out: The specified bucket does not exist; correct the address, the"),
        ("DATA", "s4://texts/out", {}, "s4://texts/out: Unsupported filesystem: 's4'; use one of those of"),
        (
            "DATA",
            "http://127.0.0.1:9/out",
            {},
            "http://127.0.0.1:9/out: such an address cannot be written to; use s3://",
        ),
        ("DATA", "file:///none/out", {}, "/none/out/report.json.probe: No such file"),
        (
            "s3://texts/data",
            "OUT",
            dict.fromkeys(ACCOUNT, ""),
            "s3://texts/data: Unable to locate credentials; correct",
        ),
        ("s3://texts/data", "OUT", NO_SERVER, "s3://texts/data: Could not connect"),
        ("tape://texts/data", "OUT", {}, "tape://texts/data: Unsupported filesystem: 'tape'; use one of those of"),
    ],
)
def test_a_store_that_fails_is_one_line(
    store: fsspec.AbstractFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: str,
    out: str,
    changes: dict[str, str],
    line: str,
) -> None:
    texts = write_texts(tmp_path / "data")
    put(store, texts, "texts/data")
    store.clear_instance_cache()
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    addresses = data.replace("DATA", str(texts)), out.replace("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["prepare", *addresses])
    with pytest.raises(SystemExit) as ended:
        prepare_stage.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {line}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "library", "advice"),
    [
        ("gs://texts/data", "gcsfs", r"run pip install --editable '\.\[gs\]'"),
        ("sftp://host/data", "paramiko", "install it"),
    ],
)
def test_a_library_that_is_not_installed_is_named(address: str, library: str, advice: str) -> None:
    if find_spec(library):
        pytest.skip(f"{library} is installed")
    kind = address.partition("://")[0]
    with pytest.raises(UserError, match=rf"{address}: {kind}:// needs a library .* \(.*{library}.*\); {advice}"):
        find_folder(address)


def test_names_that_no_file_system_has_are_refused(store: fsspec.AbstractFileSystem) -> None:
    for name in ("one.txt", "one.txt/two.txt", "three//four.txt", ".hidden/five.txt"):
        store.pipe(f"texts/data/{name}", b"The lamp.")
    files = list_files(find_folder("s3://texts/data"))
    with pytest.raises(UserError, match=r"s3://texts/data: three//four\.txt: has an empty part between two slashes"):
        list(files)
    store.rm("texts/data/three//four.txt")
    names = sorted(str(path) for path in list_files(find_folder("s3://texts/data")))
    assert names == ["s3://texts/data/one.txt", "s3://texts/data/one.txt/two.txt"]


def test_an_upload_that_fails_leaves_no_report(
    store: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("report.json", "test.jsonl", "train.jsonl"):
        (folder / name).write_text("new")
        store.pipe(f"texts/out/{name}", b"old")
    copy = store.put_file

    def fail(source: str, target: str, **options: object) -> None:
        if source.endswith("train.jsonl"):
            raise ConnectionResetError("connection reset")
        copy(source, target, **options)

    monkeypatch.setattr(store, "put_file", fail)
    with pytest.raises(UserError, match=f"s3://texts/out: connection reset; correct .*; what .* is in {folder}"):
        upload(folder, "s3://texts/out")
    assert sorted(store.ls("texts/out", detail=False)) == ["texts/out/test.jsonl", "texts/out/train.jsonl"]
    assert len(contents(folder)) == 3
    with pytest.raises(UserError, match=r"s3://texts/out: has no report\.json, which is copied last; run the stage"):
        find_output("s3://texts/out")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a fault"),
        MemoryError("Unable to allocate"),
        OSError(12, "Cannot allocate memory"),
        BrokenPipeError(32, "Broken pipe"),
        FileNotFoundError(2, "No such file", "data/a.txt"),
        json.JSONDecodeError("a fault", "{", 1),
        ImportError("a fault"),
        UserError("said already"),
    ],
)
def test_only_errors_of_the_store_name_it(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, name_store_in_errors("s3://texts/data"):
        raise error
    assert raised.value is error
    with pytest.raises(PermissionError), name_store_in_errors("s3"):
        raise PermissionError("Access Denied")


def test_what_goes_to_a_store_is_written_here_first(tmp_path: Path) -> None:
    parent = str(tmp_path)
    assert open_output("out/prepare", parent) == Path("out/prepare")
    assert open_output("texts/a://b", parent) == Path("texts/a://b")
    first, second, again = (open_output(f"memory://{name}", parent) for name in ("a/out", "b/out", "a/out/"))
    assert first.parent == second.parent == tmp_path
    assert first == again != second
    assert open_output("memory://a/out", None).parent == Path("out")
    assert not UPath("memory://a/out").exists()


def test_any_store_of_fsspec_is_read() -> None:
    UPath("memory://texts/data/a.txt").write_text("The lamp.")
    assert [path.name for path in find_folder("memory://texts/data").iterdir()] == ["a.txt"]
