"""Seed a training, so that the same parameters give the same weights."""

import os

import torch
from transformers import set_seed


def fix_randomness(seed: int) -> None:
    """Seed every generator; on a GPU also choose kernels that give the same sums each time."""
    set_seed(seed)
    if torch.cuda.is_available():
        # cuBLAS reads it when it starts: a workspace of fixed size keeps it from choosing among streams.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
