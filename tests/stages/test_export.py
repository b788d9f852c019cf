"""`export`: both forms continue a text as their checkpoint does, and a broken promise leaves nothing."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from safetensors.torch import load_file, save_file
from toy_project import Project
from transformers import GPT2LMHeadModel

from pipeline.checkpoint import load_checkpoint
from pipeline.engine import Engine, SamplingParams
from pipeline.errors import UserError
from pipeline.export.certificate import certify
from pipeline.export.parity import Parity
from pipeline.files import read_json, sha256_file
from pipeline.params.export import ExportParams
from pipeline.quality.memorization import longest_copies
from pipeline.stages.export import export, export_checkpoint
from pipeline.tokens import load_tokens, tokenizer_sha256

NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=NEW_TOKENS)


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """What transformers' own `generate` goes on with, past end-of-text."""
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=-1,
            pad_token_id=prompt[0],
        )
    return [int(token_id) for token_id in output[0, len(prompt) :]]


@pytest.fixture
def prompts(project: Project) -> list[list[int]]:
    tokens = load_tokens(project.out / "tokenize" / "test", tokenizer_sha256(project.out / "base"))
    return [tokens.document(index)[: 4 + index].tolist() for index in range(len(tokens))]


def continued(engine: Path, prompts: list[list[int]]) -> list[list[int]]:
    completions = Engine.load(engine, provider="cpu").generate(prompts, GREEDY)
    return [completion.token_ids for completion in completions]


def tolerance(project: Project, **changes: float) -> ExportParams:
    """The parameters of the stage, with other tolerances for float32."""
    params = project.params.export
    float32 = params.parity.float32.model_copy(update=changes)
    return params.model_copy(update={"parity": params.parity.model_copy(update={"float32": float32})})


def test_checkpoint_and_base_are_exported_in_both_forms(project: Project) -> None:
    out = project.out / "export"
    assert {file.name for file in out.iterdir()} == {"base", "engine", "parity.json", "portable"}
    for folder in (out, out / "base"):
        precisions = project.params.export.precisions if folder == out else ["float32"]
        names = {"engine.json", "tokenizer.json", "tokenizer_config.json", "lexicon.txt", "verbatim", *precisions}
        assert {file.name for file in (folder / "engine").iterdir()} == names
        assert (folder / "portable" / "model.onnx").is_file()


def test_optimum_reads_the_portable_graph_and_says_the_same(project: Project, prompts: list[list[int]]) -> None:
    portable = ORTModelForCausalLM.from_pretrained(project.out / "export" / "portable")
    assert continued(project.out / "export" / "engine", prompts) == [greedy(portable, prompt) for prompt in prompts]


@pytest.mark.parametrize(("engine", "checkpoint"), [("engine", "finetune/checkpoint"), ("base/engine", "base")])
def test_each_engine_goes_on_as_its_checkpoint_does(
    engine: str, checkpoint: str, project: Project, prompts: list[list[int]]
) -> None:
    model = GPT2LMHeadModel.from_pretrained(project.out / checkpoint).eval()
    found = continued(project.out / "export" / engine, prompts)
    assert found == [greedy(model, prompt) for prompt in prompts]


