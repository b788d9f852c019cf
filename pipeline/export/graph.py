"""GPT-2 as an ONNX graph for serving: one graph for prefill and decode, with its KV cache updated in place.

Inputs, for `rows` sequences of `tokens` new tokens each:

- `input_ids`, `position_ids`: int64 `[rows, tokens]`;
- `last_positions`: int32 `[rows]`, the position of each row's last new token, and `total_tokens`: int32 scalar, the
  largest of them plus one. Both bound what attention reads;
- `logit_rows`: int64 `[wanted]`, those of the `rows * tokens` new tokens for which logits are wanted;
- `past.N.key`, `past.N.value`: `[rows, heads, context, head width]`, the whole buffer of layer N.

Outputs:

- `logits`: float32 `[wanted, vocabulary]`;
- `states`: `[wanted, width]` in the graph's own floats, the last hidden states, from which the logits are computed; an
  output that is not bound costs nothing;
- `top_logits`, `top_ids`: float32 and int64 `[wanted, listed]`, the likeliest tokens in descending order, if the host
  draws;
- `present.N.key`, `present.N.value`: bound to the memory of `past`. A step writes its tokens' keys and values into it,
  and nothing is copied.

With a past, more than one new token is possible only for a single row.

Where ONNX Runtime's own operators (`com.microsoft`) fuse what GPT-2 does, they are used: CPU and CUDA have all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipeline.engine.manifest import CUDA_PRECISIONS, STATES, listed_tokens
from pipeline.export.attention import CONTRIB, END, FIRST, IS_LATER, IS_STEP, CacheScales, attention_node
from pipeline.export.forms import HEAD, Form, Forms
from pipeline.export.quantization import Quantized, quantize

WEIGHTS_FILE = "model.data"
OPSET = 24
ALIGNMENT = 4096
"""The alignment of weights, in bytes: each begins on a page of memory, into which the file is mapped."""
INT8_ACTIVATIONS = 4
"""The `accuracy_level` of MatMulNBits that multiplies integers, with activations rounded to 8 bits per block."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parts of a GPT-2's config that shape its graph."""

    context_length: int
    vocabulary_size: int
    layers: int
    heads: int
    width: int
    epsilon: float
    attention_scales: tuple[float, ...]
    """The factor of each layer's attention scores."""

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def write_graph(
    folder: Path,
    graph_file: str,
    weights: Mapping[str, Floats],
    shape: Shape,
    precision: str,
    forms: Forms,
    cache_scales: Sequence[CacheScales] | None = None,
    moments: Iterator[Mapping[str, Floats]] | None = None,
) -> None:
    """Write the graph and its weights to `folder`.

    `weights` are those of a `GPT2LMHeadModel` in float32, by transformers' names without `transformer.`; an untied head
    is `lm_head.weight`. Products that `forms` does not name have floats. `cache_scales`, one per layer, make it an
    8-bit cache. `moments`, those of the inputs of each layer's products, make products of 4 bits more exact.
    """
    with GraphWriter(folder, precision, forms, cache_scales) as graph:
        hidden, residual = embed(graph, weights)
        if cache_scales is not None:
            graph.place_prompt()
        for layer in range(shape.layers):
            graph.moments = {} if moments is None else next(moments)
            hidden, residual = block(graph, weights, shape, layer, hidden, residual)
        head(graph, weights, shape, hidden, residual)
        graph.save(graph_file, shape)


def embed(graph: "GraphWriter", weights: Mapping[str, Floats]) -> tuple[str, str]:
    """Add the embeddings, and return the position's and the token's vector, to be summed."""
    token = graph.embedding("wte", weights["wte.weight"], "input_ids")
    return graph.add("Gather", [graph.weight("wpe", weights["wpe.weight"]), "position_ids"], "position"), token


