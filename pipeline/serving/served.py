"""The model that is served: loaded from a folder or the registry, and replaced by its next version while it runs."""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import requests
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.decoding import ModelDecoding
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.serving.worker import OnTokens, Worker
from pipeline.tracking import store
from pipeline.tracking.pages import run_page
from pipeline.tracking.registry import RUN_TAG, fetch_model, resolve
from pipeline.tracking.tags import COMMIT_TAG, DATA_TAG, DIRTY_TAG

COPIES, COPY_LOCK = "pipeline-served-", "in-use.lock"
"""The prefix of the folders that hold copies of versions, and the file in each that its server locks."""
NEW_SECONDS = 3600
WATCH_SECONDS = 10.0
MOST_DOUBLINGS = 4
JOIN_SECONDS = 0.1
UNREACHABLE = (MlflowException, requests.RequestException, OSError)

logger = logging.getLogger(__name__)


Answer = TypeVar("Answer")
Load = Callable[[Path, str | None], TextGenerator]
"""Loads the engine in a folder on a provider, or on the one that the server was given if it is None."""


@dataclass(frozen=True)
class Files:
    """The files of a version, ready to be loaded."""

    engine: Path
    decoding: ModelDecoding
    lineage: dict[str, str | None]
    remove: Callable[[], None]
    """Removes the files if they are a copy."""


class Source(Protocol):
    """A place that versions come from."""

    name: str

    def newest(self) -> str | None:
        """Return the version that should be served; None if there are no versions."""

    def fetch(self, version: str | None) -> Files:
        """Get the files of a version. Raises `UserError` if they cannot be served."""


class FolderSource:
    """An engine folder, which does not change."""

    def __init__(self, folder: Path, decoding: ModelDecoding) -> None:
        self.name = folder.resolve().name
        self._folder = folder
        self._decoding = decoding

    def newest(self) -> None:
        return None

    def fetch(self, version: str | None) -> Files:
        return Files(self._folder, self._decoding, _lineage(), lambda: None)


class RegistrySource:
    """A registered model: `models:/NAME@ALIAS`, whose alias may move, or `models:/NAME/VERSION`."""

    def __init__(self, client: MlflowClient, uri: str, ui_url: str) -> None:
        _remove_leftovers()
        self.name = resolve(client, uri).name
        self._client = client
        self._uri = uri
        self._ui_url = ui_url

    def newest(self) -> str:
        return str(resolve(self._client, self._uri).version)

    def fetch(self, version: str | None) -> Files:
        found = self._client.get_model_version(self.name, str(version))
        with ExitStack() as stack:
            folder = stack.enter_context(_own_folder())
            engine, decoding = fetch_model(f"models:/{self.name}/{version}", folder)
            lineage = self._lineage(found)
            return Files(engine, decoding, lineage, stack.pop_all().close)

    def _lineage(self, version: ModelVersion) -> dict[str, str | None]:
        tags, run_id = version.tags, version.tags.get(RUN_TAG)
        base, url = None, None
        if run_id is not None:
            try:
                run = self._client.get_run(run_id)
            except MlflowException:
                # A run may be deleted while its version stays.
                run = None
            if run is not None:
                base = run.data.params.get("base.source")
                url = f"{self._ui_url.rstrip('/')}/{run_page(run.info.experiment_id, run_id)}"
        return _lineage(
            run_id=run_id,
            run_url=url,
            git_commit=tags.get(COMMIT_TAG),
            git_dirty=tags.get(DIRTY_TAG),
            data_md5=tags.get(DATA_TAG),
            base=base,
            registered=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        )


@contextmanager
def _own_folder() -> Iterator[Path]:
    """Yield a folder for a copy of a version, which is removed at the end, or by the next server if this one is killed.

    Its lock says that a process uses it: the system opens it again when the process ends in whatever way.
    """
    with (
        tempfile.TemporaryDirectory(prefix=COPIES, ignore_cleanup_errors=True) as name,
        # The thread that removes the copy is not the one that made it.
        FileLock(Path(name) / COPY_LOCK, thread_local=False),
    ):
        yield Path(name)


