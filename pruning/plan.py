"""Plans: the order in which layers are removed, with its scores and provenance."""

from __future__ import annotations

import json
import math
import reprlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from pruning.depths import check_removal_order, removal_order, skipped_layers
from pruning.durable import replace_file
from pruning.importance import BlockInfluence
from pruning.metrics import DensePass, other_scores
from pruning.metrics.base import Ranking
from pruning.metrics.names import BLOCK_INFLUENCE, METRIC_NAMES

FORMAT_VERSION = 2
# Version 1 knew block influence alone, so it had no other scores.
_READABLE_VERSIONS = (1, FORMAT_VERSION)
_SINCE_VERSION_2 = frozenset({"other_scores"})
_TOKENIZER = "tokenizer_fingerprint"
# Missing in plans of earlier versions.
_SETTLED = "settled"
_OPTIONAL = {_TOKENIZER, _SETTLED}
# Larger integers may have no exact float.
_MAX_EXACT_INTEGER = 2**53


class PlanError(ValueError):
    """A plan that is damaged, has another format, or belongs to another model."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A removal order with its scores and provenance, kept as a JSON file.

    ``scores`` and ``stderrs`` are block influence, indexed by layer. ``metric`` is what the order
    was made by, one of :data:`pruning.metrics.names.METRIC_NAMES`. ``other_scores`` maps it,
    unless it is block influence, and every other metric that was measured to scores indexed by
    layer; a low one speaks for leaving the layer out. ``created_at`` is in seconds since the Unix
    epoch. ``settled`` says whether other windows of the same text would leave out the same layers
    at the depths that the plan was made for (:mod:`pruning.stability`); None: that is not known.
    ``versions`` maps names of packages to the versions that measured the scores. The
    removal order need not follow the scores; it may be set by hand. Raises :class:`PlanError`,
    naming the field, for values that are not allowed.
    """

    removal_order: tuple[int, ...]
    scores: tuple[float, ...]
    stderrs: tuple[float, ...]
    model_fingerprint: str
    text_fingerprint: str
    num_tokens: int
    versions: dict[str, str]
    created_at: float
    # Empty where it is not known.
    tokenizer_fingerprint: str = ""
    metric: str = BLOCK_INFLUENCE
    other_scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    settled: bool | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            _refuse("format_version", self.format_version, str(FORMAT_VERSION))
        if self.metric not in METRIC_NAMES:
            _refuse("metric", self.metric, f"one of {', '.join(METRIC_NAMES)}")
        try:
            check_removal_order(self.removal_order, max(self.num_layers, 1))
        except ValueError as error:
            raise PlanError(str(error)) from None
        self._check_scores("scores", self.scores)
        if len(self.stderrs) != self.num_layers:
            _refuse("stderrs", self.stderrs, self._one_for_each_layer)
        if not all(math.isfinite(stderr) and stderr >= 0 for stderr in self.stderrs):
            _refuse("stderrs", self.stderrs, "finite numbers, none negative")
        others = [name for name in METRIC_NAMES if name != BLOCK_INFLUENCE]
        for name, scores in self.other_scores.items():
            if name not in others:
                _refuse("other_scores", name, f"scores of {', '.join(others)}")
            self._check_scores(f"other_scores.{name}", scores)
        if self.metric != BLOCK_INFLUENCE and self.metric not in self.other_scores:
            _refuse(f"other_scores.{self.metric}", None, "the scores of the plan's metric")
        if not self.model_fingerprint:
            _refuse("model_fingerprint", self.model_fingerprint, "a fingerprint")
        if not self.text_fingerprint:
            _refuse("text_fingerprint", self.text_fingerprint, "a fingerprint")
        if self.num_tokens < 1:
            _refuse("num_tokens", self.num_tokens, "1 or more")
        if not math.isfinite(self.created_at):
            _refuse("created_at", self.created_at, "seconds since the Unix epoch")

    @classmethod
    def from_importance(
        cls,
        importance: BlockInfluence,
        *,
        model_fingerprint: str,
        text_fingerprint: str,
        tokenizer_fingerprint: str = "",
        versions: dict[str, str],
    ) -> Plan:
        """Return the plan that removes the layers with the lowest influence first."""
        return cls(
            removal_order=removal_order(importance.scores),
            scores=importance.scores,
            stderrs=importance.stderrs,
            model_fingerprint=model_fingerprint,
            text_fingerprint=text_fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
            num_tokens=importance.num_tokens,
            versions=versions,
            created_at=time.time(),
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` has written.

        Raises :class:`PlanError`, naming the file and the field, for a file that is not a plan of
        this format version, and :class:`OSError` for a file that cannot be read.
        """
        data = Path(path).read_bytes()
        try:
            return cls(**_parse(data))
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a reader sees the old file or the new one, never a part."""
        document = json.dumps(asdict(self), indent=2, allow_nan=False)
        replace_file(Path(path), f"{document}\n".encode())

    @property
    def num_layers(self) -> int:
        return len(self.removal_order)

    def skipped(self, depth: int) -> tuple[int, ...]:
        """Return the layers that ``depth`` skips, in ascending order.

        Raises :class:`ValueError` unless 1 <= ``depth`` <= ``num_layers``.
        """
        return skipped_layers(self.removal_order, depth)

    @classmethod
    def from_dense_pass(
        cls,
        measured: DensePass,
        *,
        model_fingerprint: str,
        text_fingerprint: str,
        tokenizer_fingerprint: str = "",
        versions: dict[str, str],
    ) -> Plan:
        """Return the plan by block influence, with the scores of all metrics of a dense pass."""
        plan = cls.from_importance(
            measured.block_influence,
            model_fingerprint=model_fingerprint,
            text_fingerprint=text_fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
            versions=versions,
        )
        return replace(plan, other_scores=other_scores(measured))

    def ranked_by(self, metric: str, ranking: Ranking) -> Plan:
        """Return the plan with the order of another metric, which keeps all scores it has.

        Whether that order is settled is not known.
        """
        others = self.other_scores
        if metric != BLOCK_INFLUENCE:
            others = others | {metric: ranking.scores}
        return replace(
            self,
            removal_order=ranking.removal_order,
            metric=metric,
            other_scores=others,
            settled=None,
        )

    def removing_first(self, layers: Sequence[int]) -> Plan:
        """Return the plan with ``layers`` at the beginning of its order, ascending."""
        others = [layer for layer in self.removal_order if layer not in layers]
        return replace(self, removal_order=(*sorted(layers), *others))

    def check_model(self, fingerprint: str, num_layers: int) -> None:
        """Raise :class:`PlanError` unless the plan was made for this model."""
        if num_layers != self.num_layers:
            raise PlanError(
                f"removal_order: the plan is of a model with {self.num_layers} layers, "
                f"allowed: {num_layers}, those of this model"
            )
        if fingerprint != self.model_fingerprint:
            raise PlanError(
                f"model_fingerprint: the plan is of the model {self.model_fingerprint}, "
                f"allowed: {fingerprint}, this model"
            )

    @property
    def _one_for_each_layer(self) -> str:
        return f"{self.num_layers} numbers, one for each layer"

    def _check_scores(self, name: str, scores: tuple[float, ...]) -> None:
        if len(scores) != self.num_layers:
            _refuse(name, scores, self._one_for_each_layer)
        if not all(map(math.isfinite, scores)):
            _refuse(name, scores, "finite numbers")


def _refuse(field: str, found: object, allowed: str) -> NoReturn:
    raise PlanError(f"{field}: found {reprlib.repr(found)}, allowed: {allowed}")


def _parse(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not a complete JSON document: {error}") from None
    if not isinstance(document, dict):
        raise PlanError(f"found {reprlib.repr(document)}, allowed: a JSON object")
    # This check is first, because other fields are expected to differ in another version.
    version = document.get("format_version")
    if not _is_integer(version) or version not in _READABLE_VERSIONS:
        _refuse("format_version", version, " or ".join(map(str, _READABLE_VERSIONS)))
    names = {field.name for field in fields(Plan)}
    if version == 1:
        names -= _SINCE_VERSION_2
    if missing := sorted(names - _OPTIONAL - document.keys()):
        raise PlanError(f"{missing[0]}: found nothing, allowed: a value")
    if unknown := sorted(document.keys() - names):
        raise PlanError(f"{unknown[0]}: unknown, allowed: {', '.join(sorted(names))}")
    return {
        "removal_order": _integers(document, "removal_order"),
        "scores": _numbers(document, "scores"),
        "stderrs": _numbers(document, "stderrs"),
        "model_fingerprint": _string(document, "model_fingerprint"),
        "text_fingerprint": _string(document, "text_fingerprint"),
        "num_tokens": _integer(document, "num_tokens"),
        "versions": _strings(document, "versions"),
        "created_at": _number(document, "created_at"),
        "tokenizer_fingerprint": _string({_TOKENIZER: "", **document}, _TOKENIZER),
        "metric": _string(document, "metric"),
        "other_scores": _scores_by_name(document, "other_scores") if version > 1 else {},
        _SETTLED: _bool_or_null(document, _SETTLED),
    }


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= _MAX_EXACT_INTEGER
    return isinstance(value, float)


def _integer(document: dict[str, Any], field: str) -> int:
    value = document[field]
    if not _is_integer(value):
        _refuse(field, value, "an integer")
    return int(value)


def _number(document: dict[str, Any], field: str) -> float:
    value = document[field]
    if not _is_number(value):
        _refuse(field, value, "a number")
    return float(value)


def _string(document: dict[str, Any], field: str) -> str:
    value = document[field]
    if not isinstance(value, str):
        _refuse(field, value, "a string")
    return value


def _integers(document: dict[str, Any], field: str) -> tuple[int, ...]:
    value = document[field]
    if not isinstance(value, list) or not all(map(_is_integer, value)):
        _refuse(field, value, "a list of integers")
    return tuple(value)


def _numbers(document: dict[str, Any], field: str) -> tuple[float, ...]:
    value = document[field]
    if not isinstance(value, list) or not all(map(_is_number, value)):
        _refuse(field, value, "a list of numbers")
    return tuple(map(float, value))


def _scores_by_name(document: dict[str, Any], field: str) -> dict[str, tuple[float, ...]]:
    value = document[field]
    if not isinstance(value, dict):
        _refuse(field, value, "an object of lists of numbers")
    return {name: _numbers({f"{field}.{name}": value[name]}, f"{field}.{name}") for name in value}


def _bool_or_null(document: dict[str, Any], field: str) -> bool | None:
    value = document.get(field)
    if value is not None and not isinstance(value, bool):
        _refuse(field, value, "true, false or null")
    return value


def _strings(document: dict[str, Any], field: str) -> dict[str, str]:
    value = document[field]
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        _refuse(field, value, "an object of strings")
    return value