def block(
    graph: "GraphWriter", weights: Mapping[str, Floats], shape: Shape, layer: int, hidden: str, residual: str
) -> tuple[str, str]:
    """Add a transformer block, and return its output and the residual, which the next normalization sums.

    Both are `[rows, tokens, width]`, and `[wanted, width]` after the last block.
    """
    name = f"h.{layer}"
    bias = f"h.{layer - 1}.mlp.c_proj.bias" if layer else None
    normed, residual = graph.normalize(f"{name}.ln_1", weights, shape, hidden, residual, bias)
    qkv = graph.linear(f"{name}.attn.c_attn", weights, normed, with_bias=True)
    attention = graph.attention(name, shape, layer, qkv)
    if layer == shape.layers - 1:
        # What follows changes neither keys nor values, so it is computed only where logits are wanted.
        attention, residual = graph.pick(attention, shape), graph.pick(residual, shape)
    projected = graph.linear(f"{name}.attn.c_proj", weights, attention)
    normed, residual = graph.normalize(f"{name}.ln_2", weights, shape, projected, residual, f"{name}.attn.c_proj.bias")
    expanded = graph.linear(f"{name}.mlp.c_fc", weights, normed)
    activated = graph.activate(f"{name}.mlp.gelu", weights, expanded, f"{name}.mlp.c_fc.bias")
    return graph.linear(f"{name}.mlp.c_proj", weights, activated), residual


def head(graph: "GraphWriter", weights: Mapping[str, Floats], shape: Shape, hidden: str, residual: str) -> None:
    """Add the last normalization and the logits."""
    bias = f"h.{shape.layers - 1}.mlp.c_proj.bias"
    states, _ = graph.normalize("ln_f", weights, shape, hidden, residual, bias, output=STATES)
    graph.unembed(states, weights.get("lm_head.weight", weights["wte.weight"]), tied="lm_head.weight" not in weights)
    if graph.precision not in CUDA_PRECISIONS:
        listed = graph.constant("listed", np.array([listed_tokens(shape.vocabulary_size)]))
        graph.nodes.append(helper.make_node("TopK", ["logits", listed], ["top_logits", "top_ids"], name="top_logits"))


