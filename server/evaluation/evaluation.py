"""Evaluations of a live server: accuracy at a depth, beside that of the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from lm_eval import simple_evaluate

from server.evaluation.harness_model import ServerModel

# What the harness calls the share of right answers, by log-probability, and by that divided by
# the length of the answer in bytes.
_METRICS = "acc", "acc_norm"


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The accuracy on one task, with standard errors; ``num_items`` questions."""

    num_items: int
    acc: float
    acc_stderr: float
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None


def evaluate(
    model: ServerModel,
    tasks: dict[str, list[dict[str, Any]]],
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
) -> dict[str, TaskResult]:
    """Return the results by task; ``limit`` questions of each, None: all.

    A task of several subjects has the mean over their questions.
    """
    configurations = [each for group in tasks.values() for each in group]
    found = simple_evaluate(
        model=model,
        tasks=configurations,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
    )
    assert found is not None
    return {
        name: _pooled(
            [
                _result(found["results"][each["task"]], found["n-samples"][each["task"]])
                for each in group
            ]
        )
        for name, group in tasks.items()
    }


def report(
    model: str, served: str, results: dict[str, TaskResult], dense: dict[str, TaskResult] | None
) -> dict[str, Any]:
    """Return results as plain data, with the share of the dense model's accuracy."""
    tasks: dict[str, Any] = {}
    for name, result in results.items():
        tasks[name] = asdict(result)
        if dense is not None:
            tasks[name]["dense"] = asdict(dense[name])
            tasks[name]["retention"] = _ratio(result.acc, dense[name].acc)
            tasks[name]["retention_norm"] = _ratio(result.acc_norm, dense[name].acc_norm)
    return {"model": model, "served": served, "lm_eval": version("lm_eval"), "tasks": tasks}


def _result(values: dict[str, Any], samples: dict[str, int]) -> TaskResult:
    numbers = {
        f"{metric}{suffix}": float(values[key])
        for metric in _METRICS
        for suffix, key in (("", f"{metric},none"), ("_stderr", f"{metric}_stderr,none"))
        if isinstance(values.get(key), int | float)
    }
    return TaskResult(num_items=samples["effective"], **numbers)


def _pooled(results: Sequence[TaskResult]) -> TaskResult:
    if len(results) == 1:
        return results[0]
    total = sum(result.num_items for result in results)

    def mean(name: str) -> float:
        return math.fsum(r.num_items * getattr(r, name) for r in results) / total

    def stderr(name: str) -> float:
        return math.sqrt(math.fsum((r.num_items * getattr(r, name)) ** 2 for r in results)) / total

    return TaskResult(
        total,
        mean("acc"),
        stderr("acc_stderr"),
        mean("acc_norm"),
        stderr("acc_norm_stderr"),
    )


def _ratio(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of
