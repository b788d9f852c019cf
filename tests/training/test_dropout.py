import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.training.dropout import Dropout, replace_dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_it_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(1)
    out = Dropout(rate)(torch.ones(400, 500))
    # Five standard deviations of 200,000 draws.
    assert (out == 0).float().mean().item() == pytest.approx(rate, abs=5 * (0.25 / 200_000) ** 0.5)
    assert out[out != 0].unique().numel() == 1
    assert out[0, out[0] != 0][0].item() == pytest.approx(1 / (1 - rate), rel=1e-3)


def test_the_gradient_is_dropped_wherever_the_value_is() -> None:
    values = torch.ones(50, 4, requires_grad=True)
    out = Dropout(0.3)(values)
    out.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, out.detach())


def test_pytorchs_seed_repeats_it_and_each_call_differs() -> None:
    dropout, values = Dropout(0.5), torch.ones(64)
    torch.manual_seed(3)
    first, second = dropout(values), dropout(values)
    torch.manual_seed(3)
    assert torch.equal(dropout(values), first)
    assert not torch.equal(first, second)


def test_a_block_that_is_computed_again_drops_the_same() -> None:
    dropout, values = Dropout(0.5), torch.ones(64, requires_grad=True)
    out = checkpoint(lambda x: dropout(x * x), values, use_reentrant=False)
    out.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, 2 * out.detach())


def test_scoring_drops_nothing_and_draws_nothing() -> None:
    dropout, values = Dropout(0.5).eval(), torch.ones(64)
    before = torch.get_rng_state()
    assert torch.equal(dropout(values), values)
    assert torch.equal(Dropout(0.0)(values), values)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_dropout_of_a_model_is_replaced_with_its_rate() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2)))
    replace_dropout(model)
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [(type(module), module.p) for module in found] == [(Dropout, 0.1), (Dropout, 0.2)]
