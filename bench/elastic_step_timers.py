"""Timers inside the elastic engine's process, added to the extension of Fathom's worker."""

from __future__ import annotations

from bench.step_timers import StepTimers
from server.engine.elastic.worker_extension import ElasticWorkerExtension


class ElasticStepTimers(StepTimers, ElasticWorkerExtension):
    """The extension of vLLM's worker."""
