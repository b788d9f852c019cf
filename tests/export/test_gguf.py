"""GGUF files: what is in them, by the `gguf` package and transformers, and what llama.cpp makes of them."""

import resource
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from test_build import TEXT, make_model
from tiny_gpt2 import write_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import GPT2LMHeadModel

from pipeline.engine.filters import log_softmax
from pipeline.errors import UserError
from pipeline.export.gguf import PRECISIONS, read_gguf, read_license, write_gguf
from pipeline.export.reference import TorchReference
from pipeline.files import read_json, write_json
from pipeline.tokens import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, load_tokenizer, prompt_ids

TABLE_ERROR = 0.05
"""How far logits may be off: llama.cpp looks up GELU in a table of float16. A wrong scale changes whole units."""
OF_LAYERS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TABLES = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight"}
FINAL = {"ln_f.weight": "output_norm.weight", "ln_f.bias": "output_norm.bias"}
PROMPTS = ("The lamp on Gull Rock", "They say", "", "Nobody on the rock had seen the lamp go out, and nobody said so.")
AWKWARD = (
    *("", " ", "  ", "   a", "a   ", "\n", "\n\n\n", " \n \n", "\t\tx", "a\r\nb", "x \n\n  y", "a\u00a0b\u2003c"),
    *("don't I'll you'RE we've 'S", "' s '' '''", "3.14159 1,000,000 12345678901", "x1y22z333", "٣٤٥ ½ ² Ⅷ"),
    *("naïve café — “quoted” … don’t", "Ελληνικά кириллица עברית العربية", "日本語のテキスト 한국어 中文，标点。"),
    *(
        "🙂🙃 👩‍👩‍👧‍👦 🇫🇷",
        "e\u0301 \u200d\ufeff",
        "\x00\x01\x7f",
        "ﬁ Å Å",
        "<|endoftext|>",
        "a<|endoftext|>b",
        "#!?.,;:--__",
    ),
)


def name_of(key: str) -> str:
    """The name in GGUF of a weight of transformers."""
    if not key.startswith("h."):
        return (TABLES | FINAL)[key]
    _, layer, rest = key.split(".", 2)
    stem, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{OF_LAYERS[stem]}.{kind}"


@pytest.fixture
def written(tiny_checkpoint: Path, tiny_model: GPT2LMHeadModel, tmp_path: Path) -> Callable[[str], Path]:
    def write(precision: str) -> Path:
        file = tmp_path / f"tiny-{precision}.gguf"
        write_gguf(tiny_model, tiny_checkpoint, file, precision)
        return file

    return write


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_file_holds_every_weight_of_the_checkpoint(
    precision: str, tiny_model: GPT2LMHeadModel, written: Callable[[str], Path]
) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written(precision)).tensors}
    state = tiny_model.transformer.state_dict()
    assert set(tensors) == set(map(name_of, state))
    for key, weight in state.items():
        tensor = tensors[name_of(key)]
        expected = weight.numpy() if weight.ndim == 1 or key in TABLES else weight.numpy().T
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # GGUF states the shape of a row first.
        assert tuple(tensor.shape) == expected.shape[::-1]
        if weight.ndim == 1 or key == "wpe.weight" or precision == "f32":
            assert tensor.tensor_type == Kind.F32
            np.testing.assert_array_equal(found, expected)
        elif precision == "f16":
            np.testing.assert_array_equal(found, expected.astype(np.float16))
        else:
            is_8_bit = precision == "q8_0" or key == "wte.weight"
            assert tensor.tensor_type == (Kind.Q8_0 if is_8_bit else Kind.Q4_0)
            blocks, rounded = expected.reshape(-1, 32), found.reshape(-1, 32)
            # Half a step, and a bit for the float16 of the step; 4 bits clip the side opposite to the largest by one.
            step = np.abs(blocks).max(axis=1, keepdims=True) / (127 if is_8_bit else 8)
            assert (np.abs(blocks - rounded) <= step * (0.57 if is_8_bit else 1.01)).all()


