"""Timers inside the elastic engine's process, beside what Fathom asks of its worker."""

from __future__ import annotations

from bench.step_timers import StepTimers
from server.engine.elastic.worker_extension import ElasticWorkerExtension


class ElasticStepTimers(StepTimers, ElasticWorkerExtension):
    """Mixed into vLLM's worker as its extension."""
