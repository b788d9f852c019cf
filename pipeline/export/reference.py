"""What an exported model is compared with: the checkpoint in PyTorch, and real texts."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel

from pipeline.tokens import TokenArrays
from pipeline.training.packing import cut_windows


def windows_of(arrays: TokenArrays, context_length: int) -> Iterator[list[int]]:
    """Yield the documents of a split, each starting with end-of-text, cut if they exceed the context."""
    documents = (arrays.document(index) for index in range(len(arrays)))
    for document in documents:
        for _, start, end in cut_windows([len(document)], context_length).tolist():
            yield document[start:end].tolist()


class TorchReference:
    """The checkpoint in PyTorch, with the methods that `pipeline.export.parity` needs."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(self.model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy())

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        output: list[int] = []
        fed, past = torch.tensor([list(ids)]), None
        with torch.inference_mode():
            while len(output) < new_tokens:
                step = self.model(fed, past_key_values=past, use_cache=True)
                past = step.past_key_values
                fed = step.logits[:, -1:].argmax(dim=-1)
                output.append(int(fed))
        return output
