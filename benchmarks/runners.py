"""One runner per library: a loaded model that continues a batch of prompts with the library's own sampler."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from contenders import Contender, Sampling
from conversion import GGUF_FILE

Prompts = Sequence[Sequence[int]]
CPU_SLOTS, CUDA_SLOTS = 8, 64
VLLM_MEMORY = 0.3
"""The share of the GPU's memory that vLLM takes; weights and 64 rows of GPT-2 Medium need 8 GB."""


class Runner(Protocol):
    """The interface to a library. All prompts have one length; every row gets exactly `new_tokens`."""

    build: str
    """The library's description of its build; may be empty."""

    def reserve(self, rows: int, tokens: int) -> None:
        """Allocate `rows` of `tokens`, prompt and continuation; not timed."""

    def generate(self, prompts: Prompts, new_tokens: int, sampling: Sampling, seed: int) -> list[list[int]]: ...


def load_runner(contender: Contender, folder: Path, threads: int) -> Runner:
    """Load the files that `conversion` made. Imports this library and no other."""
    if contender.family == "engine":
        return EngineRunner(folder, contender, threads)
    if contender.family == "vllm":
        return VllmRunner(folder, contender.precision)
    if contender.family == "ctranslate2":
        return CTranslate2Runner(folder, contender.precision, threads)
    if contender.family == "llama.cpp":
        return LlamaRunner(folder / GGUF_FILE, threads)
    return TransformersRunner(contender, folder, threads)


class EngineRunner:
    build = ""

    def __init__(self, folder: Path, contender: Contender, threads: int) -> None:
        from pipeline.engine import Engine

        slots = CPU_SLOTS if contender.provider == "cpu" else CUDA_SLOTS
        self.engine = Engine.load(
            folder, precision=contender.precision, provider=contender.provider, threads=threads, slots=slots
        )

    def reserve(self, rows: int, tokens: int) -> None:
        """Do nothing: the engine grows when needed."""

    def generate(self, prompts: Prompts, new_tokens: int, sampling: Sampling, seed: int) -> list[list[int]]:
        from pipeline.engine import SamplingParams

        params = SamplingParams(
            **asdict(sampling),
            ignore_eos=True,
            seed=seed,
            max_new_tokens=new_tokens,
        )
        return [completion.token_ids for completion in self.engine.generate(prompts, params)]


class TransformersRunner:
    """The `generate` of transformers: on PyTorch, eager or compiled, or on Optimum's ONNX Runtime model."""

    def __init__(self, contender: Contender, folder: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.build = ""
        self.device = contender.provider
        self.is_compiled = contender.family == "compiled"
        self.model: Any
        if contender.family == "optimum":
            import onnxruntime
            from optimum.onnxruntime import ORTModelForCausalLM

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            provider = "CUDAExecutionProvider" if self.device == "cuda" else "CPUExecutionProvider"
            self.model = ORTModelForCausalLM.from_pretrained(
                folder, provider=provider, session_options=options, use_io_binding=self.device == "cuda"
            )
        else:
            from transformers import GPT2LMHeadModel

            self.build = f"PyTorch for {torch.backends.cpu.get_cpu_capability()}"
            if self.device == "cuda":
                self.build = f"PyTorch for CUDA {torch.version.cuda}"
            dtype = getattr(torch, contender.precision)
            self.model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval().to(self.device)

    def reserve(self, rows: int, tokens: int) -> None:
        """Do nothing: the cache of keys and values grows with every token."""

    def generate(self, prompts: Prompts, new_tokens: int, sampling: Sampling, seed: int) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        drawn: dict[str, Any] = {"do_sample": True, **asdict(sampling)}
        if self.is_compiled:
            # On a GPU, transformers compiles the step by itself if its cache is static.
            drawn["cache_implementation"] = "static"
        # Without an end-of-text, nothing ends early. The model's own configuration would fill in unset fields.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=new_tokens, pad_token_id=0, **(drawn if sampling.temperature > 0 else {"do_sample": False})
        )
        torch.manual_seed(seed)
        input_ids = torch.tensor(prompts, device=self.device)
        output = self.model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
        continued: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
        return continued


class VllmRunner:
    build = ""

    def __init__(self, folder: Path, precision: str) -> None:
        from vllm import LLM

        # No prefix caching: the others read every prompt. It starts only if that share of the memory is free, and the
        # others hold some of it.
        self.model: Any = LLM(
            str(folder),
            dtype=precision,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            gpu_memory_utilization=VLLM_MEMORY,
        )

    def reserve(self, rows: int, tokens: int) -> None:
        """Do nothing: the cache takes its share of the GPU's memory at the start."""

    def generate(self, prompts: Prompts, new_tokens: int, sampling: Sampling, seed: int) -> list[list[int]]:
        from vllm import SamplingParams

        params = SamplingParams(
            **asdict(sampling),
            ignore_eos=True,
            seed=seed,
            max_tokens=new_tokens,
            detokenize=False,
        )
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self.model.generate(requests, params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]


