"""Checkpoints: what is written, what is refused, and the error message for each."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline.checkpoint import load_checkpoint, pack_checkpoint, plain_checkpoint, save_model
from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.tokens import load_tokenizer

ROOT = Path(__file__).parents[1]


def make_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=8))


def save(model: GPT2LMHeadModel, tokenizer: Path, folder: Path) -> None:
    save_model(model, folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)


def test_a_model_is_read_as_it_was_written_in_one_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = make_model()
    save(model, tiny_checkpoint, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    read = load_checkpoint(tmp_path)
    assert not read.training
    assert all(torch.equal(own, other) for own, other in zip(model.parameters(), read.parameters(), strict=True))


def test_a_packed_checkpoint_is_half_as_large_and_says_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pack_checkpoint(tiny_checkpoint, tmp_path / "base")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tiny_checkpoint, tmp_path / "base")]
    assert sizes[1] < 0.52 * sizes[0]
    packed, own = load_checkpoint(tmp_path / "base"), load_checkpoint(tiny_checkpoint)
    assert packed.dtype == torch.float32
    assert all(torch.equal(a.half().float(), b) for a, b in zip(own.parameters(), packed.parameters(), strict=True))
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()


def test_what_float16_does_not_hold_is_not_packed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = 70_000
    save(model, tiny_checkpoint, tmp_path / "large")
    with pytest.raises(UserError, match=r"large: weights are out of the range of float16: transformer\.wpe\.weight;"):
        pack_checkpoint(tmp_path / "large", tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


Weights = dict[str, torch.Tensor]


def write_weights(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def prefixed(*prefixes: str) -> Callable[[Path, Weights], None]:
    def write(folder: Path, weights: Weights) -> None:
        write_weights(folder, {"".join(prefixes) + name: weight for name, weight in weights.items()})

    return write


def compile_blocks(folder: Path, weights: Weights) -> None:
    write_weights(folder, {re.sub(r"(h\.\d)\.", r"\1._orig_mod.", name): weight for name, weight in weights.items()})


def pickle_weights(folder: Path, weights: Weights) -> None:
    tied = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    (folder / "model.safetensors").unlink()
    torch.save({f"module.{name}": weight for name, weight in tied.items()}, folder / "pytorch_model.bin")
    # As transformers wrote it in 2019.
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()


def pickle_shards(folder: Path, weights: Weights) -> None:
    (folder / "model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(weights)}
    for file in set(files.values()):
        torch.save({name: weight for name, weight in weights.items() if files[name] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": files})


def pad_vocabulary(folder: Path, weights: Weights) -> None:
    embedding = weights["transformer.wte.weight"]
    padded = torch.cat([embedding, torch.randn(20, embedding.shape[1])])
    write_weights(folder, {**weights, "transformer.wte.weight": padded, "lm_head.weight": padded.clone()})


def pad_vocabulary_and_config(folder: Path, weights: Weights) -> None:
    pad_vocabulary(folder, weights)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"vocab_size": 320})


LAYOUTS: dict[str, tuple[Callable[[Path, Weights], None], str]] = {
    "torch.compile": (prefixed("_orig_mod."), "read the weights without _orig_mod. in their names"),
    "DataParallel": (prefixed("module."), "read the weights without module. in their names"),
    "merged PEFT": (prefixed("base_model.model."), "read the weights without base_model.model. in their names"),
    "both": (prefixed("module.", "_orig_mod."), "read the weights without _orig_mod., module. in their names"),
    "compiled blocks": (compile_blocks, "read the weights without _orig_mod. in their names"),
    "pickled, with vocab.json": (pickle_weights, "read the weights without module. in their names"),
    "pickled shards": (pickle_shards, ""),
    "padded weights": (pad_vocabulary, "cut the vocabulary from 320 to the 300 tokens of the tokenizer"),
    "padded vocabulary": (pad_vocabulary_and_config, "cut the vocabulary from 320 to the 300 tokens of the tokenizer"),
}


@pytest.fixture
def copied(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed, with the tokenizer in both forms."""
    folder = tmp_path / "copied"
    shutil.copytree(tiny_checkpoint, folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_is_the_same_model_with_its_tokenizer(
    layout: str, copied: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = LAYOUTS[layout]
    change(copied, load_file(copied / "model.safetensors"))
    own = load_checkpoint(tiny_checkpoint)
    with plain_checkpoint(copied) as plain:
        read = load_checkpoint(plain)
        # What reads the folder itself, as Optimum does, finds every weight.
        _, loading = GPT2LMHeadModel.from_pretrained(plain, output_loading_info=True)
        assert not any(loading.values())
        text = "The lamp on Gull Rock"
        assert load_tokenizer(plain).encode(text).ids == load_tokenizer(tiny_checkpoint).encode(text).ids
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), read.parameters(), strict=True))
    assert read.config.vocab_size == 300
    assert capsys.readouterr().out == (f"{copied}: {message}\n" if message else "")


