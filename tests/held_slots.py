"""What tests need that look at what the slots of a session hold."""

from collections.abc import Callable, Iterator

import numpy as np
from hypothesis import strategies as st

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.scheduler import Request
from pipeline.engine.session import Session

SYSTEM = [(7 * index) % 290 + 5 for index in range(20)]
OTHER = [(11 * index) % 290 + 5 for index in range(20)]


def caches(session: Session) -> Iterator[np.ndarray]:
    """Yield the buffers of keys and values, `[slots, heads, context, head width]`."""
    for buffer in session._cache.values():
        assert buffer.array is not None
        yield buffer.array


def check_held(session: Session, reader: Session, tolerance: float) -> None:
    """Compare what each slot is said to hold with what another session makes of the same tokens."""
    for slot, held in enumerate(session.held):
        if held:
            reader.prefill(0, held, 0)
            for own, fresh in zip(caches(session), caches(reader), strict=True):
                np.testing.assert_allclose(
                    own[slot, :, : len(held)].astype(np.float32),
                    fresh[0, :, : len(held)].astype(np.float32),
                    atol=tolerance,
                )


def drawn(request: Request) -> list[int]:
    return [token.token_id for token in request.tokens if token.token_id is not None]


def finish(engine: Engine) -> None:
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step()


def check_events(
    data: st.DataObject, engine: Engine, reader: Engine, check: Callable[[], None]
) -> list[tuple[list[int], SamplingParams, list[Request]]]:
    """Let requests begin, end, slide and be cancelled, and texts be scored and forgotten; `check` after each event.

    Return the requests, by prompt.
    """
    asked: list[tuple[list[int], SamplingParams, list[Request]]] = []
    kinds = ["submit", "submit", "submit", "step", "step", "step", "cancel", "score", "forget"]
    for _ in range(data.draw(st.integers(1, 14), label="events")):
        event = data.draw(st.sampled_from(kinds), label="event")
        opening = data.draw(st.sampled_from([[0], [7], []]), label="opening")
        beginning = data.draw(st.sampled_from([SYSTEM, OTHER, []]), label="beginning")
        prompt = [*opening, *beginning, *data.draw(st.lists(st.integers(1, 3), max_size=3), label="rest")]
        requests = [request for _, _, own in asked for request in own]
        if event == "submit":
            params = SamplingParams(
                seed=data.draw(st.integers(0, 2), label="seed"),
                ignore_eos=True,
                n=data.draw(st.integers(1, 2), label="n"),
                max_new_tokens=data.draw(st.sampled_from([1, 3, 70]), label="most"),
                no_repeat_ngram_size=data.draw(st.sampled_from([0, 0, 3]), label="asks the host"),
                context_overflow="slide",
            )
            asked.append((prompt, params, engine.submit(prompt, params)))
        elif event == "step":
            engine.scheduler.step(prefill_tokens=data.draw(st.sampled_from([1, 5, 100]), label="part"))
        elif event == "cancel" and requests:
            engine.scheduler.cancel(data.draw(st.sampled_from(requests), label="which"))
        elif event == "score" and prompt:
            engine.score([prompt])
        elif event == "forget":
            engine.session.forget()
        check()
    finish(engine)
    check()
    return asked