class GraphWriter:
    """Collects nodes, and writes each weight to the file of weights at once, so that memory holds one at a time."""

    def __init__(
        self,
        folder: Path,
        precision: str,
        forms: Forms,
        cache_scales: Sequence[CacheScales] | None,
    ) -> None:
        self.folder = folder
        self.cache_scales = cache_scales
        self.forms = forms
        self.precision = precision
        self.moments: Mapping[str, Floats] = {}
        self.float_type = np.float16 if precision in CUDA_PRECISIONS else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.file: BinaryIO = (folder / WEIGHTS_FILE).open("wb")

    @property
    def is_for_cuda(self) -> bool:
        """Whether the graph is for CUDA. There it is faster if the operator after a linear map adds its bias."""
        return self.float_type is np.float16

    def __enter__(self) -> "GraphWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node with one output, and return the output's name."""
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, values: Floats) -> str:
        return self.store(name, values.astype(self.float_type))

    def store(self, name: str, values: NDArray[Any], same_as: str | None = None) -> str:
        """Add an initializer in the file of weights, or one that shares the bytes of `same_as`."""
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        if same_as is not None:
            tensor.external_data.extend(self.initializers[same_as].external_data)
        else:
            self.file.write(bytes(-self.file.tell() % ALIGNMENT))
            place = {"location": WEIGHTS_FILE, "offset": self.file.tell(), "length": values.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self.file.write(np.ascontiguousarray(values).data)
        self.initializers[name] = tensor
        return name

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add an initializer in the graph itself."""
        self.initializers[name] = onnx.numpy_helper.from_array(values, name)
        return name

    def place_prompt(self) -> None:
        """Add what `attention_node` needs on an 8-bit cache: where the new tokens are, and what is later than each."""
        tokens = self.add("Shape", ["input_ids"], "tokens", start=1)
        self.add("Equal", [tokens, self.constant("one_token", np.array([1]))], IS_STEP)
        self.add("Gather", ["position_ids", self.constant("first_token", np.array(0))], FIRST, axis=1)
        total = self.add("Cast", ["total_tokens"], "total.scalar", to=TensorProto.INT64)
        self.add("Unsqueeze", [total, self.constant("total_axis", np.array([0]))], END)
        bounds = [self.constant("from", np.array(0)), total, self.constant("by", np.array(1))]
        places = self.add("Unsqueeze", ["position_ids", self.constant("place_axes", np.array([1, 3]))], "places")
        later = self.add("Greater", [self.add("Range", bounds, "all_places"), places], "later")
        bias = [self.constant("hidden", np.array(-np.inf, np.float32)), self.constant("seen", np.array(0, np.float32))]
        self.add("Where", [later, *bias], IS_LATER)

    def embedding(self, name: str, table: Floats, indices: str) -> str:
        """Add a lookup of rows of the table `[entries, width]`."""
        form = self.forms.get(HEAD)
        if form is None or self.is_for_cuda:
            return self.add("Gather", [self.weight(name, table), indices], f"{name}.rows")
        kept = self.store_quantized(name, table.T, form)
        # The same bytes, in the shape that the embedding needs.
        flat = self.store(f"{name}.table", kept.values.reshape(len(table), -1), same_as=f"{name}.values")
        scales = self.store(f"{name}.table_scales", kept.scales, same_as=f"{name}.scales")
        return self.add(
            "GatherBlockQuantized",
            [flat, indices, scales],
            f"{name}.rows",
            domain=CONTRIB,
            bits=kept.bits,
            block_size=kept.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def linear(self, name: str, weights: Mapping[str, Floats], hidden: str, *, with_bias: bool = False) -> str:
        """Add `hidden @ weight`, and the bias unless the next operator adds it; with `with_bias` it does not."""
        weight = weights[f"{name}.weight"]
        bias = None if self.is_for_cuda and not with_bias else self.weight(f"{name}.bias", weights[f"{name}.bias"])
        product = f"{name}.product" if bias else name
        form = self.forms.get(name)
        if form is None:
            self.add("MatMul", [hidden, self.weight(f"{name}.weight", weight)], product)
        else:
            self.store_quantized(name, weight, form)
            if not self.is_for_cuda:
                return self.multiply_quantized(name, form.bits, hidden, name, bias)
            self.multiply_quantized(name, form.bits, hidden, product, None)
        return self.add("Add", [product, bias], name) if bias else product

    def store_quantized(self, name: str, weight: Floats, form: Form) -> Quantized:
        """Quantize a weight `[inputs, outputs]`, and store its values and scales."""
        kept = quantize(weight, form.bits, form.block, self.moments.get(name) if form.is_compensated else None)
        self.store(f"{name}.values", kept.values)
        self.store(f"{name}.scales", kept.scales.astype(self.float_type))
        return kept

    def multiply_quantized(self, name: str, bits: int, hidden: str, output: str, bias: str | None) -> str:
        """Add the product of `hidden` and a weight that `store_quantized` has stored."""
        outputs, blocks, block_bytes = self.initializers[f"{name}.values"].dims
        block = block_bytes * 8 // bits
        operands = [hidden, f"{name}.values", f"{name}.scales", *(["", "", bias] if bias else [])]
        return self.add(
            "MatMulNBits",
            operands,
            output,
            domain=CONTRIB,
            K=blocks * block,
            N=outputs,
            bits=bits,
            block_size=block,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def pick(self, hidden: str, shape: Shape) -> str:
        """Add the choice of the wanted tokens, `[wanted, width]`, from `hidden` `[rows, tokens, width]`."""
        flat = self.add("Reshape", [hidden, self.constant("flat", np.array([-1, shape.width]))], f"{hidden}.flat")
        return self.add("Gather", [flat, "logit_rows"], f"{hidden}.wanted")

    def normalize(
        self,
        name: str,
        weights: Mapping[str, Floats],
        shape: Shape,
        hidden: str,
        residual: str,
        bias: str | None,
        *,
        output: str | None = None,
    ) -> tuple[str, str]:
        """Sum `hidden`, its `bias` and the residual, and return the normalized sum, named `output`, and the sum.

        `SkipLayerNormalization` does all of it, but on the processor it takes four times as long as the two operators
        that it fuses.
        """
        scale, shift = (self.weight(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        total, output = f"{name}.sum", output or name
        if bias is None or not self.is_for_cuda:
            self.add("Add", [residual, hidden], total)
            return self.add("LayerNormalization", [total, scale, shift], output, epsilon=shape.epsilon), total
        operands = [residual, hidden, scale, shift, self.weight(bias, weights[bias])]
        self.nodes.append(
            helper.make_node(
                "SkipLayerNormalization",
                operands,
                [output, "", "", total],
                name=name,
                domain=CONTRIB,
                epsilon=shape.epsilon,
            )
        )
        return output, total

    def activate(self, name: str, weights: Mapping[str, Floats], hidden: str, bias: str) -> str:
        operands = [hidden, self.weight(bias, weights[bias])] if self.is_for_cuda else [hidden]
        return self.add("FastGelu", operands, name, domain=CONTRIB)

    def attention(self, name: str, shape: Shape, layer: int, qkv: str) -> str:
        """Add causal attention over the cache, to which the new keys and values are written first."""
        scales = None if self.cache_scales is None else self.cache_scales[layer]
        scale = shape.attention_scales[layer]
        self.nodes.append(attention_node(f"{name}.attention", qkv, layer, shape.heads, scale, scales))
        return f"{name}.attention"

    def unembed(self, hidden: str, table: Floats, *, tied: bool) -> None:
        """Add the logits in float32: the table `[vocabulary, width]` times `hidden`."""
        form = self.forms.get(HEAD)
        # On CUDA the table that is looked up in stays in floats.
        is_shared = tied and (form is None or not self.is_for_cuda)
        name = "wte" if is_shared else "lm_head"
        logits = "logits" if self.float_type is np.float32 else "logits.half"
        if form is not None:
            if not is_shared:
                self.store_quantized(name, table.T, form)
            self.multiply_quantized(name, form.bits, hidden, logits, None)
        else:
            if not is_shared:
                self.weight(name, table)
            self.add("Gemm", [hidden, name], logits, transB=1)
        if logits != "logits":
            self.add("Cast", [logits], "logits", to=TensorProto.FLOAT)

    def save(self, graph_file: str, shape: Shape) -> None:
        cache_type = np.int8 if self.cache_scales is not None else self.float_type
        element = helper.np_dtype_to_tensor_dtype(np.dtype(cache_type))
        cache = [
            helper.make_tensor_value_info(f"{time}.{layer}.{part}", element,
                                          ["rows", shape.heads, shape.context_length, shape.head_width])
            for time in ("past", "present") for layer in range(shape.layers) for part in ("key", "value")
        ]  # fmt: skip
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", "tokens"]),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["rows", "tokens"]),
            helper.make_tensor_value_info("last_positions", TensorProto.INT32, ["rows"]),
            helper.make_tensor_value_info("total_tokens", TensorProto.INT32, []),
            helper.make_tensor_value_info("logit_rows", TensorProto.INT64, ["wanted"]),
            *cache[: len(cache) // 2],
        ]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["wanted", shape.vocabulary_size])
        listed: list[str | int] = ["wanted", listed_tokens(shape.vocabulary_size)]
        top = [
            helper.make_tensor_value_info("top_logits", TensorProto.FLOAT, listed),
            helper.make_tensor_value_info("top_ids", TensorProto.INT64, listed),
        ]
        floats = helper.np_dtype_to_tensor_dtype(np.dtype(self.float_type))
        states = helper.make_tensor_value_info(STATES, floats, ["wanted", shape.width])
        outputs = [logits, states, *(top if self.precision not in CUDA_PRECISIONS else []), *cache[len(cache) // 2 :]]
        graph = helper.make_graph(self.nodes, "gpt2", inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="gpt2-pipeline")
        (self.folder / graph_file).write_bytes(model.SerializeToString())
