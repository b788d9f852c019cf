"""The stage `base` on a folder: what it writes, and what it refuses."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from base_stage import REPOSITORY, REVISION, ROOT, params, write_training_split
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaConfig

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.params.base import BaseParams
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.quality.lexicon import load_lexicon, write_lexicon
from pipeline.stages.base import find_source, make_base
from pipeline.tokens import end_of_text_id, load_tokenizer

GPT2_TOKENIZER = ROOT.parent / "shared" / "gpt2-tokenizer"


@pytest.fixture
def training_split(tmp_path: Path) -> Path:
    return write_training_split(tmp_path)


@pytest.fixture
def model_folder(training_split: Path, tmp_path: Path) -> Path:
    """A whole small GPT-2, as a user might bring one."""
    folder = tmp_path / "model"
    make_base(training_split, folder, params("scratch"))
    return folder


@pytest.fixture
def make(training_split: Path, tmp_path: Path) -> Callable[[Path | str], Path]:
    """Run the stage on a source, and return its output folder."""

    def run(source: Path | str) -> Path:
        out = tmp_path / "base"
        make_base(training_split, out, params(str(source)))
        return out

    return run


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_gives_the_same_logits(model_folder: Path, make: Callable[[Path], Path]) -> None:
    out = make(model_folder)
    ids = torch.arange(20)[None]
    one, two = (GPT2LMHeadModel.from_pretrained(folder).eval()(ids).logits for folder in (model_folder, out))
    assert torch.equal(one, two)
    assert load_tokenizer(out).to_str() == load_tokenizer(model_folder).to_str()
    assert read_json(out / "source.json")["source"] == str(model_folder)


@pytest.mark.parametrize("source", ["~/model", "$HOME/model"])
def test_a_folder_may_be_named_as_in_a_shell(source: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    named = source.replace("model", model_folder.name)
    assert find_source(params(source=named)) == model_folder


def test_the_words_that_a_base_knows_come_along(model_folder: Path, make: Callable[[Path], Path]) -> None:
    assert not (make(model_folder) / "lexicon.txt").exists()
    write_lexicon(model_folder, frozenset({"lamp", "tide"}))
    assert load_lexicon(make(model_folder)) == {"lamp", "tide"}


def test_nothing_but_source_json_holds_the_folders_path(model_folder: Path, make: Callable[[Path], Path]) -> None:
    out = make(model_folder)
    assert [file.name for file in out.iterdir() if str(model_folder).encode() in file.read_bytes()] == ["source.json"]


def test_half_precision_in_shards_becomes_one_float32_file(model_folder: Path, make: Callable[[Path], Path]) -> None:
    model = GPT2LMHeadModel.from_pretrained(model_folder).half()
    (model_folder / "model.safetensors").unlink()
    model.save_pretrained(model_folder, max_shard_size="50KB")
    assert len(list(model_folder.glob("model-*.safetensors"))) > 1
    out = make(model_folder)
    written = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.float32}
    for name, weight in model.state_dict().items():
        assert torch.equal(written[name if name != "lm_head.weight" else "transformer.wte.weight"], weight.float())
    assert read_json(out / "config.json")["dtype"] == "float32"


def test_weights_named_as_on_the_hub_are_read(
    model_folder: Path, make: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenAI's repositories name no `transformer.` and hold the attention's causal masks."""
    before = load_file(model_folder / "model.safetensors")
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    renamed = {name.removeprefix("transformer."): weight for name, weight in before.items()}
    save_file({**renamed, **masks}, model_folder / "model.safetensors", metadata={"format": "pt"})
    after = load_file(make(model_folder) / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "left out" not in capsys.readouterr().out


def test_tensors_of_another_head_are_left_out_with_a_message(
    model_folder: Path, make: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(model_folder, lambda weights: weights.update({"score.weight": torch.zeros(2, 32)}))
    assert "score.weight" not in load_file(make(model_folder) / "model.safetensors")
    assert "left out what a GPT2LMHeadModel does not have: score.weight" in capsys.readouterr().out


def test_vocabulary_and_merges_alone_make_the_fast_tokenizer(model_folder: Path, make: Callable[[Path], Path]) -> None:
    expected = load_tokenizer(model_folder).encode("The harbour lamp").ids
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model_folder / name).unlink()
    assert load_tokenizer(make(model_folder)).encode("The harbour lamp").ids == expected


def test_end_of_text_follows_the_tokenizer(
    model_folder: Path, make: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(model_folder / "config.json", read_json(model_folder / "config.json") | {"eos_token_id": 50256})
    out = make(model_folder)
    expected = end_of_text_id(load_tokenizer(out))
    assert read_json(out / "config.json")["eos_token_id"] == expected
    assert read_json(out / "generation_config.json")["eos_token_id"] == expected
    assert "not 50256 as in config.json" in capsys.readouterr().out


@pytest.mark.skipif(not GPT2_TOKENIZER.is_dir(), reason="GPT-2's own tokenizer files are not on this machine")
def test_gpt2_s_own_tokenizer_files_are_read(model_folder: Path, make: Callable[[Path], Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model_folder / name).unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GPT2_TOKENIZER / name, model_folder)
    config = GPT2LMHeadModel.from_pretrained(model_folder).config
    config.vocab_size, config.bos_token_id, config.eos_token_id = 50257, 50256, 50256
    GPT2LMHeadModel(config).save_pretrained(model_folder)
    tokenizer = load_tokenizer(make(model_folder))
    assert end_of_text_id(tokenizer) == 50256
    assert tokenizer.encode("Hello world<|endoftext|>").ids == [15496, 995, 27, 91, 437, 1659, 5239, 91, 29]


def test_special_tokens_that_were_added_are_tokens_in_a_text_unless_they_are_to_be_split(
    model_folder: Path, training_split: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"], "pad_token": "<|pad|>"})
    tokenizer.save_pretrained(model_folder)
    model = GPT2LMHeadModel.from_pretrained(model_folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(model_folder)
    text = "<|user|> hi <|bot|> <|pad|><|endoftext|>"
    source = model_folder
    for splits in (False, True, False):  # each is the base of the next
        out = tmp_path / f"made-from-{source.name}"
        make_base(training_split, out, params(str(source), split_special_tokens=splits))
        names = [name for name in load_tokenizer(out).encode(text).tokens if name.startswith("<|")]
        assert names == ([] if splits else ["<|user|>", "<|bot|>", "<|pad|>"])
        inside = text.removesuffix("<|endoftext|>")
        assert AutoTokenizer.from_pretrained(out)(inside)["input_ids"] == load_tokenizer(out).encode(inside).ids
        source = out


def change_config(folder: Path, **changes: object) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def shard_and_lose_one(folder: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    next(folder.glob("model-00002-*")).unlink()


def add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(folder)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (
        lambda folder: LlamaConfig().save_pretrained(folder),
        "is a llama model; the checkpoint must be of a GPT-2",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
    "config cut off": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"pytorch_model\.bin is cut off, or holds more than tensors, which is not read because it could run code",
    ),
    "weights cut off": (
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        "weights are cut off or lack a file",
    ),
    "a shard is gone": (
        shard_and_lose_one,
        "weights are cut off or lack a file",
    ),
    "a weight is gone": (
        lambda folder: change_weights(folder, lambda weights: weights.pop("transformer.h.1.mlp.c_fc.weight")),
        r"weights are missing: transformer\.h\.1\.mlp\.c_fc\.weight",
    ),
    "a layer is gone": (
        lambda folder: change_config(folder, n_layer=3),
        r"weights are missing: transformer\.h\.2.* and \d+ more",
    ),
    "another shape": (
        lambda folder: change_config(folder, n_positions=32),
        r"another shape than config\.json says: transformer\.wpe\.weight; take the config\.json that was saved with t",
    ),
    "not a number": (
        lambda folder: change_weights(
            folder, lambda weights: weights["transformer.wpe.weight"].view(-1)[5:6].fill_(float("nan"))
        ),
        r"NaN or infinity: transformer\.wpe\.weight",
    ),
    "no tokenizer": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "merges.txt")],
        "holds no tokenizer",
    ),
    "tokenizer cut off": (
        lambda folder: os.truncate(folder / "tokenizer.json", 1000),
        r"tokenizer\.json: not JSON",
    ),
    "quantized": (
        lambda folder: change_config(folder, quantization_config={"load_in_8bit": True}),
        "is quantized",
    ),
    "a tokenizer of more tokens": (
        add_token,
        "the tokenizer has 301 tokens, the model 300",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(
    case: str, model_folder: Path, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    damage, message = BROKEN[case]
    damage(model_folder)
    with pytest.raises(UserError, match=message) as raised:
        make(model_folder)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(model_folder))
    assert not list(tmp_path.glob("base*"))


@pytest.mark.parametrize("source", ["./model", "/no/such/model", "~/model", "a/b/c", "model/"])
def test_a_path_that_is_not_a_folder_is_not_taken_for_a_hub_id(make: Callable[[str], Path], source: str) -> None:
    with pytest.raises(UserError, match=r"base\.source: there is no folder "):
        make(source)


@pytest.mark.parametrize("revision", [None, "main", REVISION[:12], REVISION.upper()])
def test_a_hub_id_needs_a_full_commit_hash(training_split: Path, tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(UserError, match=r"base\.revision: .* its full hash, 40 hexadecimal digits"):
        make_base(training_split, tmp_path / "base", params(REPOSITORY, revision))


def test_only_a_hub_id_has_a_revision(training_split: Path, model_folder: Path, tmp_path: Path) -> None:
    for source in ("scratch", str(model_folder)):
        with pytest.raises(UserError, match=r"base\.revision: only a model on the hub has a revision"):
            make_base(training_split, tmp_path / "base", params(source, REVISION))


def test_the_bundled_base_has_read_english(training_split: Path, tmp_path: Path) -> None:
    if not (ROOT / "base" / "model.safetensors").exists():
        pytest.skip("the bundled base is not at base/ (dvc pull base.dvc)")
    committed = BaseParams.model_validate(read_yaml(ROOT / PARAMS_FILE)["base"])
    make_base(training_split, tmp_path / "base", committed.model_copy(update={"source": str(ROOT / "base")}))
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    tokenizer = load_tokenizer(tmp_path / "base")
    losses = []
    for words in ("He was an old man, and he had been at sea for the greater part of his life.", "life his of part"):
        ids = torch.tensor([[end_of_text_id(tokenizer), *tokenizer.encode(words).ids]])
        with torch.inference_mode():
            losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] < 4.0 < 6.0 < losses[1]
