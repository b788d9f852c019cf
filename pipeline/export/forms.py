"""The forms in which a precision stores the weights of its products and its cache: the usual ones, and more exact."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.engine.manifest import CUDA_PRECISIONS

PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""The names of a layer's products with weights, in the order in which they are computed."""
HEAD = "lm_head"
CACHE = "cache"
"""The name of the keys and values among those of the products: they are rounded, too."""
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
"""The shares of the products, those that do most harm first, that get the next form of their ladder."""


@dataclass(frozen=True)
class Form:
    """Whole numbers of `bits`, with one scale per block of at most `block` inputs."""

    bits: int
    block: int

    @property
    def is_compensated(self) -> bool:
        """Whether what an input's weights lose by rounding is made up for by others; that needs the inputs' moments."""
        return self.bits == 4

    def __str__(self) -> str:
        return f"{self.bits} bits in blocks of up to {self.block}"


Forms = Mapping[str, Form | None]
"""The form of each product, and of the cache, by its name. Floats are None, or not named at all."""


@dataclass(frozen=True)
class Ladder:
    """The forms of a precision, the fastest first; each of the layers' has one of the head beside it."""

    layers: tuple[Form | None, ...]
    head: tuple[Form | None, ...]

    def form(self, name: str, step: int) -> Form | None:
        if name == CACHE:
            return None if step else CHANNELS
        return (self.head if name == HEAD else self.layers)[step]


CHANNELS = Form(8, 1)
"""That of a cache with one scale per channel."""
_BYTES = (Form(8, 256), Form(8, 32), None)
_CUDA_BYTES = (Form(8, 128), Form(8, 32), None)

LADDERS: dict[str, Ladder] = {
    "int8": Ladder(layers=_BYTES, head=_BYTES),
    "int4": Ladder(layers=(Form(4, 128), Form(4, 32), Form(8, 256)), head=(Form(8, 256), Form(8, 32), Form(8, 32))),
    "int8_float16": Ladder(layers=_CUDA_BYTES, head=_CUDA_BYTES),
}
"""By precision. The first forms of those for the processor were chosen by measurement: docs/engine.md has the figures.
Smaller blocks keep what is large in one of them from coarsening the others."""


def usual_forms(precision: str, layers: int, cache_bits: int) -> Forms:
    """Return the forms with which a precision is tried first. `cache_bits`, 8 or 32, holds on the processor alone."""
    if precision not in LADDERS:
        return {}
    names = [*(f"h.{layer}.{part}" for layer in range(layers) for part in PARTS), HEAD]
    if cache_bits == 8 and precision not in CUDA_PRECISIONS:
        names.append(CACHE)
    return {name: LADDERS[precision].form(name, 0) for name in names}


def cache_bits_of(precision: str, forms: Forms) -> int:
    """Return the bits per number in the cache of a precision in these forms."""
    if precision in CUDA_PRECISIONS:
        return 16
    return 32 if forms.get(CACHE) is None else CHANNELS.bits


def finer_forms(precision: str, by_harm: Sequence[str]) -> Iterator[Forms]:
    """Yield more and more exact forms after the usual ones; `by_harm` are all names, those that do most first.

    Some keep a smaller form to the end: were all of them most exact, it would be another precision.
    """
    ladder = LADDERS[precision]
    before = {name: ladder.form(name, 0) for name in by_harm}
    steps = range(1, len(ladder.layers))
    for step in steps:
        for share in SHARES:
            finer = set(by_harm[: math.ceil(share * len(by_harm))])
            forms = {name: ladder.form(name, step - (name not in finer)) for name in by_harm}
            if forms != before and (step < steps[-1] or len(finer) < len(by_harm)):
                yield forms
                before = forms


def needs_moments(forms: Forms) -> bool:
    """Return whether a form needs the moments of its product's inputs."""
    return any(form is not None and form.is_compensated for form in forms.values())


def needs_calibration(forms: Forms) -> bool:
    """Return whether a form needs what is measured on texts of the model."""
    return needs_moments(forms) or forms.get(CACHE) is not None


def count_forms(forms: Forms) -> dict[str, int]:
    """Return how many products have each form, by its description."""
    return dict(Counter("floats" if form is None else str(form) for name, form in forms.items() if name != CACHE))
