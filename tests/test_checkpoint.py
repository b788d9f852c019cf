"""Checkpoints: what is written, what is refused, and the error message for each."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.checkpoint import load_checkpoint, pack_checkpoint, save_model
from pipeline.errors import UserError

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
