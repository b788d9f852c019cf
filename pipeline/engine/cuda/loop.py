"""Steps that the device takes by itself: the model's graph, then the draw, whose token is fed to the next step.

Everything that a step reads and writes stays on the device at fixed addresses. So a step is the replay of a CUDA graph,
captured for each power of two of rows, and the launch of a kernel. No step waits for the host, which reads the log of
drawn tokens when it likes. Rows are the session's slots. The same loop runs on the processor, where it is tested.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.engine.cuda.kernel import rows_of
from pipeline.engine.cuda.rows import ASKS_HOST, LOGGED, STATE, STEP_BITS, TAG_BITS, TAGS, round_up_rows, row_of, widths
from pipeline.engine.memory import Buffer
from pipeline.engine.sampler import Continuation
from pipeline.engine.session import Draw, Session, bind, place

FED = ("input_ids", "position_ids", "last_positions")
"""The fields of the state that the graph reads, too."""
STEPS_AHEAD = 4
"""The number of steps that may be queued before the token of the first is taken: the host's work hides behind them."""
POLLS = 100_000
"""The number of looks at the log, some ten microseconds each, before the host waits for everything that is queued."""


@dataclass(slots=True)
class _Drawing:
    """A row that the device draws by itself."""

    tag: int
    """The number that is added to its entries in the log."""
    fed: int
    """The token that it was fed at `position` to draw the next one that is taken."""
    position: int
    queued: int = 0
    """The number of steps queued since it joined."""
    taken: int = 0
    """The number of its tokens that the host has taken."""


class DeviceLoop:
    """The rows that a session's device draws by itself. A row rests until `join`."""

    def __init__(self, session: Session, draw: Draw) -> None:
        manifest = session.manifest
        self._session = session
        self._draw = draw
        self._memory = session.memory
        sizes = widths(manifest.vocabulary_size, manifest.context_length)
        self._state: dict[str, Buffer] = {
            name: self._memory.zeros((session.slots, *sizes[field.width]), field.dtype) for name, field in STATE.items()
        }
        self._logits = self._memory.zeros((session.slots, manifest.vocabulary_size), np.float32)
        self._logit_rows = self._memory.zeros((session.slots,), np.int64)
        self._memory.write(self._logit_rows, 0, np.arange(session.slots))
        # The host reads it when the step is captured: the largest value, so that it holds for every step.
        self._total_tokens = np.array(manifest.context_length, np.int32)
        row_of_vocabulary = (session.slots, manifest.vocabulary_size)
        self._working = {
            "keys": self._memory.zeros(row_of_vocabulary, np.uint32),
            "weights": self._memory.zeros(row_of_vocabulary, np.float32),
        }
        self._rows = rows_of(
            {"logits": self._logits, **self._state, **self._working}, manifest.vocabulary_size, manifest.context_length
        )
        self._bindings: dict[int, tuple[ort.IOBinding, ort.RunOptions]] = {}
        self._drawing: dict[int, _Drawing] = {}
        self._joins = 0
        if session.provider == "cuda":
            # The first run of a step captures it, in this thread, and runs it several times: now every row rests.
            with self._memory.held():
                for power in range(session.slots.bit_length()):
                    self.step(1 << power)
                self._memory.read(self._logits, 0, 1)

    def is_drawing(self, slot: int) -> bool:
        """Return whether the device draws for this row."""
        return slot in self._drawing

    def join(self, slot: int, continuation: Continuation, token_id: int, position: int, left: int) -> None:
        """Let a row draw up to `left` tokens after it is fed `token_id` at `position`."""
        self._joins += 1
        tag = self._joins % TAGS << TAG_BITS
        context_length = self._session.manifest.context_length
        row = row_of(continuation, token_id, position, left, tag, context_length)
        for name, values in row.items():
            self._write(slot, name, values)
        self._drawing[slot] = _Drawing(tag, token_id, position)

    def rest(self, slot: int) -> None:
        """Stop a row's drawing, and drop its tokens that were not taken."""
        self._write(slot, "left", [0])
        self._drawing.pop(slot, None)

    def park(self, slot: int, position: int) -> None:
        """Let a row rest at a position that will be overwritten, because each step feeds it a token anyway."""
        self.rest(slot)
        self._write(slot, "position_ids", [position])
        self._write(slot, "last_positions", position)

    def step(self, slots: int) -> None:
        """Queue a step of the first `slots` rows, and of those up to the next power of two."""
        rows = round_up_rows(slots)
        if rows not in self._bindings:
            self._bindings[rows] = self._bind(rows), self._session.capture_options()
        self._session.graph.run_with_iobinding(*self._bindings[rows])
        self._draw(self._rows, rows)
        for row in self._drawing.values():
            row.queued += 1

    def tokens(self) -> Iterator[tuple[int, int]]:
        """Yield slot and token for what was drawn, until no row is more than `STEPS_AHEAD` steps ahead.

        `ASKS_HOST` instead of a token leaves the draw to the host: the row rests, and its logits are in the session's.
        """
        for poll in range(POLLS):
            yield from self._take(self._drawing, wait=poll == POLLS - 1)
            if not any(row.queued > row.taken + STEPS_AHEAD for row in self._drawing.values()):
                return

    def recall(self, slots: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Yield what the device has still drawn for these rows, as `tokens` does, then let them rest."""
        recalled = [slot for slot in slots if slot in self._drawing]
        if not recalled:
            return
        yield from self._take(recalled, wait=True)
        for slot in recalled:
            if slot in self._drawing:
                self.rest(slot)

    def log(self, slots: int, *, wait: bool) -> NDArray[np.int64]:
        """Return the log of the first rows, int64 `[slots, LOGGED]`: as it is by now, or after everything queued."""
        read = self._memory.read if wait else self._memory.peek
        return read(self._state["log"], 0, slots)

    def logits(self, slot: int) -> NDArray[np.float32]:
        """Return the logits of the last step of a row, float32 `[vocabulary]`."""
        row: NDArray[np.float32] = self._memory.read(self._logits, slot, 1)[0]
        return row

    def _take(self, slots: Iterable[int], *, wait: bool) -> Iterator[tuple[int, int]]:
        """Yield what the log holds of these rows. The reader may let a row rest meanwhile."""
        log = self.log(self._session.slots, wait=wait)
        for slot in list(slots):
            while (row := self._drawing.get(slot)) is not None:
                entry = int(log[slot, row.taken % LOGGED]) - row.tag - (row.taken << STEP_BITS)
                if not 0 <= entry <= ASKS_HOST:
                    break
                if entry == ASKS_HOST:
                    # The row has rested since: its logits are those of every later step, too.
                    del self._drawing[slot]
                    self._session.logits[slot] = self.logits(slot)
                row.taken += 1
                self._session.record(slot, row.position, (row.fed,))
                row.fed, row.position = entry, row.position + 1
                yield slot, entry

    def _write(self, slot: int, name: str, values: Any) -> None:
        buffer = self._state[name]
        self._memory.write(buffer, slot, np.asarray(values, buffer.dtype)[None])

    def _bind(self, rows: int) -> ort.IOBinding:
        binding = self._session.graph.io_binding()
        for name in FED:
            bind(binding.bind_input, name, self._state[name].rows(0, rows))
        bind(binding.bind_input, "total_tokens", place(self._total_tokens))
        bind(binding.bind_input, "logit_rows", self._logit_rows.rows(0, rows))
        bind(binding.bind_output, "logits", self._logits.rows(0, rows))
        self._session.bind_cache(binding, 0, rows)
        return binding
