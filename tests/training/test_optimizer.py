"""The joint optimizer against the two that it combines."""

import copy

import pytest
import torch
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams
from pipeline.params.whole import load_params
from pipeline.training.optimizer import JointOptimizer, build_optimizer, freeze


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_layer=2, n_head=2, n_embd=16)).eval()


def params(optimizer: str, **more: float) -> FinetuneParams:
    changes = {"optimizer": optimizer, "learning_rate": 0.01, "weight_decay": 0.1, **more}
    return load_params().finetune.model_copy(update=changes)


def set_gradients(model: GPT2LMHeadModel, seed: int) -> None:
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_has_one_optimizer_and_only_matrices_decay(name: str) -> None:
    model = tiny_gpt2()
    optimizer = build_optimizer(model, params(name))
    decays = [(weight, group["weight_decay"]) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(id(weight) for weight, _ in decays) == sorted(id(weight) for weight in model.parameters())
    assert all((decay > 0) == (weight.ndim == 2) for weight, decay in decays)


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest() -> None:
    model, reference = tiny_gpt2(), tiny_gpt2()
    blocks = {name for name, weight in reference.named_parameters() if ".h." in name and weight.ndim == 2}
    assert len(blocks) == 2 * 4
    weights = dict(reference.named_parameters())
    muon = Muon([weights[name] for name in blocks], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    others = [
        {"params": [weight], "weight_decay": 0.1 if weight.ndim == 2 else 0.0}
        for name, weight in weights.items()
        if name not in blocks
    ]
    adamw = AdamW(others, lr=0.01, fused=True)
    joint = build_optimizer(model, params("muon"))
    for step in range(3):
        set_gradients(model, step)
        # Bit for bit: both optimizers amplify the rounding of a gradient near zero.
        for name, weight in model.named_parameters():
            weights[name].grad = weight.grad.clone()
        joint.step()
        muon.step()
        adamw.step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, weights[name])


def test_it_resumes_from_its_state_and_follows_its_schedule() -> None:
    model, again = tiny_gpt2(), tiny_gpt2()
    optimizer = build_optimizer(model, params("muon"))
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
        schedule.step()
    again.load_state_dict(model.state_dict())
    resumed = build_optimizer(again, params("muon"))
    schedule_again = LambdaLR(resumed, lambda step: 1 / (1 + step))
    assert isinstance(resumed, JointOptimizer)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule_again.load_state_dict(schedule.state_dict())
    for step in range(2, 4):
        for each, its_optimizer, its_schedule in (
            (model, optimizer, schedule),
            (again, resumed, schedule_again),
        ):
            set_gradients(each, step)
            its_optimizer.step()
            its_schedule.step()
    assert {group["lr"] for part in resumed.optimizers for group in part.param_groups} == {0.01 / 5}
    for name, weight in again.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_lower_blocks_learn_more_slowly_and_embeddings_slowest(name: str) -> None:
    model = tiny_gpt2()
    names = {id(weight): name for name, weight in model.named_parameters()}
    optimizer = build_optimizer(model, params(name, layer_decay=0.5))
    rates = {names[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    for weight, rate in rates.items():
        expected = 0.01 * (0.25 if ".wte" in weight or ".wpe" in weight else 0.5 if ".h.0." in weight else 1)
        assert rate == pytest.approx(expected), weight


def test_frozen_blocks_and_embeddings_stay_and_the_rest_is_trained() -> None:
    model = tiny_gpt2()
    freeze(model, 1)
    optimizer = build_optimizer(model, params("adamw"))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    set_gradients(model, 0)
    optimizer.step()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".h.1." in name or "ln_f" in name}


def test_zero_frozen_layers_freeze_nothing_and_all_of_them_are_refused() -> None:
    model = tiny_gpt2()
    freeze(model, 0)
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(UserError, match=r"^finetune\.frozen_layers: 2 of the base's 2 blocks leave none to train"):
        freeze(model, 2)
