"""The filters, the draw and what follows from it as an ONNX graph: a step of every row of a batch, without the host.

It says what `pipeline.engine.sampling` says: the same filters in the same order, the same uniform, the same token,
unless the uniform lies within rounding of an edge of the CDF. It has no loop, branch or random operator, so that it can
be captured as a CUDA graph, and its work does not grow with the context: what penalties and bans do to each token of
the vocabulary is kept in rows of its width, which a step changes in one place.

`pipeline.engine.rows` lists its inputs, a row a continuation. What a step changes is an output too, of the same name
after `next.`, and bound to the same memory: whatever reads a tensor is needed by what is written over it, and so comes
before. A row whose `left` is 0 rests: it draws nothing, and nothing of it changes.

Greedy decoding is `top_k` 1 with uniforms of 0: the first of the likeliest tokens in vocabulary order.

Thresholds are found among the likeliest `CANDIDATES`, and then applied to the whole row by value, so that ties at an
edge are kept. The token is found by a CDF in two levels: over parts of the vocabulary, and in the part that the uniform
falls in. Where the candidates do not suffice, as for a nucleus wider than they are, or where no token is left or the
logits are not finite, the row logs `ASKS_HOST` and rests: whoever reads the log asks the reference.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pipeline.engine.rows import ASKS_HOST, CANDIDATES, STATE, Field, widths

PART = 256
"""Tokens of the vocabulary whose weight is summed together."""
OPSET = 20
LOWEST = np.finfo(np.float32).min
LARGEST = np.finfo(np.float32).max


def write_sampler(file: Path, vocabulary_size: int, context_length: int) -> None:
    """Write the graph for a vocabulary and a context of this size."""
    graph = _Graph()
    shifted, peak = _penalize(graph)
    weights, edge, is_exact = _filter(graph, shifted, peak, vocabulary_size)
    # The only one that reads `drawn`: a draw needs it, and what `drawn` becomes.
    step = graph.add("Min", "drawn", graph.number(context_length - 1, np.int64))
    _advance(graph, _draw(graph, weights, edge, step, vocabulary_size), is_exact, step)
    graph.save(file, widths(vocabulary_size, context_length))


def _penalize(graph: "_Graph") -> tuple[str, str]:
    """Bias, penalties and temperature: the logits less the largest, cooled, and that largest."""
    biased = graph.add("Add", "logits", "bias")
    zero = graph.number(0, np.float32)
    # One of the two is 0, so that their sum is exact.
    positive = graph.add("Div", graph.add("Max", biased, zero), "penalty")
    negative = graph.add("Mul", graph.add("Min", biased, zero), "penalty")
    left = graph.add("Sub", graph.add("Add", positive, negative), "offset")
    peak = graph.add("ReduceMax", left, graph.number([1], np.int64))
    return graph.add("Div", graph.add("Sub", left, peak), "temperature"), peak


def _filter(graph: "_Graph", shifted: str, peak: str, vocabulary_size: int) -> tuple[tuple[str, str], str, str]:
    """The row in parts and its weights, `[rows, parts, PART]`; the least logit that is kept; whether that is exact."""
    candidates = min(CANDIDATES, vocabulary_size)
    values, _ = graph.add("TopK", shifted, graph.number([candidates], np.int64), outputs=2, axis=1)
    # Filled up with what no threshold keeps.
    lowest = graph.number(LOWEST, np.float32)
    padding = graph.number([0, 0, 0, -vocabulary_size % PART], np.int64)
    shape = graph.number([-1, -(-vocabulary_size // PART), PART], np.int64)
    parts = graph.add("Reshape", graph.add("Pad", shifted, padding, lowest), shape)
    weights = graph.add("Exp", parts)

    # Top-k: the value of the k-th candidate. Where fewer than k are left, it is -inf, and all are kept.
    zero, row = graph.number(0, np.int64), graph.number([1], np.int64)
    place = graph.add("Sub", "top_k", graph.number(1, np.int64))
    place = graph.add("Min", graph.add("Max", place, zero), graph.number(candidates - 1, np.int64))
    is_limited = graph.add("Greater", "top_k", zero)
    kth = graph.add("GatherElements", values, place, axis=1)
    edge_k = graph.add("Max", graph.add("Where", is_limited, kth, lowest), lowest)

    # Top-p: the value at which the running probability of the candidates, of all that top-k left, reaches it.
    nothing = graph.number(0, np.float64)
    wide = graph.add("Exp", graph.add("Cast", values, to=TensorProto.DOUBLE))
    likeliest = graph.add("Where", graph.add("GreaterOrEqual", values, edge_k), wide, nothing)
    total = graph.add("ReduceSum", graph.sums(weights), row)
    mass = graph.add("Where", is_limited, graph.add("ReduceSum", likeliest, row), total)
    probabilities = graph.add("Div", likeliest, mass)
    before = graph.add("CumSum", probabilities, graph.number(1, np.int64), exclusive=1)
    in_nucleus = graph.add("Less", before, "top_p")
    largest = graph.number(LARGEST, np.float32)
    smallest_in = graph.add("ReduceMin", graph.add("Where", in_nucleus, values, largest), row)
    is_whole = graph.add("GreaterOrEqual", "top_p", graph.number(1, np.float64))
    edge_p = graph.add("Where", is_whole, lowest, smallest_in)

    # Ties with the k-th may go on beyond the candidates, and so may a nucleus. Min-p is relative to the likeliest's 0.
    if candidates < vocabulary_size:
        least = graph.add("Gather", values, graph.number([candidates - 1], np.int64), axis=1)
        is_cut = graph.add("And", is_limited, graph.add("GreaterOrEqual", least, edge_k))
    else:
        is_cut = graph.add("And", is_limited, graph.add("Greater", zero, "top_k"))
    is_reached = graph.add("GreaterOrEqual", graph.add("ReduceSum", probabilities, row), "top_p")
    suffices = graph.add("Or", graph.add("Or", is_whole, is_reached), is_limited)
    is_finite = graph.add("And", graph.add("Greater", peak, lowest), graph.add("Less", peak, largest))
    is_exact = graph.add("And", graph.add("And", suffices, is_finite), graph.add("Not", is_cut))
    return (parts, weights), graph.add("Max", edge_k, edge_p, "log_min_p"), is_exact


def _draw(graph: "_Graph", row: tuple[str, str], edge: str, step: str, vocabulary_size: int) -> str:
    """The token at which the CDF of the weights from the edge on first exceeds the uniform, int64 `[rows, 1]`."""
    parts, weights = row
    one, zero = graph.number(1, np.int64), graph.number(0, np.int64)
    columns = graph.number([1], np.int64)
    is_kept = graph.add("GreaterOrEqual", parts, graph.add("Unsqueeze", edge, graph.number([2], np.int64)))
    kept = graph.add("Where", is_kept, weights, graph.number(0, np.float32))
    cdf = graph.add("CumSum", graph.sums(kept), one)
    last_part = graph.number([-(-vocabulary_size // PART) - 1], np.int64)
    mass = graph.add("Gather", cdf, last_part, axis=1)
    target = graph.add("Mul", graph.add("GatherElements", "uniforms", step, axis=1), mass)

    def passed(sums: str) -> str:
        """How many of the running sums the target has reached."""
        reached = graph.add("Cast", graph.add("LessOrEqual", sums, target), to=TensorProto.INT64)
        return str(graph.add("ReduceSum", reached, columns))

    # Where nothing is left, the count passes the last part; that row is not exact, and its token is not used.
    part = graph.add("Min", passed(cdf), last_part)
    earlier = graph.add("GatherElements", cdf, graph.add("Max", graph.add("Sub", part, one), zero), axis=1)
    base = graph.add("Where", graph.add("Greater", part, zero), earlier, graph.number(0, np.float64))
    inside = graph.add("GatherND", kept, part, batch_dims=1)
    running = graph.add("Add", graph.add("CumSum", graph.add("Cast", inside, to=TensorProto.DOUBLE), one), base)
    # Rounding may leave the part's own sum below the target: no token after its last possible one is drawn.
    is_possible = graph.add("Greater", inside, graph.number(0, np.float32))
    places = graph.number(np.arange(PART)[None], np.int64)
    last = graph.add("ReduceMax", graph.add("Where", is_possible, places, zero), columns)
    place = graph.add("Min", passed(running), last)
    token = graph.add("Add", graph.add("Mul", part, graph.number(PART, np.int64)), place)
    return str(graph.add("Min", token, graph.number(vocabulary_size - 1, np.int64)))


def _advance(graph: "_Graph", token: str, is_exact: str, step: str) -> None:
    """Log the token and count it, and say what comes next."""
    one, zero = graph.number(1, np.int64), graph.number(0, np.int64)
    is_running = graph.add("Greater", "left", zero)
    is_drawn = graph.add("And", is_running, is_exact)
    ends = graph.add("ReduceMax", graph.add("Cast", graph.add("Equal", "ending_ids", token), to=TensorProto.INT64),
                     graph.number([1], np.int64))  # fmt: skip
    left = graph.add("Where", is_drawn, graph.add("Sub", "left", one), zero)
    left = graph.add("Where", graph.add("Greater", ends, zero), zero, left, output="next.left")
    goes_on = graph.add("Greater", left, zero)

    entry = graph.add("Add", graph.add("Where", is_drawn, token, graph.number(ASKS_HOST, np.int64)), "tag")
    own_entry = graph.add("GatherElements", "log", step, axis=1)
    entry = graph.add("Where", is_running, entry, own_entry)
    graph.add("ScatterElements", "log", step, entry, axis=1, output="next.log")
    graph.add("Add", step, graph.add("Cast", is_drawn, to=TensorProto.INT64), output="next.drawn")

    own_penalty = graph.add("GatherElements", "penalty", token, axis=1)
    penalty = graph.add("Where", is_drawn, "repetition_penalty", own_penalty)
    graph.add("ScatterElements", "penalty", token, penalty, axis=1, output="next.penalty")
    own_count = graph.add("GatherElements", "counts", token, axis=1)
    count = graph.add("Add", own_count, graph.add("Cast", is_drawn, to=TensorProto.DOUBLE))
    graph.add("ScatterElements", "counts", token, count, axis=1, output="next.counts")
    offset = graph.add("Add", "presence_penalty", graph.add("Mul", "frequency_penalty", count))
    own_offset = graph.add("GatherElements", "offset", token, axis=1)
    offset = graph.add("Where", is_drawn, graph.add("Cast", offset, to=TensorProto.FLOAT), own_offset)
    graph.add("ScatterElements", "offset", token, offset, axis=1, output="next.offset")

    graph.add("Where", goes_on, token, "input_ids", output="next.input_ids")
    graph.add("Add", "position_ids", graph.add("Cast", goes_on, to=TensorProto.INT64), output="next.position_ids")
    moved = graph.add("Cast", graph.add("Squeeze", goes_on, graph.number([1], np.int64)), to=TensorProto.INT32)
    graph.add("Add", "last_positions", moved, output="next.last_positions")


class _Graph:
    """Collects nodes, each named by its operator and number, and each constant once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[str, bytes, tuple[int, ...]], TensorProto] = {}

    def add(self, operator: str, *inputs: str, outputs: int = 1, output: str | None = None, **attributes: Any) -> Any:
        """A node; its output's name, or those of its outputs."""
        names = [output or f"{operator}.{len(self.nodes)}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def number(self, value: Any, dtype: Any) -> str:
        array: NDArray[Any] = np.asarray(value, dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"constant.{len(self.constants)}")
        return self.constants[key].name

    def sums(self, weights: str) -> str:
        """The weight of each part in float64, `[rows, parts]`."""
        sums = self.add("ReduceSum", weights, self.number([2], np.int64), keepdims=0)
        return str(self.add("Cast", sums, to=TensorProto.DOUBLE))

    def save(self, file: Path, sizes: dict[str, tuple[int, ...]]) -> None:
        def info(name: str, field: Field) -> onnx.ValueInfoProto:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(field.dtype))
            return helper.make_tensor_value_info(name, kind, ["rows", *sizes[field.width]])

        inputs = [
            info("logits", Field(np.float32, "vocabulary")),
            *(info(name, field) for name, field in STATE.items()),
        ]
        outputs = [info(f"next.{name}", field) for name, field in STATE.items() if field.changes]
        graph = helper.make_graph(self.nodes, "sampler", inputs, outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="gpt2-pipeline")
        file.write_bytes(model.SerializeToString())
