import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.params.finetune import TrainingSamplesParams
from pipeline.training.samples import generate_samples

PARAMS = TrainingSamplesParams(
    prompts=["", "The lamp on Gull Rock"], temperature=0.8, top_p=0.95, max_new_tokens=12, seed=3
)


def test_the_same_seed_gives_the_same_text(tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer) -> None:
    samples = generate_samples(tiny_model, tiny_tokenizer, PARAMS)
    assert samples == generate_samples(tiny_model, tiny_tokenizer, PARAMS)
    other_seed = PARAMS.model_copy(update={"seed": 4})
    assert samples != generate_samples(tiny_model, tiny_tokenizer, other_seed)


def test_a_row_holds_prompt_and_what_follows_it(tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer) -> None:
    samples = generate_samples(tiny_model, tiny_tokenizer, PARAMS)
    assert [sample["prompt"] for sample in samples] == PARAMS.prompts
    assert all(sample["text"] and not sample["text"].startswith("The lamp") for sample in samples)


def test_a_prompt_gives_the_same_likeliest_text_alone_and_in_a_batch(
    tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer
) -> None:
    # A nucleus this small holds one token, so nothing is random.
    likeliest = PARAMS.model_copy(update={"top_p": 1e-6})
    together = generate_samples(tiny_model, tiny_tokenizer, likeliest)
    alone = [
        generate_samples(tiny_model, tiny_tokenizer, likeliest.model_copy(update={"prompts": [prompt]}))[0]
        for prompt in PARAMS.prompts
    ]
    assert together == alone


def test_the_random_state_of_the_training_is_left_alone(tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate_samples(tiny_model, tiny_tokenizer, PARAMS)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_use_a_cache_that_training_does_without(tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer) -> None:
    samples = generate_samples(tiny_model, tiny_tokenizer, PARAMS)
    tokens_fed: list[int] = []
    tiny_model.register_forward_pre_hook(
        lambda model, arguments, keywords: tokens_fed.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    tiny_model.config.use_cache = False
    assert generate_samples(tiny_model, tiny_tokenizer, PARAMS) == samples
    assert set(tokens_fed[1:]) == {1}
    assert not tiny_model.config.use_cache


def test_samples_end_with_the_context(tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer) -> None:
    endless = PARAMS.model_copy(update={"prompts": ["A" * 62], "max_new_tokens": 100})
    text = generate_samples(tiny_model, tiny_tokenizer, endless)[0]["text"]
    assert len(tiny_tokenizer.encode(text).ids) <= 4


def test_no_prompts_give_no_samples(tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer) -> None:
    assert generate_samples(tiny_model, tiny_tokenizer, PARAMS.model_copy(update={"prompts": []})) == []


def test_a_prompt_that_leaves_no_room_is_refused_with_numbers(
    tiny_model: GPT2LMHeadModel, tiny_tokenizer: Tokenizer
) -> None:
    too_long = PARAMS.model_copy(update={"prompts": ["A" * 63]})
    with pytest.raises(
        UserError, match=r"^finetune\.samples\.prompts: 64 tokens leave no room in the context of 64; shorten"
    ):
        generate_samples(tiny_model, tiny_tokenizer, too_long)
