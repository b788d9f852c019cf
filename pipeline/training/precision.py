"""The number type in which training multiplies: bfloat16 or TF32 if the hardware supports it."""

import torch

TF32_CAPABILITY = (8, 0)
"""The least CUDA capability that has it: Ampere's."""


def supports_bfloat16() -> bool:
    """Return whether the GPU, or without one the processor, multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def supports_tf32() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= TF32_CAPABILITY


def autocast(device: torch.device) -> torch.autocast:
    """Multiply in bfloat16 if the hardware supports it; weights, sums and the optimizer stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=supports_bfloat16())