def _remove_leftovers() -> None:
    """Remove the copies of servers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{COPIES}*"):
        try:
            if not (folder / COPY_LOCK).exists() and time.time() - folder.stat().st_mtime < NEW_SECONDS:
                # Another server is about to lock it.
                continue
            with FileLock(folder / COPY_LOCK, timeout=0):
                shutil.rmtree(folder)
        except (Timeout, OSError):
            # It is used, or belongs to somebody else.
            continue
        logger.info("removed %s, which a killed server had left", folder)


def _lineage(**values: str | None) -> dict[str, str | None]:
    """Return every field of a lineage; None if it is not among the values."""
    names = ("run_id", "run_url", "git_commit", "git_dirty", "data_md5", "base", "registered")
    return {name: values.get(name) for name in names}


@dataclass(eq=False)
class ServedModel:
    """A version with its running engine."""

    name: str
    version: str | None
    files: Files
    worker: Worker
    loaded: datetime = field(default_factory=lambda: datetime.now(UTC))
    users: int = 0
    """The requests that it is still answering."""

    @property
    def generator(self) -> TextGenerator:
        return self.worker.generator

    @cached_property
    def longest_token_characters(self) -> int:
        """The most characters of a text that one token can stand for."""
        return max(map(len, self.generator.tokenizer.get_vocab()))

    @property
    def fingerprint(self) -> str:
        """The name, version and precision that answers carry."""
        session = self.generator.engine.session
        return "/".join(part for part in (self.name, self.version, session.precision) if part is not None)

    def card(self) -> dict[str, Any]:
        """Return the entry of `/v1/models`."""
        session, decoding = self.generator.engine.session, self.files.decoding
        return {
            "id": self.name,
            "object": "model",
            "created": int(self.loaded.timestamp()),
            "owned_by": "pipeline",
            "version": self.version,
            "precision": session.precision,
            "provider": session.provider,
            "context_length": session.manifest.context_length,
            "vocabulary_size": session.manifest.vocabulary_size,
            "decoding": decoding.default.to_mapping(),
            "presets": {name: preset.to_mapping() for name, preset in decoding.presets.items()},
            "lineage": self.files.lineage,
        }

    def close(self) -> None:
        self.worker.stop()
        self.files.remove()


class Served:
    """The version that takes new requests, and the earlier ones that still finish theirs.

    A thread asks the source every `watch_seconds` which version to serve, and less often while it does not answer. A
    new version replaces the old one only after it is loaded and has drawn its first tokens. A version that cannot be
    served is refused once, and the old one stays.
    """

    def __init__(
        self,
        source: Source,
        load: Load,
        *,
        max_queue: int,
        slots_per_client: int | None = None,
        on_tokens: OnTokens = lambda count, seconds, reused: None,
        on_death: Callable[[], None] = lambda: None,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        self._source = source
        self._load = load
        self._max_queue = max_queue
        self._slots_per_client = slots_per_client
        self._on_tokens = on_tokens
        self._on_death = on_death
        self._watch_seconds = watch_seconds
        self._lock = threading.Lock()
        self._retired: list[ServedModel] = []
        self._refused: str | None = None
        """The version that cannot be served."""
        self.refusals = 0
        """How often a version could not be served."""
        self._warning: str | None = None
        """The last warning, which is not repeated."""
        self._failures = 0
        """How often in a row the source did not answer."""
        self._wake = threading.Event()
        self._closing = False
        self._asking = False
        """Whether the watcher waits for the source, which may take as long as the network does."""
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self.current: ServedModel
        self.started = False
        self.draining = False
        """Whether the server is shutting down and takes no new request."""

    @property
    def ready(self) -> bool:
        return self.started and not self.draining and not self.current.worker.ended

    def start(self) -> None:
        """Load the version that should be served. Raises `UserError` if it cannot be."""
        self.current = self._open(self._source.newest())
        self.started = True
        logger.info("serving %s on %s", self.current.fingerprint, self.current.generator.engine.session.provider)
        self._watcher.start()

    def close(self) -> None:
        """End every engine; requests that still run end with an error.

        The source is not waited for: a copy that is not whole is removed with the process, or by the next server.
        """
        self._closing = True
        self._wake.set()
        while self._watcher.is_alive() and not self._asking:
            self._watcher.join(JOIN_SECONDS)
        if self.started:
            for model in (self.current, *self._retired):
                model.close()

    def acquire(self) -> ServedModel:
        """Return the current version, which is kept until it is released."""
        with self._lock:
            self.current.users += 1
            return self.current

    def release(self, model: ServedModel) -> None:
        """Give back a version that `acquire` returned."""
        with self._lock:
            model.users -= 1
            is_idle = model.users == 0 and model is not self.current
        if is_idle:
            self._wake.set()

    @contextmanager
    def lease(self) -> Iterator[ServedModel]:
        """Acquire the current version for a block."""
        model = self.acquire()
        try:
            yield model
        finally:
            self.release(model)

    @property
    def models(self) -> list[ServedModel]:
        """The current version, and the earlier ones that still finish their requests."""
        with self._lock:
            return [self.current, *self._retired]

    def update(self) -> None:
        """Replace the current version if the source names another, and close earlier ones that are idle."""
        self._close_idle()
        try:
            version = self._ask(self._source.newest)
            if version in (self.current.version, self._refused):
                self._failures = 0
                return
            model = self._open(version, self.current.generator.engine.session.provider)
        except UNREACHABLE as error:
            reason = store.without_password(str(error))
            self._warn_once(f"the registry does not answer ({reason}); {self.current.fingerprint} stays")
            self._failures += 1
            return
        except UserError as error:
            self._warn_once(f"{error}; {self.current.fingerprint} stays")
            self._failures += _may_pass(error)
            return
        self._warning, self._failures = None, 0
        with self._lock:
            old, self.current = self.current, model
            self._retired.append(old)
        logger.info("serving %s; %s finishes its requests", model.fingerprint, old.fingerprint)
        self._close_idle()

    def _warn_once(self, text: str) -> None:
        """Log why a new version is not served, unless it was the last warning already."""
        if text != self._warning:
            logger.warning(text)
        self._warning = text

    def _open(self, version: str | None, provider: str | None = None) -> ServedModel:
        """Load a version, on the provider of the one that it replaces. Raises `UserError` if it cannot be served."""
        try:
            files = self._ask(partial(self._source.fetch, version))
        except Exception as error:
            if not _may_pass(error):
                self._refuse(version, error)
            raise
        if self._closing:
            files.remove()
            raise UserError(f"version {version} came while the server was closing")
        try:
            worker = self._start(files.engine, provider)
        except Exception as error:
            files.remove()
            self._refuse(version, error)
            raise
        return ServedModel(self._source.name, version, files, worker)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """Ask the source, for which `close` does not wait."""
        self._asking = True
        try:
            return question()
        finally:
            self._asking = False

    def _refuse(self, version: str | None, error: Exception) -> None:
        """Remember a version that cannot be served: to fetch it again may take minutes, and changes nothing.

        Raises `UserError` if `error` is another: a file that no library could read, say.
        """
        self._refused = version
        self.refusals += 1
        if not isinstance(error, UserError):
            logger.error("version %s of %s cannot be read", version, self._source.name, exc_info=error)
            raise UserError(f"version {version} of {self._source.name} cannot be read; see the error above") from error

    def _start(self, engine: Path, provider: str | None) -> Worker:
        worker = Worker(
            lambda: self._load(engine, provider),
            max_queue=self._max_queue,
            slots_per_client=self._slots_per_client,
            on_tokens=self._on_tokens,
            on_death=self._on_death,
        )
        worker.start()
        return worker

    def _close_idle(self) -> None:
        with self._lock:
            idle = [model for model in self._retired if model.users == 0]
            self._retired = [model for model in self._retired if model.users > 0]
        for model in idle:
            model.close()
            logger.info("closed %s", model.fingerprint)

    def _watch(self) -> None:
        while not self._closing:
            # What does not answer is asked less and less often: what fails may be the copy of gigabytes.
            self._wake.wait(self._watch_seconds * 2 ** min(self._failures, MOST_DOUBLINGS))
            self._wake.clear()
            if not self._closing:
                try:
                    self.update()
                except Exception:
                    # Without the watcher no later version would ever be served.
                    logger.exception("the look for a new version failed; %s stays", self.current.fingerprint)


def _may_pass(error: Exception) -> bool:
    """Whether an error of the source is one of its store or of the network, and not of a version."""
    return isinstance(error, UNREACHABLE) or isinstance(error.__cause__, UNREACHABLE)


def source_of(model: str, decoding: ModelDecoding | None, ui_url: str) -> Source:
    """Return the source of the model that `--model` names: a registered one if `decoding` is None, else a folder.

    `ui_url` is where MLflow shows the runs. Raises `UserError`.
    """
    if decoding is None:
        return RegistrySource(store.connect(create=False), model, store.without_password(ui_url))
    return FolderSource(Path(model), decoding)
