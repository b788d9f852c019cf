"""Certify an engine: compare each precision with the model, and give it more exact forms where parity breaks."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import GPT2LMHeadModel

from pipeline.engine.generator import Engine
from pipeline.engine.manifest import measure_megabytes
from pipeline.errors import UserError
from pipeline.export.build import write_again
from pipeline.export.calibration import calibrate
from pipeline.export.forms import LADDERS, Forms, cache_bits_of, count_forms, finer_forms, usual_forms
from pipeline.export.harm import rank_by_harm
from pipeline.export.parity import Parity, broken_promises, measure_parity
from pipeline.export.reference import TorchReference, windows_of
from pipeline.params.export import ExportParams
from pipeline.tokens import TokenArrays


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a precision was compared with, in the forms that it has."""

    precision: str
    parity: Parity
    forms: Forms
    """Empty for a precision of floats."""
    megabytes: float
    broken: str
    """The promises that it breaks; empty if it keeps all."""
    coarser: tuple["Certificate", ...] = ()
    """Those of the forms that were tried before and broke a promise, the usual ones first."""

    @property
    def more_exact(self) -> list[str]:
        """The names of what is stored more exactly than usual."""
        usual = self.coarser[0].forms if self.coarser else self.forms
        return [name for name, form in self.forms.items() if form != usual[name]]

    def record(self) -> dict[str, Any]:
        """Return what `parity.json` says of it."""
        record = asdict(self.parity)
        if self.forms:
            record |= self._stored()
        if self.coarser:
            record |= {"more_exact": self.more_exact, "too_coarse": [one._attempt() for one in self.coarser]}
        return _without_nan(record | ({"left_out": self.broken} if self.broken else {}))

    def _attempt(self) -> dict[str, Any]:
        figures = {name: getattr(self.parity, name) for name in ("kl_divergence", "perplexity_onnxruntime")}
        return _without_nan(self._stored() | figures | {"broken": self.broken})

    def _stored(self) -> dict[str, Any]:
        bits = cache_bits_of(self.precision, self.forms)
        return {"forms": count_forms(self.forms), "cache_bits": bits, "megabytes": self.megabytes}

    def warning(self) -> str:
        """Return what the user should know of it; empty if it keeps its promises as usual."""
        if self.broken:
            return f"{self.precision} is left out of the engine: {self.broken}"
        if not self.coarser:
            return ""
        usual = self.coarser[0]
        bits, usual_bits = (cache_bits_of(self.precision, one.forms) for one in (self, usual))
        cache = "" if bits == usual_bits else f", and {bits} instead of {usual_bits} bits per number in the cache"
        return (
            f"{self.precision} takes {self.megabytes:,.1f} instead of {usual.megabytes:,.1f} MB{cache}: "
            f"as usual, {usual.broken}"
        )


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record in which figures that are no finite numbers are None: JSON has none."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def certify(
    model: GPT2LMHeadModel, engine: Path, validation: TokenArrays, train: TokenArrays, params: ExportParams
) -> dict[str, Certificate]:
    """Compare each precision with the model in PyTorch on real text, and return its certificate.

    The text is all of `validation`, and of `train` as much as is missing. A precision of fewer bits that breaks a
    promise is written again in more exact forms until it keeps all, or there are no more. Raises `UserError` if the
    first precision, which runs by default, or float32 breaks one all the same.
    """
    reference = TorchReference(model)

    def measure(precisions: Sequence[str], forms: Mapping[str, Forms]) -> dict[str, Certificate]:
        engines = {name: Engine.load(engine, precision=name, provider="cpu") for name in precisions}
        context_length = engines[precisions[0]].context_length
        parity = measure_parity(
            engines,
            reference,
            list(windows_of(validation, context_length)),
            windows_of(train, context_length),
            positions=params.parity.positions,
            show_progress=sys.stderr.isatty(),
        )
        return {
            name: Certificate(
                precision=name,
                parity=found,
                forms=forms[name],
                megabytes=measure_megabytes(engine, name),
                broken="; ".join(broken_promises(found, getattr(params.parity, name))),
            )
            for name, found in parity.items()
        }

    precisions = params.precisions
    certificates = measure(
        precisions, {name: usual_forms(name, model.config.n_layer, params.cache_bits) for name in precisions}
    )
    calibration = None
    # Floats cannot be helped, and without the first precision there is no engine: no other is tried in vain.
    for precision in sorted(params.precisions, key=lambda name: name in LADDERS):
        found = certificates[precision]
        if found.broken and precision in LADDERS:
            calibration = calibration or calibrate(model, validation.end_of_text_id)
            for forms in finer_forms(precision, rank_by_harm(model, precision, found.forms, calibration)):
                write_again(model, engine, precision, forms, calibration)
                (finer,) = measure([precision], {precision: forms}).values()
                found = replace(finer, coarser=(*found.coarser, replace(found, coarser=())))
                if not found.broken:
                    break
            certificates[precision] = found
        if found.broken and precision in (params.precisions[0], "float32"):
            raise UserError(
                f"parity: {precision}: {found.broken} (export.parity holds the tolerances; a precision that is too "
                "coarse for this model can follow another in export.precisions, or be left out)"
            )
    return certificates
