"""LoRA, merged and exported, against the trained model; dropout; refused layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from pipeline.checkpoint import load_checkpoint, write_checkpoint
from pipeline.engine import Engine
from pipeline.errors import UserError
from pipeline.export.build import build_engine
from pipeline.params.finetune import FinetuneParams, LoraParams
from pipeline.params.whole import load_params
from pipeline.training.model import load_trainable, merge_adapters
from pipeline.training.objective import ScoredGPT2
from pipeline.training.optimizer import build_optimizer

LORA = LoraParams(rank=4, alpha=8, dropout=0.0, modules=["c_attn", "c_proj", "c_fc"])


def params(**changes: object) -> FinetuneParams:
    quiet = {"dropout": 0.0, "attention_dropout": 0.0}
    return load_params().finetune.model_copy(update={**quiet, **changes})


def batch() -> dict[str, object]:
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    ids = torch.tensor([[0, 5, 6, 7, 8, 0]])
    attention = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    return {"input_ids": ids, "position_ids": torch.arange(6)[None], **attention}


@pytest.mark.parametrize("frozen_layers", [0, 1])
def test_lora_trains_its_matrices_alone_and_merges_without_a_trace(
    frozen_layers: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    own = params(lora=LORA, learning_rate=0.05, frozen_layers=frozen_layers)
    model = load_trainable(tiny_checkpoint, own)
    assert isinstance(model, PeftModel)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name and f".h.{frozen_layers}." <= name[name.index(".h.") :] for name in trained)
    base = {name: weight.detach().clone() for name, weight in model.named_parameters() if name not in trained}
    optimizer = build_optimizer(model, own)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        optimizer.step()
    assert all(torch.equal(weight, base[name]) for name, weight in model.named_parameters() if name in base)
    model.eval()
    with torch.inference_mode():
        before = model(**batch()).logits
        merged = merge_adapters(model).eval()
        after = merged(**batch()).logits
    torch.testing.assert_close(after, before, atol=2e-4, rtol=0)
    assert isinstance(merged, ScoredGPT2)
    plain = load_trainable(tiny_checkpoint, params())
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert not torch.allclose(after, plain.eval()(**batch()).logits, atol=1e-2)

    write_checkpoint(merged, tokenizer_of=tiny_checkpoint, out=tmp_path / "checkpoint")
    read = load_checkpoint(tmp_path / "checkpoint")
    build_engine(read, tmp_path / "checkpoint", tmp_path / "engine", ["float32"])
    engine = Engine.load(tmp_path / "engine", provider="cpu", threads=1)
    exported = engine.session.read(batch()["input_ids"][0].tolist(), 0)[0]
    np.testing.assert_allclose(exported, before[0].numpy(), atol=4e-4, rtol=0)


def test_lora_on_layers_that_the_base_lacks_is_refused(tiny_checkpoint: Path) -> None:
    lora = LORA.model_copy(update={"modules": ["c_attn", "q_proj"]})
    with pytest.raises(
        UserError, match=r"^finetune\.lora\.modules: the base has no q_proj; its blocks have c_attn, c_"
    ):
        load_trainable(tiny_checkpoint, params(lora=lora))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [((0.25, 0.5), (0.25, 0.25, 0.5)), ((None, 0.5), (0.1, 0.1, 0.5)), ((None, None), (0.1,) * 3)],
)
def test_dropout_replaces_the_bases_own_where_it_is_given(
    rates: tuple[float | None, float | None], expected: tuple[float, ...], tiny_checkpoint: Path
) -> None:
    config = load_trainable(tiny_checkpoint, params(dropout=rates[0], attention_dropout=rates[1])).config
    assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == expected
