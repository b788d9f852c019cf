"""A small new GPT-2 from the training split."""

from pathlib import Path

import pytest
import torch
from base_stage import SCRATCH, digests, params, run_stage_on_each, write_training_split
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.stages.base import make_base
from pipeline.tokens import load_tokenizer


@pytest.fixture
def training_split(tmp_path: Path) -> Path:
    return write_training_split(tmp_path)


@pytest.fixture
def scratch(training_split: Path, tmp_path: Path) -> Path:
    """The stage's output for `scratch`."""
    out = tmp_path / "base"
    make_base(training_split, out, params("scratch"))
    return out


def test_scratch_reads_back_as_the_shape_asked_for(scratch: Path) -> None:
    model, loading = GPT2LMHeadModel.from_pretrained(scratch, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(scratch)
    assert not any(loading.values())
    config = model.config
    assert (config.vocab_size, config.n_positions, config.n_layer, config.n_head, config.n_embd) == (300, 64, 2, 2, 32)
    assert config.bos_token_id == config.eos_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id
    assert len(tokenizer) == 300
    assert model.dtype == torch.float32
    assert read_json(scratch / "source.json") == {
        "source": "scratch",
        "revision": None,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def test_scratch_tokenizer_keeps_every_text_and_merges_what_repeats(scratch: Path) -> None:
    tokenizer = load_tokenizer(scratch)
    text = "  The harbour\n\tköpek 🚢 <|endoftext|>\0"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("The harbour").tokens[-1] == "Ġharbour"


def test_scratch_weights_have_the_spread_of_gpt2(training_split: Path, tmp_path: Path) -> None:
    make_base(training_split, tmp_path / "base", params("scratch", width=128))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    residual = weights["transformer.h.0.mlp.c_proj.weight"]
    assert residual.std().item() == pytest.approx(0.02 / (2 * SCRATCH.layers) ** 0.5, rel=0.03)


def test_scratch_gives_the_same_bytes_in_another_process(training_split: Path, tmp_path: Path) -> None:
    random_state = torch.random.get_rng_state()
    for out in ("one", "two"):
        make_base(training_split, tmp_path / out, params("scratch"))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    run_stage_on_each(tmp_path, {"three": ("scratch", None)}, HF_HUB_OFFLINE="1", PYTHONHASHSEED="5")
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "three")


def test_another_seed_gives_other_weights_and_the_same_tokenizer(training_split: Path, tmp_path: Path) -> None:
    make_base(training_split, tmp_path / "one", params("scratch", seed=1))
    make_base(training_split, tmp_path / "two", params("scratch", seed=2))
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert {name for name in one if one[name] != two[name]} == {"model.safetensors"}


def test_too_little_text_says_how_many_tokens_it_gives(training_split: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base\.scratch\.vocabulary_size: 5000 .* which gives (\d+)") as raised:
        make_base(training_split, tmp_path / "base", params("scratch", vocabulary_size=5000))
    assert not (tmp_path / "base").exists()
    learned = int(str(raised.value).split("which gives ")[1].split(";")[0])
    make_base(training_split, tmp_path / "base", params("scratch", vocabulary_size=learned))
