"""Engines of GPT-2s of other shapes than OpenAI's, against PyTorch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_gpt2 import write_checkpoint, write_tokenizer
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.export.build import build_engine, check_precisions
from pipeline.files import write_json
from pipeline.tokens import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, tokenizer_sha256

TEXT = [(19 * index) % 300 for index in range(24)]


def make_model(**changes: Any) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=48, n_layer=3, n_head=3, initializer_range=0.3)
    config.update(changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        # transformers' SDPA leaves out how a config scales attention.
        return GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": 80},
        {"layer_norm_epsilon": 0.1},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"n_head": 1},
        {"n_layer": 1},
        {"vocab_size": 301},
        {"activation_function": "gelu_pytorch_tanh"},
    ],
    ids=str,
)
def test_any_shape_of_gpt2_says_what_pytorch_says(changes: dict[str, Any], tokenizer: Path, tmp_path: Path) -> None:
    model = make_model(**changes)
    build_engine(model, tokenizer, tmp_path / "engine", ["float32"])
    engine = Engine.load(tmp_path / "engine", provider="cpu", threads=1)
    with torch.inference_mode():
        expected = model(torch.tensor([TEXT])).logits[0].numpy()
    np.testing.assert_allclose(engine.session.read(TEXT, 0)[0], expected, atol=2e-4, rtol=0)
    engine.session.prefill(0, TEXT[:-1], 0)
    engine.session.decode(TEXT[-1:], [len(TEXT) - 1])
    np.testing.assert_allclose(engine.session.logits[0], expected[-1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("splits", [True, False])
def test_the_engine_reads_special_tokens_as_the_checkpoint_does(splits: bool, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / TOKENIZER_FILE))
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.save(str(tmp_path / TOKENIZER_FILE))
    write_json(tmp_path / TOKENIZER_CONFIG_FILE, {"split_special_tokens": splits})
    build_engine(make_model(vocab_size=301), tmp_path, tmp_path / "engine", ["float32"])
    loaded = TextGenerator.load(tmp_path / "engine", provider="cpu", threads=1).tokenizer
    assert ("<|user|>" in loaded.encode("<|user|>").tokens) is not splits
    assert tokenizer_sha256(tmp_path / "engine") == tokenizer_sha256(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu' is not GPT-2's"),
        ({"add_cross_attention": True}, "add_cross_attention is set"),
    ],
)
def test_what_the_graph_cannot_say_is_refused(
    changes: dict[str, Any], message: str, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build_engine(make_model(**changes), tokenizer, tmp_path / "engine", ["float32"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precisions", [[], ["int3"], ["int8", "int8"]])
def test_precisions_that_are_none_are_refused(precisions: list[str]) -> None:
    with pytest.raises(UserError, match=r"^precision: "):
        check_precisions(precisions)


def test_tied_weights_are_once_in_the_file(tiny_engine_folder: Path, tmp_path: Path) -> None:
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    for name, model in (("tied", tied), ("untied", untied)):
        write_tokenizer(tmp_path / name)
        build_engine(model, tmp_path / name, tmp_path / name / "engine", ["float32", "int8"])
    table_bytes = 300 * 48
    for precision, bytes_per_weight in (("float32", 4), ("int8", 1)):
        sizes = {
            name: (tmp_path / name / "engine" / precision / "model.data").stat().st_size for name in ("tied", "untied")
        }
        assert sizes["untied"] - sizes["tied"] >= table_bytes * bytes_per_weight


@pytest.mark.parametrize(("precision", "kernels"), [("float32", 14), ("float16", 10), ("int8", 10), ("int4", 10)])
def test_each_layer_is_few_kernels(precision: str, kernels: int, tiny_engine_folder: Path) -> None:
    graph = onnx.load(tiny_engine_folder / precision / "model.onnx", load_external_data=False).graph
    layer = [node.op_type for node in graph.node if node.name.startswith("h.0.")]
    assert len(layer) <= kernels
    # On a cache of 8 bits, a branch reads one token per row with it, and another reads prompts.
    assert layer.count("GroupQueryAttention" if precision.startswith("float") else "If") == 1


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_after_the_last_attention_only_the_wanted_tokens_are_computed(precision: str, tiny_engine_folder: Path) -> None:
    graph = onnx.load(tiny_engine_folder / precision / "model.onnx", load_external_data=False).graph
    nodes = {node.name: node for node in graph.node}
    picked = [node.name for node in graph.node if "logit_rows" in node.input]
    assert picked == ["h.1.attention.wanted", "h.1.ln_1.sum.wanted"]
    assert nodes["h.1.attn.c_proj" if precision != "float32" else "h.1.attn.c_proj.product"].input[0] == picked[0]
    assert picked[1] in next(node for node in graph.node if "h.1.ln_2.sum" in node.output).input


@pytest.mark.parametrize("precision", ["float16", "int8_float16"])
def test_a_graph_for_cuda_can_be_captured(precision: str, tiny_engine_folder: Path) -> None:
    graph = onnx.load(tiny_engine_folder / precision / "model.onnx", load_external_data=False).graph
    assert not {node.op_type for node in graph.node} & {"If", "Loop", "Scan", "Shape", "Range", "NonZero"}


def test_a_cache_of_8_bits_says_nearly_the_same_in_a_quarter_of_the_memory(tokenizer: Path, tmp_path: Path) -> None:
    model = make_model()
    for name, bits in (("full", 32), ("small", 8)):
        build_engine(model, tokenizer, tmp_path / name, ["int8"], cache_bits=bits)
    full, small = (Engine.load(tmp_path / name, provider="cpu", threads=1) for name in ("full", "small"))
    expected, found = (engine.session.read(TEXT, 0)[0] for engine in (full, small))
    assert 0 < np.abs(found - expected).mean() < 0.05 * expected.std()
    small.session.prefill(0, TEXT[:10], 0)
    small.session.prefill(1, TEXT[:5], 0)
    small.session.decode([TEXT[10], TEXT[5]], [10, 5])
    assert np.abs(small.session.logits[:2] - found[[10, 5]]).mean() < 0.05 * expected.std()
    sizes = [sum(buffer.array.nbytes for buffer in engine.session._cache.values()) for engine in (full, small)]
    assert sizes[0] == 4 * sizes[1]
    params = SamplingParams(seed=1, n=3, max_new_tokens=6)
    assert small.generate([TEXT[:8]], params)[:1] == small.generate([TEXT[:8]], replace(params, n=1))


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    for name in ("first", "second"):
        build_engine(model, checkpoint, tmp_path / name, ["int4", "float32"])
    files = [file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*") if file.is_file()]
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
