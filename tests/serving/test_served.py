"""The version that is served, and its replacement by another while requests run."""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from served_model import DECODING, PATIENCE_S, Running, running_server, served_folder, wait_for

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.serving.served import Files


class Versions:
    """A fake registry whose alias the test moves."""

    name = "tales"

    def __init__(self, folder: Path) -> None:
        self.folders: dict[str, Path] = {"1": folder}
        self.wanted = "1"
        self.fetched: list[str] = []
        self.removed: list[str] = []
        self.fails = False
        self.damaged: dict[str, Exception] = {}
        """The error with which a version is fetched."""

    def newest(self) -> str:
        if self.fails:
            raise ConnectionError("nobody listens")
        return self.wanted

    def fetch(self, version: str | None) -> Files:
        assert version is not None
        self.fetched.append(version)
        if version in self.damaged:
            raise self.damaged[version]
        return Files(
            self.folders[version], DECODING, {"run_id": f"run-{version}"}, partial(self.removed.append, version)
        )


@pytest.fixture
def versions(tiny_engine_folder: Path) -> Versions:
    return Versions(tiny_engine_folder)


def copy_folder(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def fingerprint(running: Running) -> str:
    return str(running.post(prompt="a", max_tokens=1).json()["system_fingerprint"])


def test_a_new_version_takes_over_and_no_request_fails(versions: Versions) -> None:
    versions.folders["2"] = versions.folders["1"]
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask(url: str) -> None:
        while not stop.is_set():
            found = requests.post(
                f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 20, "ignore_eos": True}, timeout=PATIENCE_S
            )
            answers.append((found.status_code, found.json()["system_fingerprint"]))

    with running_server(versions.folders["1"], source=versions, max_queue=64) as running:
        assert fingerprint(running) == "tales/1/float32"
        threads = [threading.Thread(target=ask, args=(running.url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for wanted in ("2", "1", "2"):
            versions.wanted = wanted
            wait_for(lambda wanted=wanted: running.served.current.version == wanted)  # type: ignore[misc]
            count = len(answers)
            wait_for(lambda count=count: len(answers) > count + 16)  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join()
        assert {status for status, _ in answers} == {200}
        assert {name for _, name in answers} == {"tales/1/float32", "tales/2/float32"}
        assert fingerprint(running) == "tales/2/float32"
        wait_for(lambda: len(running.served.models) == 1)
        (card,) = requests.get(f"{running.url}/v1/models", timeout=PATIENCE_S).json()["data"]
        assert (card["version"], card["lineage"]) == ("2", {"run_id": "run-2"})
    assert sorted(versions.removed) == sorted(versions.fetched) == ["1", "1", "2", "2"]


def test_the_old_version_finishes_its_requests(versions: Versions) -> None:
    versions.folders["2"] = versions.folders["1"]
    with running_server(versions.folders["1"], source=versions) as running:
        body = {"prompt": "a", "max_tokens": 60, "n": 12, "ignore_eos": True, "stream": True}
        with requests.post(f"{running.url}/v1/completions", json=body, stream=True, timeout=PATIENCE_S) as held:
            lines = held.iter_lines()
            next(lines)
            versions.wanted = "2"
            wait_for(lambda: running.served.current.version == "2")
            assert fingerprint(running) == "tales/2/float32"
            events = [line.removeprefix(b"data: ") for line in lines if line]
        assert events[-1] == b"[DONE]"
        ends = [choice for event in events[:-1] for choice in json.loads(event)["choices"] if choice["finish_reason"]]
        assert len(ends) == 12
        assert {json.loads(event)["system_fingerprint"] for event in events[:-1]} == {"tales/1/float32"}
        wait_for(lambda: versions.removed == ["1"])


def change_file(folder: Path) -> None:
    file = next((folder / "float32").glob("*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def change_format(folder: Path) -> None:
    write_json(folder / "engine.json", {**read_json(folder / "engine.json"), "format_version": 99})


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change_file, "its SHA-256 is not the one"),
        (change_format, "format version 99"),
        (remove_tokenizer, "is missing"),
    ],
)
def test_a_version_that_cannot_be_served_is_refused_once(
    spoil: Callable[[Path], None], reason: str, versions: Versions, tmp_path: Path, caplog: Any
) -> None:
    versions.folders["2"] = copy_folder(versions.folders["1"], tmp_path / "2")
    versions.folders["3"] = versions.folders["1"]
    spoil(versions.folders["2"])
    caplog.set_level(logging.WARNING, "pipeline")
    with running_server(versions.folders["1"], source=versions) as running:
        versions.wanted = "2"
        wait_for(lambda: any(reason in record.getMessage() for record in caplog.records))
        assert fingerprint(running) == "tales/1/float32"
        fetched = len(versions.fetched)
        versions.fails = True
        wait_for(lambda: any("does not answer" in record.getMessage() for record in caplog.records))
        versions.fails = False
        versions.wanted = "3"
        wait_for(lambda: running.served.current.version == "3")
        assert versions.fetched.count("2") == 1 == fetched - 1
        assert fingerprint(running) == "tales/3/float32"
    assert sorted(versions.removed) == ["1", "2", "3"]


@pytest.mark.parametrize("error", [UserError("2 has no engine"), KeyError("artifact_path"), ValueError("bad YAML")])
def test_a_version_that_cannot_be_read_is_refused_once_and_the_watch_goes_on(
    error: Exception, versions: Versions, caplog: Any
) -> None:
    versions.folders["2"] = versions.folders["3"] = versions.folders["1"]
    versions.damaged["2"] = error
    caplog.set_level(logging.WARNING, "pipeline")
    with running_server(versions.folders["1"], source=versions) as running:
        versions.wanted = "2"
        wait_for(lambda: any("tales/1/float32 stays" in record.getMessage() for record in caplog.records))
        versions.fails = True
        wait_for(lambda: any("does not answer" in record.getMessage() for record in caplog.records))
        versions.fails = False
        assert running.metric("pipeline_refused_versions") == 1
        versions.wanted = "3"
        wait_for(lambda: running.served.current.version == "3")
    assert versions.fetched.count("2") == 1


@pytest.mark.parametrize("is_told", [False, True])
def test_a_copy_that_fails_on_the_way_is_tried_again(is_told: bool, versions: Versions) -> None:
    versions.folders["2"] = versions.folders["1"]
    versions.damaged["2"] = ConnectionError("reset by peer")
    if is_told:
        told = UserError("models:/tales/2: the registry does not hold it")
        told.__cause__ = versions.damaged["2"]
        versions.damaged["2"] = told
    with running_server(versions.folders["1"], source=versions) as running:
        versions.wanted = "2"
        wait_for(lambda: versions.fetched.count("2") > 1)
        del versions.damaged["2"]
        wait_for(lambda: running.served.current.version == "2")
        assert running.metric("pipeline_refused_versions") == 0


def test_an_error_of_the_watch_itself_does_not_end_it(
    versions: Versions, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    versions.folders["2"] = versions.folders["1"]
    with running_server(versions.folders["1"], source=versions) as running:
        own, failed = running.served.update, threading.Event()

        def update() -> None:
            if not failed.is_set():
                failed.set()
                raise ZeroDivisionError("a bug")
            own()

        monkeypatch.setattr(running.served, "update", update)
        versions.wanted = "2"
        wait_for(lambda: running.served.current.version == "2")
    assert "the look for a new version failed; tales/1/float32 stays" in caplog.text


def test_a_version_replaces_another_on_the_same_provider(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without room for both, `auto` would fall back to the processor without a word."""
    versions.folders["2"] = versions.folders["1"]
    with running_server(versions.folders["1"], source=versions) as running:
        own, providers = running.served._load, []

        def load(folder: Path, provider: str | None) -> Any:
            providers.append(provider)
            return own(folder, provider)

        monkeypatch.setattr(running.served, "_load", load)
        versions.wanted = "2"
        wait_for(lambda: running.served.current.version == "2")
    assert providers == ["cpu"]


@pytest.mark.parametrize("question", ["fetch", "newest"])
def test_a_shutdown_does_not_wait_for_the_source(
    question: str, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.folders["2"] = versions.folders["1"]
    asked, answered = threading.Event(), threading.Event()
    answer = getattr(versions, question)

    def slow(*version: str | None) -> Any:
        asked.set()
        assert answered.wait(2 * PATIENCE_S)
        return answer(*version)

    served, _ = served_folder(versions.folders["1"], source=versions)
    served.start()
    monkeypatch.setattr(versions, question, slow)
    versions.wanted = "2"
    assert asked.wait(PATIENCE_S)
    closing = threading.Thread(target=served.close)
    closing.start()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    answered.set()
    # Nobody needs the new one any more.
    wait_for(lambda: versions.removed == ["1", "2"])
    assert served.current.version == "1"
