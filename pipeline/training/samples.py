"""Sample from a model in training, with the same prompts and seed each time, so that progress shows."""

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.params.finetune import TrainingSamplesParams
from pipeline.quality.memorization import longest_copies
from pipeline.quality.repetition import rep_n
from pipeline.tokens import end_of_text_id, prompt_ids
from pipeline.training.attention import padded_attention


def generate_samples(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, params: TrainingSamplesParams
) -> list[dict[str, str]]:
    """Continue every prompt with transformers' own `generate`; return a row per prompt: `prompt`, and `text` after it.

    Leaves the random state of the training as it was. The prompts share a batch, padded on the left. Raises `UserError`
    if a prompt leaves no room in the context.
    """
    if not params.prompts:
        return []
    end_of_text = end_of_text_id(tokenizer)
    prompts = [prompt_ids(tokenizer, prompt) for prompt in params.prompts]
    longest = max(len(prompt) for prompt in prompts)
    if longest >= model.config.n_positions:
        raise UserError(
            f"finetune.samples.prompts: {longest} tokens leave no room in the context of {model.config.n_positions}; "
            "shorten the longest"
        )
    input_ids = torch.tensor([[end_of_text] * (longest - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), padded_attention(model):
        torch.manual_seed(params.seed)
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            do_sample=True,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=0,
            max_new_tokens=min(params.max_new_tokens, model.config.n_positions - longest),
            pad_token_id=end_of_text,
            use_cache=True,
        )
    return [
        {"prompt": prompt, "text": tokenizer.decode(ids, skip_special_tokens=True)}
        for prompt, ids in zip(params.prompts, output[:, longest:].tolist(), strict=True)
    ]


def score_samples(
    samples: list[dict[str, str]], tokenizer: Tokenizer, training_ids: NDArray[np.integer]
) -> list[dict[str, float]]:
    """Return a row per sample: `rep_4`, and `longest_copy_tokens`, the longest run that occurs in the training text."""
    ids = [tokenizer.encode(sample["text"]).ids for sample in samples]
    copies = longest_copies(ids, training_ids).tolist()
    return [{"rep_4": rep_n(own, 4), "longest_copy_tokens": copy} for own, copy in zip(ids, copies, strict=True)]