def test_no_form_has_random_weights_where_their_names_have_a_prefix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Optimum by itself would make new weights for those that it does not find, and say so only in a warning."""
    compiled = tmp_path / "compiled"
    shutil.copytree(tiny_checkpoint, compiled)
    weights = {f"_orig_mod.{name}": weight for name, weight in load_file(compiled / "model.safetensors").items()}
    save_file(weights, compiled / "model.safetensors", metadata={"format": "pt"})
    export_checkpoint(compiled, tmp_path / "out", ["float32"], 8)
    prompt = [5, 6, 7]
    expected = greedy(GPT2LMHeadModel.from_pretrained(tiny_checkpoint).eval(), prompt)
    assert greedy(ORTModelForCausalLM.from_pretrained(tmp_path / "out" / "portable"), prompt) == expected
    assert continued(tmp_path / "out" / "engine", [prompt]) == [expected]


def test_fine_tuning_shows_in_the_engine(project: Project, prompts: list[list[int]]) -> None:
    out = project.out / "export"
    assert continued(out / "engine", prompts) != continued(out / "base" / "engine", prompts)


def test_the_same_checkpoint_gives_the_same_engine(project: Project, tiny_engine_folder: Path) -> None:
    # Otherwise DVC would run every later stage again, and register a new version.
    again = project.out / "export" / "base" / "engine"
    files = {file.relative_to(again) for file in again.rglob("*") if file.is_file()} - {Path("engine.json")}
    # That of the tiny engine holds no text, and other words.
    files = {file for file in files if file.parts[0] not in ("verbatim", "lexicon.txt")}
    assert Path("float32/model.data") in files
    assert {file for file in files if sha256_file(again / file) != sha256_file(tiny_engine_folder / file)} == set()


@pytest.mark.parametrize("folder", ["engine", "base/engine"])
def test_no_longer_copy_of_the_training_text_than_is_allowed(folder: str, project: Project) -> None:
    train = load_tokens(project.out / "tokenize" / "train", tokenizer_sha256(project.out / "base"))
    engine = Engine.load(project.out / "export" / folder, provider="cpu")
    prompts = [train.document(index)[:4].tolist() for index in range(20)]
    # As likely as can be to go on with the text.
    params = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=40)
    params = replace(params, logit_bias={int(token_id): 8.0 for token_id in np.unique(train.tokens)[1:]})

    def longest(params: SamplingParams) -> int:
        samples = [completion.token_ids for completion in engine.generate(prompts, params)]
        return int(longest_copies(samples, train.tokens).max())

    free = longest(params)
    assert free >= 2
    for most in range(1, free):
        assert longest(replace(params, max_verbatim_tokens=most)) <= most


def test_the_text_stays_behind_where_the_parameter_says_so(project: Project, tmp_path: Path) -> None:
    checkpoint, tokens = project.out / "finetune" / "checkpoint", project.out / "tokenize"
    params = project.params.export.model_copy(update={"verbatim_index": False, "precisions": ["float32"]})
    export(checkpoint, project.out / "base", tokens, tmp_path / "out", params)
    assert not list((tmp_path / "out").rglob("verbatim"))
    assert not list((tmp_path / "out").rglob("lexicon.txt"))
    with pytest.raises(UserError, match=r"export it again with export\.verbatim_index set to true"):
        Engine.load(tmp_path / "out" / "engine").generate([[]], SamplingParams(max_verbatim_tokens=5))


def test_a_text_that_is_not_what_was_exported_is_refused(project: Project, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(project.out / "export" / "engine", tmp_path / "engine"))
    with (engine / "verbatim" / "tokens.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"verbatim/tokens\.npy: its SHA-256 is not the one in engine\.json"):
        Engine.load(engine)


def test_the_engine_holds_nothing_about_decoding(project: Project) -> None:
    manifest = read_json(project.out / "export" / "engine" / "engine.json")
    assert set(manifest).isdisjoint(SamplingParams.__dataclass_fields__)
    assert "decoding" not in manifest


def test_parity_is_recorded(project: Project) -> None:
    parities = read_json(project.out / "export" / "parity.json")
    assert list(parities) == project.params.export.precisions == ["float32", "int8"]
    parity, allowed = parities["float32"], project.params.export.parity
    assert set(parity) == set(Parity.__dataclass_fields__)
    assert 0 < parity["max_logit_difference_empty_past"] <= allowed.float32.max_logit_difference
    assert 0 < parity["max_logit_difference_real_past"] <= allowed.float32.max_logit_difference
    assert parity["greedy_agreement_tokens"] == parity["greedy_tokens"]
    assert parity["perplexity_onnxruntime"] == pytest.approx(parity["perplexity_pytorch"], rel=1e-3)
    validation = load_tokens(project.out / "tokenize" / "validation", tokenizer_sha256(project.out / "base"))
    assert parity["perplexity_positions"] == len(validation.tokens) - 1
    # The validation split has fewer than are asked for.
    assert parity["positions"] == allowed.positions


def test_a_weight_that_is_not_a_number_is_refused(project: Project, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(project.out / "finetune" / "checkpoint", tmp_path / "checkpoint"))
    weights = load_file(checkpoint / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = np.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^\S+/checkpoint: weights hold NaN or infinity: transformer\.h\.1\.mlp"):
        export(checkpoint, project.out / "base", project.out / "tokenize", tmp_path / "out", tolerance(project))
    assert not list(tmp_path.glob("out*"))


def test_a_broken_promise_leaves_nothing(project: Project, tmp_path: Path) -> None:
    strict = tolerance(project, max_logit_difference=1e-12)
    with pytest.raises(
        UserError, match=r"^parity: float32: a logit is off by \S+ with empty past; at most 1e-12 is allowed"
    ):
        export(
            project.out / "finetune" / "checkpoint",
            project.out / "base",
            project.out / "tokenize",
            tmp_path / "out",
            strict,
        )
    assert not list(tmp_path.glob("out*"))


def test_a_further_precision_that_is_too_coarse_is_left_out_with_a_warning(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = project.params.export
    strict = params.parity.int8.model_copy(update={"max_kl_divergence": 1e-12})
    params = params.model_copy(update={"parity": params.parity.model_copy(update={"int8": strict})})
    places = (project.out / "finetune" / "checkpoint", project.out / "base", project.out / "tokenize")
    export(*places, tmp_path / "out", params)
    (warning,) = capsys.readouterr().err.splitlines()
    reason = r"the distributions diverge by \S+ nats; at most 1e-12 is allowed"
    assert re.fullmatch(f"warning: int8 is left out of the engine: {reason}", warning)
    parity = read_json(tmp_path / "out" / "parity.json")
    assert re.fullmatch(reason, parity["int8"]["left_out"])
    assert "left_out" not in parity["float32"]
    engine = Engine.load(tmp_path / "out" / "engine", provider="cpu")
    assert engine.manifest.precisions == ("float32",)
    assert list(engine.manifest.cache_bits) == ["float32"]
    assert not (tmp_path / "out" / "engine" / "int8").exists()
    # The first is what evaluation and the model use by default: without it there is none.
    with pytest.raises(UserError, match=r"^parity: int8: the distributions diverge .* can follow another in export"):
        export(*places, tmp_path / "first", params.model_copy(update={"precisions": ["int8", "float32"]}))
    assert not list(tmp_path.glob("first*"))


def test_the_base_is_stored_as_exactly_as_the_model_needs(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = project.params.export
    usual = read_json(project.out / "export" / "parity.json")["int8"]
    strict = params.parity.int8.model_copy(update={"max_kl_divergence": usual["kl_divergence"] / 2})
    parity = params.parity.model_copy(update={"int8": strict})
    params = params.model_copy(update={"precisions": ["int8"], "parity": parity})
    export(
        project.out / "finetune" / "checkpoint",
        project.out / "base",
        project.out / "tokenize",
        tmp_path / "out",
        params,
    )
    assert capsys.readouterr().err.startswith("warning: int8 takes ")
    found = read_json(tmp_path / "out" / "parity.json")["int8"]
    assert found["more_exact"]
    assert found["kl_divergence"] <= strict.max_kl_divergence
    sizes = [(tmp_path / "out" / engine / "int8" / "model.data").stat().st_size for engine in ("engine", "base/engine")]
    assert sizes[0] == sizes[1]
    bits = [Engine.load(tmp_path / "out" / engine).manifest.cache_bits["int8"] for engine in ("engine", "base/engine")]
    assert bits == [found["cache_bits"]] * 2
    assert found["forms"] != usual["forms"]


def test_the_engine_of_another_checkpoint_breaks_every_promise(project: Project) -> None:
    engine = project.out / "export" / "base" / "engine"
    validation, train = (
        load_tokens(project.out / "tokenize" / split, tokenizer_sha256(engine)) for split in ("validation", "train")
    )
    with pytest.raises(UserError) as caught:
        certify(
            load_checkpoint(project.out / "finetune" / "checkpoint"),
            engine,
            validation,
            train,
            tolerance(project).model_copy(update={"precisions": ["float32"]}),
        )
    message = str(caught.value)
    assert "\n" not in message
    for promise in ("with empty past", "with real past", "the next token agrees", "distributions diverge", "greedy"):
        assert promise in message