def test_the_file_holds_shape_and_tokenizer(
    tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, written: Callable[[str], Path]
) -> None:
    file = written("q8_0")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert fields["general.name"] == "tiny-q8_0"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    shape = {"context_length": 64, "embedding_length": 32, "feed_forward_length": 128, "block_count": 2}
    assert {name: fields[f"gpt2.{name}"] for name in shape} == shape
    assert fields["gpt2.attention.head_count"] == 2
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    tokenizer = {
        name.removeprefix("tokenizer.ggml."): value for name, value in fields.items() if name.startswith("tokenizer.")
    }
    assert tokenizer.pop("tokens") == [tiny_tokenizer.id_to_token(token_id) for token_id in range(300)]
    assert tokenizer.pop("token_type") == [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 299
    merges = read_json(tiny_checkpoint / TOKENIZER_FILE)["model"]["merges"]
    assert tokenizer.pop("merges") == [" ".join(merge) for merge in merges]
    assert tokenizer == {
        "model": "gpt2",
        "pre": "gpt-2",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
    }


SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"n_inner": 80},
    {"n_embd": 96, "n_head": 3},
    {"layer_norm_epsilon": 0.1},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
    {"n_layer": 1, "n_head": 1},
    {"vocab_size": 301},
    {"activation_function": "gelu_pytorch_tanh"},
)


@pytest.fixture(params=SHAPES, ids=str)
def shaped(
    request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path: Path, one_thread: None
) -> tuple[GPT2LMHeadModel, Path]:
    """A model of each shape, and its file in float32."""
    model = make_model(**request.param)
    write_gguf(model, tokenizer_folder, tmp_path / "model.gguf", "f32")
    return model, tmp_path / "model.gguf"


def test_any_shape_of_gpt2_is_read_back_as_it_was(shaped: tuple[GPT2LMHeadModel, Path]) -> None:
    model, file = shaped
    expected = TorchReference(model).logits(TEXT)
    found = TorchReference(read_gguf(file, model.config)).logits(TEXT)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_transformers_reads_the_file_too(tiny_model: GPT2LMHeadModel, written: Callable[[str], Path]) -> None:
    for precision in PRECISIONS:
        file = written(precision)
        theirs = GPT2LMHeadModel.from_pretrained(file.parent, gguf_file=file.name, config=tiny_model.config)
        np.testing.assert_array_equal(
            TorchReference(theirs.eval()).logits(TEXT),
            TorchReference(read_gguf(file, tiny_model.config)).logits(TEXT),
        )