class CTranslate2Runner:
    build = ""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        import ctranslate2

        from pipeline.files import read_json

        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )
        self.tokens: list[str] = read_json(folder / "vocabulary.json")

    def reserve(self, rows: int, tokens: int) -> None:
        """Do nothing: the cache of keys and values grows with every token."""

    def generate(self, prompts: Prompts, new_tokens: int, sampling: Sampling, seed: int) -> list[list[int]]:
        import ctranslate2

        ctranslate2.set_random_seed(seed)
        results = self.generator.generate_batch(
            [[self.tokens[token_id] for token_id in prompt] for prompt in prompts],
            # Reads the prompt at once; otherwise it would be read token by token.
            include_prompt_in_result=False,
            # Bans end-of-text until the last token.
            min_length=new_tokens,
            max_length=new_tokens,
            sampling_topk=sampling.top_k,
            sampling_topp=sampling.top_p,
            sampling_temperature=sampling.temperature or 1.0,
            repetition_penalty=sampling.repetition_penalty,
        )
        return [result.sequences_ids[0] for result in results]


class LlamaRunner:
    """llama.cpp through its C interface, because its Python class decodes only one sequence and copies all logits."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.threads = threads
        self.api.llama_backend_init()
        self.build = self.api.llama_print_system_info().decode().strip(" |")
        self.model = self.api.llama_model_load_from_file(str(file).encode(), self.api.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp could not load its file")
        self.vocabulary_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.batch: Any = None
        self.room = (0, 0)

    def reserve(self, rows: int, tokens: int) -> None:
        """Open a context of exactly this size, because its keys and values are allocated whole."""
        if self.room == (rows, tokens):
            return
        if self.context is not None:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx = rows * tokens
        params.n_seq_max = rows
        # Pass all prompts at once; llama.cpp splits them into pieces of n_ubatch itself.
        params.n_batch = rows * tokens
        params.n_threads = params.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not open a context of {rows} x {tokens} tokens")
        self.batch = self.api.llama_batch_init(rows * tokens, 0, 1)
        self.room = (rows, tokens)

    def generate(self, prompts: Prompts, new_tokens: int, sampling: Sampling, seed: int) -> list[list[int]]:
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), False)
        samplers = [self._sampler(prompt, sampling, seed + row) for row, prompt in enumerate(prompts)]
        for row, prompt in enumerate(prompts):
            for position, token_id in enumerate(prompt):
                self._put(row * len(prompt) + position, token_id, position, row, position == len(prompt) - 1)
        self._decode(sum(len(prompt) for prompt in prompts))
        last = [(row + 1) * len(prompt) - 1 for row, prompt in enumerate(prompts)]
        output: list[list[int]] = [[] for _ in prompts]
        for step in range(new_tokens):
            for row, sampler in enumerate(samplers):
                # Draws from the logits at that index of the batch, and adds the token to the penalty.
                output[row].append(api.llama_sampler_sample(sampler, self.context, last[row]))
            if step + 1 < new_tokens:
                for row, prompt in enumerate(prompts):
                    self._put(row, output[row][-1], len(prompt) + step, row, True)
                self._decode(len(prompts))
                last = list(range(len(prompts)))
        for sampler in samplers:
            api.llama_sampler_free(sampler)
        return output

    def _sampler(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Any:
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if sampling.temperature == 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
            return chain
        whole = self.room[1]
        for stage in (
            api.llama_sampler_init_penalties(self.vocabulary_size, whole, sampling.repetition_penalty, 0.0, 0.0),
            api.llama_sampler_init_top_k(sampling.top_k),
            # Temperature after top-k: llama.cpp's own order, and the same result as before it.
            api.llama_sampler_init_temp(sampling.temperature),
            api.llama_sampler_init_top_p(sampling.top_p, 1),
            api.llama_sampler_init_dist(seed),
        ):
            api.llama_sampler_chain_add(chain, stage)
        for token_id in prompt:
            api.llama_sampler_accept(chain, token_id)
        return chain

    def _put(self, index: int, token_id: int, position: int, row: int, wants_logits: bool) -> None:
        batch = self.batch
        batch.token[index] = token_id
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = row
        batch.logits[index] = wants_logits

    def _decode(self, tokens: int) -> None:
        self.batch.n_tokens = tokens
        code = self.api.llama_decode(self.context, self.batch)
        if code != 0:
            raise RuntimeError(f"llama_decode ended with {code}")
