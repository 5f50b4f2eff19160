"""Methods of the worker that holds the model, called over vLLM's collective_rpc.

Answers are plain types: one that msgpack cannot carry ends the worker's output thread, and the
call never returns.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank

from pruning.repair import RepairError
from server.engine.elastic.model import ElasticCausalLM
from server.engine.elastic.out_of_memory import is_out_of_memory
from server.engine.worker_extension import WorkerExtension


class ElasticWorkerExtension(WorkerExtension):
    """Methods that vLLM mixes into its worker."""

    model_runner: Any

    def _elastic_model(self) -> ElasticCausalLM:
        model = self.model_runner.model
        assert isinstance(model, ElasticCausalLM)
        return model

    def fathom_compile_layers(self) -> tuple[int, str]:
        """Return how many layers were compiled, and why none were.

        Raises what says that memory has run out: uncompiled layers need no less of it.
        """
        model = self._elastic_model()
        try:
            return model.compile_layers(self.model_runner.vllm_config), ""
        except Exception as error:  # there is no telling what a compiler may find
            if is_out_of_memory(error):
                raise
            return 0, _reason(error)

    def fathom_load_stand_ins(self, path: str, fingerprint: str) -> str:
        """Load stand-ins; return what is wrong with them, empty where nothing is."""
        try:
            self._elastic_model().load_stand_ins(Path(path), fingerprint)
        except (RepairError, OSError) as error:
            return str(error)
        return ""

    def fathom_reset_repair(self, layers: list[int], keep_maps: bool) -> None:
        """Begin a pass over the text from which the maps of ``layers`` are fitted."""
        self._elastic_model().repair.reset(layers, keep_maps=keep_maps)

    def fathom_begin_fit(self, layer: int) -> None:
        """Begin to fit the map of one layer, beside the requests that the worker runs."""
        if get_tensor_model_parallel_rank() == 0:  # all ranks have the same stream
            model = self._elastic_model()
            model.repair.begin_fit(layer, model.stream_dtype)

    def fathom_end_fit(self) -> str | None:
        """Return what prevents the fit, empty where nothing does; None: it is not at its end."""
        if get_tensor_model_parallel_rank() != 0:
            return ""
        try:
            return "" if self._elastic_model().repair.end_fit() else None
        except RepairError as error:
            return str(error)

    def fathom_save_repair(self, path: str, provenance: dict[str, Any]) -> str:
        """Write the maps that were fitted; return what prevents it, empty where nothing does."""
        if get_tensor_model_parallel_rank() != 0:
            return ""
        try:
            self._elastic_model().repair.save(Path(path), **provenance)
        except (RepairError, OSError) as error:
            return str(error)
        return ""

    def fathom_take_importance(self) -> list[tuple[int, dict[str, Any]]]:
        """Return each group and the sums of this worker's layers for it, and forget them.

        The sums are fields of :class:`pruning.metrics.DensePassSums`. Ranks that repeat another's
        return none.
        """
        groups = self._elastic_model().importance.take()
        if get_tensor_model_parallel_rank() != 0:
            return []
        return [(group, asdict(sums)) for group, sums in groups.items()]

    def fathom_reset_quality(self) -> None:
        self._elastic_model().quality.reset()

    def fathom_quality_sums(self) -> list[tuple[int, int, list[float]]]:
        """Return (window, selection, sums); empty on the ranks that have no logits."""
        if get_tensor_model_parallel_rank() != 0:
            return []
        return self._elastic_model().quality.sums()


def _reason(error: BaseException) -> str:
    """Return one line that says what went wrong; torch.compile wraps what its parts raise."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or repr(error)).strip().partition("\n")[0]
