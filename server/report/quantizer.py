"""Checkpoints of the model in 4 bits, made once and kept with the measurements."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pruning.checkpoint import CheckpointError
from pruning.fingerprint import text_fingerprint
from pruning.metrics import Ranking
from pruning.plan import Plan
from pruning.quantization import QuantizationError, QuantizationFailed, prune_then_quantize
from pruning.surgery import SurgeryError
from pruning.text import TextError
from server.calibration.versions import measuring_versions
from server.errors import FathomError
from server.model.quantized import QuantizedModel, calibration_windows, checked_quantization
from server.report.lab import Lab
from server.report.not_possible import NotPossible

BITS = 4
_QUANTIZE = "gptq-4bit"


class Quantizer:
    """Quantizes the model of a report with GPTQ, before pruning or after it.

    Everything raises :class:`NotPossible` where the model, or this installation, cannot.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._settings = lab.settings.model_copy(
            update={"quantize": _QUANTIZE, "state_dir": lab.directory.measurements}
        )
        with _refused():
            found = checked_quantization(self._settings, lab.subject.directory)
        assert found is not None, "the settings ask for it"
        self._quantization = found

    async def whole(self) -> Path:
        """Return the checkpoint of all layers."""
        subject, lab = self._lab.subject, self._lab
        with _refused():
            model = QuantizedModel(
                self._settings,
                subject.source,
                subject.fingerprint,
                subject.texts,
                self._quantization,
            )
            await model.prepare(lab.reporting("Quantizing the layers"))
        return model.directory

    async def pruned_first(self, depth: int, ranking: Ranking, scores: Sequence[float]) -> Path:
        """Return the checkpoint of one depth whose layers were quantized without the others."""
        subject, lab = self._lab.subject, self._lab
        out = lab.directory.measurements / f"pruned-then-quantized-{depth}"
        plan = Plan(
            removal_order=ranking.removal_order,
            scores=tuple(scores),
            stderrs=(0.0,) * len(scores),
            model_fingerprint=subject.fingerprint,
            text_fingerprint=text_fingerprint(subject.texts),
            tokenizer_fingerprint=subject.tokenizer,
            num_tokens=lab.settings.calibration_tokens,
            versions=measuring_versions(),
            created_at=time.time(),
        )
        shutil.rmtree(out, ignore_errors=True)  # one that was not measured
        with _refused():
            windows = calibration_windows(self._settings, subject.directory, subject.texts)
            await asyncio.to_thread(
                prune_then_quantize,
                subject.directory,
                out,
                plan,
                depth,
                self._quantization,
                windows,
                text_fingerprint=text_fingerprint(subject.texts),
                base_model=subject.source.name,
                with_code=lab.settings.trust_remote_code,
                on_progress=lab.reporting(f"Quantizing {depth} layers"),
            )
        return out


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (
        CheckpointError,
        FathomError,
        QuantizationError,
        QuantizationFailed,
        SurgeryError,
        TextError,
        OSError,
    ) as error:
        raise NotPossible(f"the model cannot be quantized here: {error}") from None
