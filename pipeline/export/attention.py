"""Causal attention over the cache, as a node of the graph.

`GroupQueryAttention` writes new keys and values into the cache and attends to all that it holds. On an 8-bit cache it
is the fastest for one new token per row, but not for the many of a prompt: for each of them it turns every key and
value into a float again. There, the other branch of an `If` does that once, and leaves the rest to
`MultiHeadAttention`.

Both branches write the cache in place: the output of an `If` uses the memory that is bound to the graph's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

CONTRIB = "com.microsoft"
IS_STEP, IS_LATER, FIRST, END = "is_step", "is_later", "first_position", "total"
"""The names of what the branches need, the same for all layers: whether every row has one new token; the bias of the
scores, float32 `[rows, 1, tokens, total]`, minus infinity for tokens that come later; the position of each row's first
new token, int64 `[rows]`; and the number of tokens with the new ones, int64 `[1]`."""


@dataclass(frozen=True)
class CacheScales:
    """The steps of a layer's keys and values in an 8-bit cache, float32 `[heads, head width]` each."""

    key: NDArray[np.float32]
    value: NDArray[np.float32]


def attention_node(
    name: str, qkv: str, layer: int, heads: int, scale: float, cache_scales: CacheScales | None
) -> NodeProto:
    """Return the node that attends from the new tokens, `qkv` `[rows, tokens, 3 * width]`, and updates the cache.

    `scale` is the factor of the scores.
    """
    outputs = [name, f"present.{layer}.key", f"present.{layer}.value"]
    if cache_scales is None:
        return _own_operator(qkv, layer, heads, scale, outputs)
    return helper.make_node(
        "If",
        [IS_STEP],
        outputs,
        name=name,
        then_branch=_step(name, qkv, layer, heads, scale, cache_scales),
        else_branch=_prompt(name, qkv, layer, heads, scale, cache_scales),
    )


def _own_operator(
    qkv: str,
    layer: int,
    heads: int,
    scale: float,
    outputs: Sequence[str],
    cache_scales: Sequence[str] = (),
    **attributes: Any,
) -> NodeProto:
    # Between the positions and the scales are inputs that GPT-2 does not have: rotation, bias, sinks.
    after = ["", "", "", "", "", *cache_scales] if cache_scales else []
    return helper.make_node(
        "GroupQueryAttention",
        [qkv, "", "", f"past.{layer}.key", f"past.{layer}.value", "last_positions", "total_tokens", *after],
        outputs,
        name=outputs[0],
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=heads,
        do_rotary=0,
        scale=scale,
        **attributes,
    )


def _step(name: str, qkv: str, layer: int, heads: int, scale: float, cache_scales: CacheScales) -> GraphProto:
    """Return the branch for one new token per row."""
    branch = _Branch(f"{name}.step")
    scales = [
        branch.constant(f"{part}_scale", steps[None, :, None, :])
        for part, steps in (("key", cache_scales.key), ("value", cache_scales.value))
    ]
    kind: dict[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    branch.nodes.append(_own_operator(qkv, layer, heads, scale, branch.outputs, scales, **kind))
    return branch.graph()


def _prompt(name: str, qkv: str, layer: int, heads: int, scale: float, cache_scales: CacheScales) -> GraphProto:
    """Return the branch for many new tokens of one row.

    The steps of the keys are multiplied into the queries, and those of the values into what attention returns, so that
    the cache's whole numbers need no other change than to become floats.
    """
    branch = _Branch(f"{name}.prompt")
    branch.add("Split", [qkv], ["query", "key", "value"], axis=2, num_outputs=3)
    split = branch.constant("heads", np.array([0, 0, heads, -1]))
    start, tokens_axis = branch.constant("start", np.array([0])), branch.constant("tokens_axis", np.array([2]))
    # One scale per tensor is rounded many times as fast as one per channel, which is multiplied before.
    one = [branch.constant("one", np.array(1, np.float32)), branch.constant("zero", np.array(0, np.int8))]
    attended = {}
    for part, steps, present in (("key", cache_scales.key, 1), ("value", cache_scales.value, 2)):
        branch.constant(f"{part}_scale", steps.reshape(-1))
        per_step = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
        inverse = branch.constant(f"{part}_steps", per_step.reshape(-1))
        (counted,) = branch.add("Mul", [f"{branch.name}.{part}", inverse], [f"{part}.counted"])
        (rounded,) = branch.add("QuantizeLinear", [counted, *one], [f"{part}.rounded"])
        (by_head,) = branch.add("Reshape", [rounded, split], [f"{part}.by_head"])
        (new,) = branch.add("Transpose", [by_head], [f"{part}.new"], perm=[0, 2, 1, 3])
        cache = [f"past.{layer}.{part}", new, FIRST]
        branch.nodes.append(helper.make_node("TensorScatter", cache, [branch.outputs[present]], axis=2))
        (filled,) = branch.add("Slice", [branch.outputs[present], start, END, tokens_axis], [f"{part}.filled"])
        (attended[part],) = branch.add("Cast", [filled], [f"{part}.floats"], to=TensorProto.FLOAT)
    (query,) = branch.add("Mul", [f"{branch.name}.query", f"{branch.name}.key_scale"], ["query.scaled"])
    operands = [query, attended["key"], attended["value"], "", "", IS_LATER]
    (mixed,) = branch.add("MultiHeadAttention", operands, ["mixed"], domain=CONTRIB, num_heads=heads, scale=scale)
    branch.nodes.append(helper.make_node("Mul", [mixed, f"{branch.name}.value_scale"], [branch.outputs[0]]))
    return branch.graph()


class _Branch:
    """Collects the nodes and constants of a branch, whose names begin with its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outputs = [f"{name}.{part}" for part in ("attention", "present_key", "present_value")]
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, values: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(values, f"{self.name}.{name}"))
        return f"{self.name}.{name}"

    def add(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node, and return the full names of its outputs."""
        names = [f"{self.name}.{output}" for output in outputs]
        self.nodes.append(helper.make_node(operator, inputs, names, name=names[0], **attributes))
        return names

    def graph(self) -> GraphProto:
        outputs = [helper.make_empty_tensor_value_info(output) for output in self.outputs]
        return helper.make_graph(self.nodes, self.name, [], outputs, self.constants)
