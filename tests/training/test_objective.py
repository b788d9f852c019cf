"""The chunked loss against PyTorch's loss over all logits at once, and the added terms against plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, log_softmax
from transformers import GPT2LMHeadModel

from pipeline.files import read_json
from pipeline.tokens import TokenArrays
from pipeline.training import objective as objective_module
from pipeline.training.attention import PACKED
from pipeline.training.objective import LEAST_COMPLEMENT, ChunkedLoss, Objective, ScoredGPT2
from pipeline.training.packing import IGNORED_LABEL, PackedSteps

VOCABULARY = 7


def batch_of(windows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the input ids, labels and bounds of windows as the model passes them to the objective."""
    ids = torch.tensor([token_id for window in windows for token_id in window])
    labels = torch.tensor([label for window in windows for label in (IGNORED_LABEL, *window[1:])])
    bounds = torch.tensor(np.cumsum([0, *map(len, windows)]))
    return ids[:-1], labels[1:], bounds


def unlikelihood_by_hand(logits: torch.Tensor, windows: list[list[int]]) -> torch.Tensor:
    """Compute Welleck et al., 2020, equation 4, by loops: candidates are all earlier tokens except the label."""
    total = torch.zeros(())
    offset = 0
    for window in windows:
        for position in range(len(window) - 1):
            probabilities = logits[offset + position].softmax(dim=0)
            for candidate in set(window[1 : position + 1]) - {window[position + 1]}:
                total = total - (1 - probabilities[candidate]).clamp_min(LEAST_COMPLEMENT).log()
        offset += len(window)
    return total


windows = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=9), min_size=1, max_size=4)


@given(windows, st.integers(1, 40), st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.5]), st.integers(0, 99))
@settings(deadline=None)
def test_a_chunk_at_a_time_gives_value_and_gradients_of_the_whole(
    windows: list[list[int]], chunk: int, smoothing: float, unlikelihood: float, seed: int
) -> None:
    torch.manual_seed(seed)
    ids, labels, bounds = batch_of(windows)
    hidden, head = torch.randn(len(ids), 5), torch.randn(VOCABULARY, 5)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, head, hidden, head)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective_module, "LOGITS_BYTES", chunk * 4 * VOCABULARY)
        found = ChunkedLoss.apply(leaves[0], leaves[1], Objective(smoothing, unlikelihood).score(ids, labels, bounds))
    logits = leaves[2] @ leaves[3].T
    expected = cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum", ignore_index=IGNORED_LABEL)
    expected = expected + unlikelihood * unlikelihood_by_hand(logits, windows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (3 * found).backward()
    (3 * expected).backward()
    for ours, reference in zip(leaves[:2], leaves[2:], strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-4)


def test_label_smoothing_is_what_its_paper_says() -> None:
    logits, label = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 0
    loss = Objective(label_smoothing=0.1).score(torch.tensor([9]), torch.tensor([label]), torch.tensor([0, 2]))
    likelihoods = log_softmax(logits[0], dim=0)
    expected = -0.9 * likelihoods[label] - 0.1 * likelihoods.mean()
    torch.testing.assert_close(loss(logits, 0, 1), expected)


def test_four_tokens_by_hand() -> None:
    """After end-of-text, 1, 2 the label is 3: 1 and 2 are made less likely, end-of-text and the label are not."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(3, 1)
    ids, labels, bounds = batch_of([[0, 1, 2, 3]])
    loss = Objective(unlikelihood=1.0).score(ids, labels, bounds)
    likelihood = -np.log([0.2, 0.3, 0.4]).sum()
    # Before the second position is 1, before the third 1 and 2.
    unlikelihood = -np.log(0.8) - np.log(0.8) - np.log(0.7)
    assert loss(logits, 0, 3).item() == pytest.approx(likelihood + unlikelihood)


@pytest.fixture
def model(tiny_checkpoint: Path) -> ScoredGPT2:
    return ScoredGPT2.from_pretrained(tiny_checkpoint, attn_implementation=PACKED)


def tokens() -> TokenArrays:
    ids = [0, 5, 6, 7, 8, 0, 9, 10, 0]
    return TokenArrays(np.array(ids, np.uint16), np.array([0, 5, 8]), "", 300, 0, 0, "")


def test_the_model_gives_transformers_own_loss(model: ScoredGPT2, tiny_model: GPT2LMHeadModel) -> None:
    batch = PackedSteps(tokens(), context_length=16, batch_tokens=100)[0]
    with torch.inference_mode():
        found = model.eval()(**batch).loss
        logits = [tiny_model(torch.tensor([ids])).logits[0, :-1] for ids in ([0, 5, 6, 7, 8, 0], [0, 9, 10, 0])]
    expected = cross_entropy(torch.cat(logits), torch.tensor([5, 6, 7, 8, 0, 9, 10, 0]))
    torch.testing.assert_close(found, expected)


def test_scoring_leaves_out_what_training_adds(model: ScoredGPT2) -> None:
    batch = PackedSteps(tokens(), context_length=16, batch_tokens=100)[0]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = model.train()(**batch).loss
    model.objective = Objective(unlikelihood=1.0)
    assert model.train()(**batch).loss > plain
    torch.testing.assert_close(model.eval()(**batch).loss, plain)


def test_the_tied_head_is_trained_as_head_and_as_embedding(model: ScoredGPT2) -> None:
    batch = PackedSteps(tokens(), context_length=16, batch_tokens=100)[0]
    model.eval()(**batch).loss.backward()
    embedding = model.transformer.wte.weight
    assert embedding is model.lm_head.weight
    assert embedding.grad is not None
    # A token outside the batch has a gradient only as a wrong answer; one in the batch also has one as an input.
    assert embedding.grad[200].abs().sum() > 0


def test_it_is_saved_as_a_plain_gpt2(model: ScoredGPT2, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["architectures"] == ["GPT2LMHeadModel"]
