"""`base`: it reads a model from a folder or the hub, or makes one, and refuses what it cannot use in one line."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from changed_params import write_changed_params
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaConfig

import pipeline
from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file, write_json, write_jsonl
from pipeline.params.base import BaseParams, ScratchParams
from pipeline.params.file import PARAMS_FILE, read_yaml
from pipeline.stages.base import ADVICE, make_base
from pipeline.tokens import end_of_text_id, load_tokenizer

ROOT = Path(pipeline.__file__).parents[1]
GPT2_TOKENIZER = ROOT.parent / "shared" / "gpt2-tokenizer"
SCRATCH = ScratchParams(vocabulary_size=300, context_length=64, layers=2, heads=2, width=32, seed=7)
TEXTS = ["The harbour sleeps, and the harbour lamps burn low.", "A lamp burns on the gull rock; the gulls sleep."] * 4
REPOSITORY = "harbour/tiny-gpt2"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def training_split(tmp_path: Path) -> Path:
    return write_training_split(tmp_path)


@pytest.fixture
def model_folder(training_split: Path, tmp_path: Path) -> Path:
    """A whole small GPT-2, as a user might bring one."""
    folder = tmp_path / "model"
    make_base(training_split, folder, params("scratch"))
    return folder


def write_training_split(folder: Path) -> Path:
    file = folder / "train.jsonl"
    write_jsonl(file, [{"id": str(index), "text": text} for index, text in enumerate(TEXTS)])
    return file


@pytest.fixture
def make(training_split: Path, tmp_path: Path) -> Callable[[Path | str], Path]:
    """Run the stage on a source, and return its output folder."""

    def run(source: Path | str) -> Path:
        out = tmp_path / "base"
        make_base(training_split, out, params(str(source)))
        return out

    return run


def params(source: str, revision: str | None = None, **scratch: int) -> BaseParams:
    return BaseParams(source=source, revision=revision, scratch=SCRATCH.model_copy(update=scratch))


def hub_environment(**values: str) -> dict[str, str]:
    """This process's environment with `values` in place of its own settings of the hub."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {"PYTHONPATH": str(ROOT)} | values


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(folder.iterdir())}


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_scratch_reads_back_as_the_shape_asked_for(make: Callable[[str], Path]) -> None:
    out = make("scratch")
    model, loading = GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert not any(loading.values())
    config = model.config
    assert (config.vocab_size, config.n_positions, config.n_layer, config.n_head, config.n_embd) == (300, 64, 2, 2, 32)
    assert config.bos_token_id == config.eos_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id
    assert len(tokenizer) == 300
    assert model.dtype == torch.float32
    assert read_json(out / "source.json") == {
        "source": "scratch",
        "revision": None,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def test_scratch_tokenizer_keeps_every_text_and_merges_what_repeats(make: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(make("scratch"))
    text = "  The harbour\n\tköpek 🚢 <|endoftext|>\0"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("The harbour").tokens[-1] == "Ġharbour"


def test_scratch_weights_have_the_spread_of_gpt2(training_split: Path, tmp_path: Path) -> None:
    make_base(training_split, tmp_path / "base", params("scratch", width=128))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    residual = weights["transformer.h.0.mlp.c_proj.weight"]
    assert residual.std().item() == pytest.approx(0.02 / (2 * SCRATCH.layers) ** 0.5, rel=0.03)


def test_scratch_gives_the_same_bytes_in_another_process(offline: "Offline", tmp_path: Path) -> None:
    random_state = torch.random.get_rng_state()
    for out in ("one", "two"):
        make_base(offline.folder / "train.jsonl", tmp_path / out, params("scratch"))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(offline.folder / "scratch")


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


def test_a_folder_gives_the_same_logits(model_folder: Path, make: Callable[[Path], Path]) -> None:
    out = make(model_folder)
    ids = torch.arange(20)[None]
    one, two = (GPT2LMHeadModel.from_pretrained(folder).eval()(ids).logits for folder in (model_folder, out))
    assert torch.equal(one, two)
    assert load_tokenizer(out).to_str() == load_tokenizer(model_folder).to_str()
    assert read_json(out / "source.json")["source"] == str(model_folder)


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


def test_tensors_of_another_head_are_left_out_and_told(
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
    assert "not 50256 as config.json said" in capsys.readouterr().out


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
        r"holds no model\.safetensors, and pickled weights are not read; convert them with .*save_pretrained",
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
        r"another shape than config\.json says: transformer\.wpe\.weight$",
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
def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(make: Callable[[str], Path], source: str) -> None:
    with pytest.raises(UserError, match=r"base\.source: there is no folder "):
        make(source)


@pytest.mark.parametrize("revision", [None, "main", REVISION[:12], REVISION.upper()])
def test_a_hub_id_needs_a_full_commit_hash(training_split: Path, tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(UserError, match=r"base\.revision: .* its full hash, 40 hexadecimal digits"):
        make_base(training_split, tmp_path / "base", params(REPOSITORY, revision))


def test_a_revision_belongs_to_a_hub_id(training_split: Path, model_folder: Path, tmp_path: Path) -> None:
    for source in ("scratch", str(model_folder)):
        with pytest.raises(UserError, match=r"base\.revision: belongs to the id of a model on the hub"):
            make_base(training_split, tmp_path / "base", params(source, REVISION))


STAGE_ON_EACH = """
import contextlib, io, json, shutil, sys
from pipeline.stages.base import main

messages = {}
for name in json.loads(sys.argv[1]):
    shutil.copy(f"{name}.yaml", "params.yaml")
    sys.argv[1:] = ["train.jsonl", name]
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        try:
            main()
        except SystemExit as ended:
            print(name, "ended with code", ended.code)
    messages[name] = heard.getvalue()
print(json.dumps(messages))
"""
"""`huggingface_hub` reads its environment when imported: each environment takes a process of its own, and seconds."""

TOKEN = "hf_secret"


def run_stage_on_each(folder: Path, sources: dict[str, tuple[str, str | None]], **values: str) -> dict[str, str]:
    """Run the stage on each source and revision, with its name for output folder; what each said on stderr.

    A source that failed must have ended with exit code 2 and left nothing.
    """
    for name, (source, revision) in sources.items():
        write_changed_params(folder / f"{name}.yaml", {"base": params(source, revision).model_dump()})
    ended = subprocess.run(
        [sys.executable, "-c", STAGE_ON_EACH, json.dumps(list(sources))],
        cwd=folder,
        env=hub_environment(HF_HOME=str(folder / "hub-cache"), HF_TOKEN=TOKEN, **values),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert TOKEN not in ended.stdout + ended.stderr
    for name in sources:
        assert (f"{name} ended with code 2" in ended.stdout) is not (folder / name).exists()
    messages: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    return messages


@pytest.fixture
def hub(model_folder: Path) -> Iterator[HubServer]:
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/model.safetensors", "README.md"):
        (model_folder / name).parent.mkdir(exist_ok=True)
        (model_folder / name).write_bytes(b"not to be fetched")
    with HubServer(model_folder, REPOSITORY, REVISION, gated="harbour/gated") as server:
        yield server


def test_a_commit_on_the_hub_is_fetched_without_pickles_and_what_is_not_there_told(
    hub: HubServer, tmp_path: Path
) -> None:
    other = "f" * 40
    messages = run_stage_on_each(
        tmp_path,
        {
            "no_commit": (REPOSITORY, other),
            "no_repository": ("harbour/nothing", REVISION),
            "gated": (hub.gated, REVISION),
            "there": (REPOSITORY, REVISION),
        },
        HF_ENDPOINT=hub.url,
    )
    assert messages == {
        "no_commit": f"error: base.revision: {REPOSITORY} has no commit {other} on the hub\n",
        "no_repository": "error: base.source: the hub has no model harbour/nothing, or shows it only to those who may "
        "see it; check the name, and set HF_TOKEN for a private one\n",
        "gated": f"error: base.source: {hub.gated} is gated: ask for access on its page and set HF_TOKEN, or "
        f"{ADVICE}\n",
        "there": "",
    }
    assert hub.fetched_files() == {
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    out = tmp_path / "there"
    assert sha256_file(out / "model.safetensors") == sha256_file(hub.folder / "model.safetensors")
    source = read_json(out / "source.json")
    assert (source["source"], source["revision"]) == (REPOSITORY, REVISION)


@dataclass(frozen=True)
class Offline:
    """What a process that may not ask the hub wrote, a folder a source, and said."""

    folder: Path
    messages: dict[str, str]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    folder = tmp_path_factory.mktemp("offline")
    fill_cache(folder)
    sources = {
        "scratch": ("scratch", None),
        "cached": (REPOSITORY, REVISION),
        "elsewhere": ("harbour/nothing", REVISION),
    }
    return Offline(folder, run_stage_on_each(folder, sources, HF_HUB_OFFLINE="1", PYTHONHASHSEED="5"))


def fill_cache(folder: Path) -> Path:
    """Put a model where the hub's cache keeps a commit."""
    cached = folder / "hub-cache" / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / REVISION
    make_base(write_training_split(folder), cached, params("scratch"))
    return cached


def test_offline_a_cached_commit_is_read_and_else_a_folder_asked_for(offline: Offline) -> None:
    problem = "is not asked, as HF_HUB_OFFLINE is set"
    assert offline.messages == {
        "scratch": "",
        "cached": f"{REPOSITORY}: the hub {problem}; reading commit {REVISION} from the cache\n",
        "elsewhere": f"error: base.source: harbour/nothing is no folder here, and the hub {problem}; {ADVICE}\n",
    }
    for name in ("model.safetensors", "tokenizer.json"):
        assert sha256_file(offline.folder / "cached" / name) == sha256_file(offline.folder / "scratch" / name)


def test_a_hub_that_refuses_is_told_even_where_the_cache_holds_half_the_commit(tmp_path: Path) -> None:
    (fill_cache(tmp_path) / "model.safetensors").unlink()
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{not_listening.getsockname()[1]}"
        messages = run_stage_on_each(tmp_path, {"half": (REPOSITORY, REVISION)}, HF_ENDPOINT=refusing)
    assert messages == {
        "half": f"error: base.source: {REPOSITORY} is no folder here, and the hub cannot be reached; {ADVICE}\n"
    }


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
