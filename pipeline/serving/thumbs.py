"""Feedback on completions, which is added to their traces in MLflow."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from mlflow import MlflowClient

from pipeline.serving.openai import ApiError
from pipeline.serving.served import UNREACHABLE
from pipeline.tracking import feedback, store

MOST_WAITING = 16
"""The most thumbs that may wait for the store."""
TIMEOUT_S = 20.0
RETRY_AFTER_S = 5

logger = logging.getLogger(__name__)


class Thumbs:
    """The thumbs on the traces of an experiment, one after another."""

    def __init__(self, client: MlflowClient, experiment_id: str, flush: Callable[[], object]) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._flush = flush
        """Sends the spans that wait."""
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(MOST_WAITING)

    async def set(self, trace_id: str, span_id: str, index: int, value: bool | None) -> bool:
        """Set or remove the thumb of a choice. Return whether there is such a trace. Raises `ApiError`."""
        if not self._places.acquire(blocking=False):
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            raise ApiError(429, "too much feedback waits; try again later", code="queue_full", headers=headers)
        done: Future[bool | Exception] = Future()

        def work() -> None:
            found: bool | Exception
            try:
                with self._lock:
                    # The span of a new answer may still wait to be sent.
                    self._flush()
                    found = feedback.set_thumb(self._client, self._experiment_id, trace_id, span_id, index, value)
            except UNREACHABLE as error:
                reason = store.without_password(str(error).partition("\n")[0])
                logger.warning("MLflow does not take feedback: %s", reason)
                found = ApiError(503, "MLflow does not take feedback now; the server's log says why")
            except Exception as error:  # noqa: BLE001
                found = error
            finally:
                self._places.release()
            done.set_result(found)

        # A store that does not answer is waited for minutes: that must not keep the server from ending.
        threading.Thread(target=work, name="thumb", daemon=True).start()
        try:
            found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(done)), TIMEOUT_S)
        except TimeoutError:
            raise ApiError(504, "MLflow does not answer; try again later", code="timeout") from None
        if isinstance(found, Exception):
            raise found
        return found
