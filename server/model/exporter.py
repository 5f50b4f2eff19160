"""Export of checkpoints of one depth, quantized before or after pruning, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from pruning.collapse import CollapsedModel
from pruning.fingerprint import text_fingerprint
from pruning.plan import Plan
from pruning.quantization import Order, plan_of_base, prune_then_quantize
from pruning.repair.folding import FoldedRepair
from pruning.surgery import Export, export_checkpoint
from server.config import Settings
from server.file_hashes import FileHashes
from server.model.inputs import calibration_texts
from server.model.quantized import (
    QuantizedModel,
    calibration_windows,
    checked_quantization,
    warn_if_not_served_here,
)
from server.model.source import ModelSource

# Called with (name of the work, done, total).
OnWork = Callable[[str, int, int], None]


class Exporter:
    """Writes one model at any depth."""

    def __init__(self, settings: Settings, source: ModelSource, fingerprint: str) -> None:
        """Check that ``source`` can be quantized as the settings say.

        Raises what :func:`server.model.quantized.checked_quantization` does.
        """
        self._settings = settings
        self._source = source
        self._fingerprint = fingerprint
        self._quantization = checked_quantization(settings, source.directory)
        if self._quantization is not None:
            warn_if_not_served_here(self._quantization, source.directory)
        is_local = source.directory == Path(settings.model or "").expanduser()
        self._base_model = source.directory.resolve().name if is_local else source.name

    def write(
        self,
        out: Path,
        plan: Plan,
        depth: int,
        on_work: OnWork,
        *,
        overwrite: bool = False,
        repair: FoldedRepair | None = None,
        collapse: CollapsedModel | None = None,
    ) -> Export:
        """Write the model at ``depth`` to ``out``; ``plan`` is of the model before quantization.

        A model that is quantized at full depth is kept in the state directory, where a server
        finds it, too. ``repair`` is folded into a model that is not quantized, and ``collapse``
        merges layers of one. Call this in a thread that runs no event loop. Raises the errors of
        :func:`pruning.surgery.export_checkpoint`,
        :func:`pruning.quantization.quantize_checkpoint` and
        :func:`pruning.quantization.prune_then_quantize`.
        """
        if self._quantization is None:
            return self._export(
                self._source.directory, out, plan, depth, on_work, overwrite, repair, collapse
            )
        assert repair is None, "it is fitted for weights that are not quantized"
        assert collapse is None, "layers are merged before they are quantized"
        if Order(self._settings.order) is Order.PRUNE_THEN_QUANTIZE:
            return self._prune_then_quantize(out, plan, depth, on_work, overwrite)
        texts = calibration_texts(self._settings, self._source.directory)
        model = QuantizedModel(
            self._settings, self._source, self._fingerprint, texts, self._quantization
        )
        fingerprint = asyncio.run(model.prepare(_quantizing(on_work)))
        plan = plan_of_base(plan, model.directory, fingerprint)
        return self._export(model.directory, out, plan, depth, on_work, overwrite)

    def _export(
        self,
        source: Path,
        out: Path,
        plan: Plan,
        depth: int,
        on_work: OnWork,
        overwrite: bool,
        repair: FoldedRepair | None = None,
        collapse: CollapsedModel | None = None,
    ) -> Export:
        return export_checkpoint(
            source,
            out,
            plan,
            depth,
            base_model=self._base_model,
            overwrite=overwrite,
            with_code=self._settings.trust_remote_code,
            on_progress=lambda done, total: on_work("Writing", done, total),
            file_hash=FileHashes(self._settings.state_dir),
            repair=repair,
            collapse=collapse,
        )

    def _prune_then_quantize(
        self, out: Path, plan: Plan, depth: int, on_work: OnWork, overwrite: bool
    ) -> Export:
        assert self._quantization is not None
        texts = calibration_texts(self._settings, self._source.directory)
        return prune_then_quantize(
            self._source.directory,
            out,
            plan,
            depth,
            self._quantization,
            calibration_windows(self._settings, self._source.directory, texts),
            text_fingerprint=text_fingerprint(texts),
            base_model=self._base_model,
            overwrite=overwrite,
            with_code=self._settings.trust_remote_code,
            on_progress=_quantizing(on_work),
            file_hash=FileHashes(self._settings.state_dir),
        )


def _quantizing(on_work: OnWork) -> Callable[[int, int], None]:
    return lambda done, total: on_work("Quantizing the layers", done, total)