def run_code(folder: Path, _: Weights) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Path("code")}, folder / "pytorch_model.bin")


def leave_only(*files: str) -> Callable[[Path, Weights], None]:
    def change(folder: Path, _: Weights) -> None:
        for file in ("model.safetensors", "config.json"):
            (folder / file).unlink()
        for file in files:
            (folder / file).write_bytes(b"x")

    return change


def add_adapter(folder: Path, weights: Weights) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    lora = {name.replace("weight", "lora_A.default.weight"): torch.zeros(8, 32)}
    write_weights(folder, {f"base_model.model.{key}": weight for key, weight in {**weights, **lora}.items()})


REFUSED: dict[str, tuple[Callable[[Path, Weights], None], str]] = {
    "code in a pickle": (run_code, r"pytorch_model\.bin is cut off, or holds more than tensors, which is not read"),
    "nanoGPT": (leave_only("ckpt.pt"), r"holds ckpt\.pt, a checkpoint of nanoGPT, which has no tokenizer"),
    "gpt-2-simple": (leave_only("hparams.json"), r"holds hparams\.json, a checkpoint of OpenAI's TensorFlow code"),
    "GGUF": (leave_only("model.gguf"), r"holds model\.gguf, a model of llama\.cpp"),
    "a PEFT adapter": (
        leave_only("adapter_config.json", "adapter_model.safetensors"),
        "holds a PEFT adapter, which is read only when merged into its base",
    ),
    "PEFT, not merged": (add_adapter, r"holds an adapter of PEFT that was not merged: base_model\.model\..*lora_A"),
    "twice": (
        lambda folder, weights: write_weights(
            folder, {**weights, **{f"module.{name}": weight.clone() for name, weight in weights.items()}}
        ),
        r"has weights both with and without module\.; keep one of the two",
    ),
    "an unknown prefix": (
        prefixed("student."),
        r"weights are missing: .* \(it has student\..*, which no GPT-2 has\); take a checkpoint that has them all",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_gpt2_is_refused_by_its_name(case: str, copied: Path) -> None:
    change, message = REFUSED[case]
    change(copied, load_file(copied / "model.safetensors"))
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(copied)
    assert "\n" not in str(raised.value)
    assert not re.search("fetch the model|from_pretrained.*save_pretrained", str(raised.value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(tiny_checkpoint: Path, tmp_path: Path, value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[3] = value
    save(model, tiny_checkpoint, tmp_path)
    with pytest.raises(UserError, match=r"weights hold NaN or infinity: transformer\.h\.0\.mlp\.c_fc\.bias; take"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "sdpa"), ({"scale_attn_weights": False}, "eager"), ({"scale_attn_by_inverse_layer_idx": True}, "eager")],
)
def test_attention_is_computed_as_the_config_says(
    changes: dict[str, bool], expected: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = make_model()
    model.config.update(changes)
    save(model, tiny_checkpoint, tmp_path)
    assert load_checkpoint(tmp_path).config._attn_implementation == expected


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_a_full_disk_is_reported_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource; from pathlib import Path\n"
        "from test_checkpoint import make_model\n"
        "from pipeline.checkpoint import save_model\n"
        "from pipeline.errors import report_errors; from pipeline.files import whole_folder\n"
        "model = make_model()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))\n"
        "with report_errors(), whole_folder(Path('out')) as partial:\n"
        "    save_model(model, partial)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: out.partial: weights cannot be written (")
    assert process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