@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_rows_that_blocks_do_not_divide_are_kept_in_half(
    precision: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Width 48 is no multiple of 32; the inner width of 64 is.
    model = make_model(n_inner=64)
    file = tmp_path / "model.gguf"
    write_gguf(model, tokenizer_folder, file, precision)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.2.ffn_down.weight"] == Kind[precision.upper()]
    assert kinds["blk.2.ffn_up.weight"] == kinds["token_embd.weight"] == Kind.F16
    assert capsys.readouterr().out == (
        f"{file}: 10 tensors are in f16, because {precision} needs rows of a multiple of 32: token_embd.weight, …\n"
    )


def test_the_same_checkpoint_gives_the_same_bytes(
    tiny_checkpoint: Path, tiny_model: GPT2LMHeadModel, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        write_gguf(tiny_model, tiny_checkpoint, tmp_path / name / "tiny.gguf", "q4_0")
    assert (tmp_path / "first/tiny.gguf").read_bytes() == (tmp_path / "second/tiny.gguf").read_bytes()


def test_what_cannot_be_written_leaves_the_file_as_it_was(
    tiny_checkpoint: Path, tiny_model: GPT2LMHeadModel, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, tiny_checkpoint, file, "f32")
    before = file.read_bytes()
    with torch.no_grad():
        tiny_model.transformer.h[1].mlp.c_fc.weight[3, 5] = 1e5
    with pytest.raises(UserError, match=r"^precision: blk\.1\.ffn_up\.weight is out of the range of f16; use f32$"):
        write_gguf(tiny_model, tiny_checkpoint, file, "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    assert file.read_bytes() == before
    write_gguf(tiny_model, tiny_checkpoint, file, "q8_0")


def test_a_full_disk_leaves_nothing(tiny_checkpoint: Path, tiny_model: GPT2LMHeadModel, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"^{file}: cannot be written \(.*\); free space on the disk$"):
            write_gguf(tiny_model, tiny_checkpoint, file, "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("model", "f32", r"model: must be a file whose name ends in \.gguf"),
        ("folder.gguf", "f32", r"folder\.gguf: must be a file"),
        ("model.gguf", "int8", "precision: 'int8' is none of f32, f16, q8_0, q4_0"),
        ("model.gguf", "f32,f16", "precision: 'f32,f16' is none of"),
    ],
)
def test_targets_that_are_none_are_refused(
    name: str, precision: str, message: str, tiny_checkpoint: Path, tiny_model: GPT2LMHeadModel, tmp_path: Path
) -> None:
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UserError, match=message):
        write_gguf(tiny_model, tiny_checkpoint, tmp_path / name, precision)


def test_a_model_that_llama_cpp_lacks_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="activation_function 'relu'"):
        write_gguf(make_model(activation_function="relu"), tokenizer_folder, tmp_path / "model.gguf", "f32")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "it changes characters first"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it does not split texts as GPT-2's does"),
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, "it does not split texts as GPT-2's does"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "it puts a space before a text"),
        ({"model": {"dropout": 0.1}}, "it leaves out merges at random"),
        ({"model": {"ignore_merges": True}}, "it takes whole words before merges"),
        ({"model": {"continuing_subword_prefix": "##"}}, "it marks the parts of words"),
        ({"added_tokens": {"lstrip": True}}, "its added tokens take spaces with them"),
    ],
    ids=str,
)
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(
    changes: dict[str, Any], message: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    content = read_json(tokenizer_folder / TOKENIZER_FILE)
    for name, value in changes.items():
        if name == "model":
            content["model"] |= value
        elif name == "added_tokens":
            content["added_tokens"][0] |= value
        else:
            content[name] = value
    write_json(tokenizer_folder / TOKENIZER_FILE, content)
    with pytest.raises(UserError, match=message):
        write_gguf(make_model(), tokenizer_folder, tmp_path / "model.gguf", "f32")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("card", "expected"),
    [(None, None), ("# A model", None), ("---\nlicense: mit\n---\n# A model", "mit"), ("---\ntags: [a]\n---\n", None)],
)
def test_the_licence_is_that_of_the_model_card(card: str | None, expected: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == expected


def test_a_model_card_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(UserError, match=r"README\.md: its header is not YAML"):
        read_license(tmp_path)


def test_the_licence_is_in_the_file(tiny_checkpoint: Path, tiny_model: GPT2LMHeadModel, tmp_path: Path) -> None:
    write_gguf(tiny_model, tiny_checkpoint, tmp_path / "tiny.gguf", "f32", license_id="mit")
    assert gguf.GGUFReader(tmp_path / "tiny.gguf").fields["general.license"].contents() == "mit"


class LlamaCpp:
    """A file in llama.cpp, on one thread, with its cache in float32."""

    def __init__(self, file: Path) -> None:
        llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra bench)")
        self.llama = llama_cpp.Llama(
            str(file), n_ctx=0, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, type_k=0, type_v=0
        )

    def close(self) -> None:
        self.llama.close()

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        self.llama.reset()
        self.llama.eval(ids)
        return np.array(self.llama.scores[: len(ids)])

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        output: list[int] = []
        self.llama.reset()
        fed = ids
        while len(output) < new_tokens:
            self.llama.eval(fed)
            fed = [int(np.argmax(self.llama.scores[self.llama.n_tokens - 1]))]
            output += fed
        return output

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a prompt, with what llama.cpp puts before it."""
        return list(self.llama.tokenize(text.encode(), add_bos=True, special=False))


@pytest.fixture
def llama(written: Callable[[str], Path]) -> Iterator[LlamaCpp]:
    with closing(LlamaCpp(written("f32"))) as opened:
        yield opened


def test_llama_cpp_says_what_pytorch_says(
    llama: LlamaCpp, tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer
) -> None:
    reference = TorchReference(tiny_model)
    for prompt in PROMPTS:
        ids = prompt_ids(tiny_tokenizer, prompt)
        np.testing.assert_allclose(llama.logits(ids), reference.logits(ids), atol=TABLE_ERROR, rtol=0)
        assert llama.greedy(ids, 24) == reference.greedy(ids, 24)


def test_llama_cpp_runs_any_shape_of_gpt2(shaped: tuple[GPT2LMHeadModel, Path]) -> None:
    model, file = shaped
    with closing(LlamaCpp(file)) as llama:
        np.testing.assert_allclose(llama.logits(TEXT), TorchReference(model).logits(TEXT), atol=TABLE_ERROR, rtol=0)


@pytest.mark.parametrize(("precision", "nats"), [("f16", 1e-4), ("q8_0", 0.01), ("q4_0", 0.5)])
def test_llama_cpp_is_near_pytorch_in_fewer_bits(
    precision: str, nats: float, tiny_model: GPT2LMHeadModel, written: Callable[[str], Path]
) -> None:
    expected = log_softmax(TorchReference(tiny_model).logits(TEXT))
    with closing(LlamaCpp(written(precision))) as llama:
        found = log_softmax(llama.logits(TEXT))
    assert (np.exp(expected) * (expected - found)).sum(axis=1).mean() < nats


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_llama_cpp_reads_a_prompt_as_the_engine_does(text: str, llama: LlamaCpp, tiny_tokenizer: Tokenizer) -> None:
    assert llama.tokenize(text) == prompt_ids(tiny_tokenizer, text)


def test_llama_cpp_reads_any_text_as_the_engine_does(llama: LlamaCpp, tiny_tokenizer: Tokenizer) -> None:
    @settings(max_examples=500)
    @given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
    def check(text: str) -> None:
        assert llama.tokenize(text) == prompt_ids(tiny_tokenizer, text)

    check()


@pytest.mark.parametrize("splits", [True, False])
def test_llama_cpp_reads_added_tokens_as_the_engine_does(splits: bool, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / TOKENIZER_FILE))
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.add_tokens([AddedToken("<note>", normalized=False)])
    tokenizer.save(str(tokenizer_folder / TOKENIZER_FILE))
    write_json(tokenizer_folder / TOKENIZER_CONFIG_FILE, {"split_special_tokens": splits})
    write_gguf(make_model(vocab_size=302), tokenizer_folder, tmp_path / "model.gguf", "f32")
    text = "a <|user|> says<note> it<|endoftext|>"
    with closing(LlamaCpp(tmp_path / "model.gguf")) as llama:
        assert llama.tokenize(text) == prompt_ids(load_tokenizer(tokenizer_folder), text)


def test_llama_cpp_rounds_as_we_do(written: Callable[[str], Path], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra bench)")
    import ctypes

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    theirs = tmp_path / "theirs.gguf"
    code = llama_cpp.llama_model_quantize(str(written("f32")).encode(), str(theirs).encode(), ctypes.byref(params))
    assert code == 0
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(written("q8_0")).tensors}
    for tensor in gguf.GGUFReader(theirs).tensors:
        assert tensor.tensor_type == ours[tensor.name].tensor_type
        np.testing.assert_array_equal(tensor.data, ours[tensor.name].data)
