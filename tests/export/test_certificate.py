"""`certify`: forms become more exact until parity holds, and what was tried is on record."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from changed_params import ROOT
from transformers import GPT2LMHeadModel

from pipeline.engine import Engine
from pipeline.errors import UserError
from pipeline.export.build import build_engine
from pipeline.export.certificate import Certificate, certify
from pipeline.export.forms import LADDERS
from pipeline.export.parity import Parity
from pipeline.files import read_json, write_json
from pipeline.params.export import ExportParams
from pipeline.params.section import PARAMS_FILE
from pipeline.params.whole import load_params
from pipeline.tokens import TokenArrays, end_of_text_id, load_tokenizer, tokenizer_sha256

LOOSE = {
    "max_logit_difference": 100.0,
    "min_next_token_agreement": 0.01,
    "max_kl_divergence": 100.0,
    "max_perplexity_rise": 100.0,
    "min_greedy_tokens": 0,
}


def params_of(precisions: list[str], **last: float) -> ExportParams:
    """Parameters that promise nothing of the precisions but what `last` says of the last."""
    params = load_params(ROOT / PARAMS_FILE).export
    own = {name: getattr(params.parity, name).model_copy(update=LOOSE) for name in precisions}
    own[precisions[-1]] = own[precisions[-1]].model_copy(update=last)
    parity = params.parity.model_copy(update={**own, "positions": 1000})
    return params.model_copy(update={"precisions": precisions, "parity": parity})


@pytest.fixture(scope="module")
def split(tiny_checkpoint: Path) -> TokenArrays:
    end_of_text = end_of_text_id(load_tokenizer(tiny_checkpoint))
    ids = np.random.default_rng(0).integers(1, 300, (30, 40)).astype(np.uint16)
    ids[:, 0] = end_of_text
    return TokenArrays(
        tokens=np.append(ids.reshape(-1), np.uint16(end_of_text)),
        bounds=np.arange(0, ids.size + 1, 40),
        tokenizer_sha256=tokenizer_sha256(tiny_checkpoint),
        vocabulary_size=300,
        end_of_text_id=end_of_text,
        text_bytes=0,
        sha256="",
    )


@pytest.fixture
def certified(
    tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path, split: TokenArrays
) -> Callable[[Path, ExportParams], dict[str, Certificate]]:
    def certified(folder: Path, params: ExportParams) -> dict[str, Certificate]:
        build_engine(tiny_model, tiny_checkpoint, folder, params.precisions)
        return certify(tiny_model, folder, split, split, params)

    return certified


Certified = Callable[[Path, ExportParams], dict[str, Certificate]]


@pytest.mark.parametrize("precision", LADDERS)
def test_forms_become_more_exact_until_the_promise_is_kept(
    precision: str, certified: Certified, tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    usual = certified(tmp_path / "usual", params_of([precision]))[precision]
    assert not usual.coarser
    assert not usual.warning()
    assert {"forms", "cache_bits", "megabytes"} <= set(usual.record())
    assert not {"more_exact", "too_coarse", "left_out"} & set(usual.record())

    # Half of what the usual forms diverge by.
    allowed = usual.parity.kl_divergence / 2
    certificates = certified(tmp_path / "engine", params_of(["float32", precision], max_kl_divergence=allowed))
    assert not certificates["float32"].coarser
    assert not certificates["float32"].forms
    found = certificates[precision]
    assert not found.broken
    assert found.parity.kl_divergence <= allowed
    assert found.coarser[0] == replace(usual, broken=found.coarser[0].broken)
    assert all("diverge" in one.broken and not one.coarser for one in found.coarser)
    record = found.record()
    assert record["more_exact"] == found.more_exact != []
    assert [attempt["kl_divergence"] for attempt in record["too_coarse"]] == [
        one.parity.kl_divergence for one in found.coarser
    ]
    assert f"{precision} takes" in found.warning()
    assert "MB: as usual, the distributions diverge" in found.warning().replace(
        ", and 32 instead of 8 bits per number in the cache", ""
    )

    # The engine holds what the certificate says: it is as if it had been written in these forms at once.
    engine = Engine.load(tmp_path / "engine", precision=precision, provider="cpu", threads=1)
    assert engine.manifest.cache_bits == {"float32": 32, precision: record["cache_bits"]}
    build_engine(tiny_model, tiny_checkpoint, tmp_path / "again", [precision], forms={precision: found.forms})
    for file in ("model.onnx", "model.data"):
        assert (tmp_path / "engine" / precision / file).read_bytes() == (
            tmp_path / "again" / precision / file
        ).read_bytes()


def test_the_first_precision_climbs_too_before_it_fails(certified: Certified, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^parity: int8: the distributions diverge"):
        certified(tmp_path / "engine", params_of(["int8"], max_kl_divergence=1e-12))


def test_what_was_tried_is_on_record_even_if_nothing_helps(certified: Certified, tmp_path: Path) -> None:
    params = params_of(["float32", "int8"], max_kl_divergence=1e-12)
    record = certified(tmp_path / "engine", params)["int8"].record()
    assert "diverge" in record["left_out"]
    divergences = [attempt["kl_divergence"] for attempt in record["too_coarse"]]
    assert len(divergences) == 7
    assert record["kl_divergence"] < min(divergences)
    # The last attempt: the worse half, which is the cache or products, has floats.
    assert record["forms"]["floats"] + (record["cache_bits"] == 32) >= 5


def test_nothing_is_tried_where_floats_break_a_promise(
    certified: Certified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("pipeline.export.certificate.rank_by_harm")
    params = params_of(["int8", "float32"], max_logit_difference=1e-12)
    strict = params.parity.int8.model_copy(update={"max_kl_divergence": 1e-12})
    params = params.model_copy(update={"parity": params.parity.model_copy(update={"int8": strict})})
    with pytest.raises(UserError, match=r"^parity: float32: a logit is off"):
        certified(tmp_path / "engine", params)


def test_figures_that_are_no_numbers_can_be_recorded(tmp_path: Path) -> None:
    figures = dict.fromkeys(Parity.__dataclass_fields__, 1)
    parity = Parity(**(figures | {"kl_divergence": math.nan, "perplexity_onnxruntime": math.inf}))
    found = Certificate(precision="int8", parity=parity, forms={}, megabytes=1.0, broken="the distributions diverge")
    write_json(tmp_path / "parity.json", {"int8": replace(found, coarser=(found,)).record()})
    record = read_json(tmp_path / "parity.json")["int8"]
    assert (
        record["kl_divergence"] is record["perplexity_onnxruntime"] is record["too_coarse"][0]["kl_divergence"] is None
    )
