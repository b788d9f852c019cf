"""Token ids in, token ids out: run GPT-2 on ONNX Runtime with our own sampling. Needs no torch.

`generator` holds `Engine`, the way in; `text` holds `TextGenerator`, an engine with its tokenizer. Below them,
`scheduler` batches requests, `session` runs the graph, and `sampler` draws tokens, for which `filters` is the readable
reference.
"""

from pipeline.decoding import SamplingParams
from pipeline.engine.generator import Completion, Engine, Reading
from pipeline.engine.scheduler import Token

__all__ = ["Completion", "Engine", "Reading", "SamplingParams", "Token"]
