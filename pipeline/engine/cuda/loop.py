"""Steps that the device takes by itself: the model's graph, then the draw, whose token is fed to the next.

Everything that a step reads and writes stays on the device at fixed addresses, so that a step is the replay of a CUDA
graph, captured for each power of two of rows, and the launch of a kernel. Nothing of it waits for the host, and the
host reads the log of drawn tokens when it likes. Rows are the session's slots. The same loop runs on the processor,
where it is tested.
"""

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.engine.cuda.kernel import rows_of
from pipeline.engine.cuda.rows import STATE, widths
from pipeline.engine.memory import Buffer
from pipeline.engine.session import Draw, Session, bind, place

FED = ("input_ids", "position_ids", "last_positions")
"""What of the state the graph reads too."""


def rows_run(slots: int) -> int:
    """How many rows a step of the first slots runs: the next power of two, of which each is captured once."""
    return 1 << (slots - 1).bit_length()


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
        # Read by the host when the step is captured: the largest there is, so that it holds for all.
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
        if session.provider == "cuda":
            # The first run of a step captures it, in this thread, and runs it several times: now every row rests.
            for power in range(session.slots.bit_length()):
                self.step(1 << power)
            self._memory.read(self._logits, 0, 1)

    def join(self, slot: int, row: dict[str, NDArray[Any]]) -> None:
        """Let a row go on from this state."""
        for name, values in row.items():
            self._write(slot, name, values)

    def rest(self, slot: int) -> None:
        """Let a row draw no more."""
        self._write(slot, "left", [0])

    def park(self, slot: int, position: int) -> None:
        """Let a row rest where the token that it is fed all the same does no harm: at a position yet to be written."""
        self.rest(slot)
        self._write(slot, "position_ids", [position])
        self._write(slot, "last_positions", position)

    def step(self, slots: int) -> None:
        """Queue a step of the first `slots` rows, and of those up to the next power of two."""
        rows = rows_run(slots)
        if rows not in self._bindings:
            self._bindings[rows] = self._bind(rows), self._session.capture_options()
        self._session.graph.run_with_iobinding(*self._bindings[rows])
        self._draw(self._rows, rows)

    def log(self, slots: int, *, wait: bool) -> NDArray[np.int64]:
        """The log of the first rows, int64 `[slots, LOGGED]`: as it is by now, or once all that is queued is done."""
        read = self._memory.read if wait else self._memory.peek
        return read(self._state["log"], 0, slots)

    def logits(self, slot: int) -> NDArray[np.float32]:
        """The logits of the last step of a row, float32 `[vocabulary]`."""
        row: NDArray[np.float32] = self._memory.read(self._logits, slot, 1)[0]
        return row

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
