"""Token ids in, token ids out: run GPT-2 on ONNX Runtime with our own sampling. Needs no torch."""

from pipeline.decoding import SamplingParams
from pipeline.engine.generator import Completion, Engine, Reading
from pipeline.engine.scheduler import Token

__all__ = ["Completion", "Engine", "Reading", "SamplingParams", "Token"]
