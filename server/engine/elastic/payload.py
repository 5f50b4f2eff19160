"""A request's choice of layers, as plain types that vLLM carries to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.engine.base import LayerSelection

# The key in SamplingParams.extra_args.
KEY = "fathom"


@dataclass(frozen=True, slots=True)
class ImportanceProbe:
    """Measures what every layer does to the tokens of this request, one text.

    Requests of the same ``group`` are added up together.
    """

    group: int


@dataclass(frozen=True, slots=True)
class GramProbe:
    """Adds the tokens of this request to the sums that repair maps are fitted from.

    ``held_out``: to those that the ridge is chosen on instead.
    """

    held_out: bool


@dataclass(frozen=True, slots=True)
class QualityProbe:
    """Compares the request's next-token distributions with those of its reference.

    Requests of the same ``window`` hold the same text. The one without a ``selection`` is the
    reference: it runs first, at full depth, and is remembered.
    """

    window: int
    selection: int | None
    first_scored: int


Probe = ImportanceProbe | GramProbe | QualityProbe


@dataclass(frozen=True, slots=True)
class Payload:
    """The layers that a request skips, and the measurement to make on it.

    ``num_context`` is the number of tokens that run as prompt; the rest of the prompt then runs
    as generated tokens do. None: the whole prompt.
    """

    layers: LayerSelection
    num_context: int | None = None
    probe: Probe | None = None

    def to_extra_args(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "prefill_skips": list(self.layers.prefill_skips),
            "decode_skips": list(self.layers.decode_skips),
        }
        if self.layers.repair is not None:
            data["repair"] = self.layers.repair
        if self.num_context is not None:
            data["num_context"] = self.num_context
        match self.probe:
            case ImportanceProbe(group):
                data["importance"] = group
            case GramProbe(held_out):
                data["gram"] = held_out
            case QualityProbe(window, selection, first_scored):
                data["quality"] = [window, selection, first_scored]
        return {KEY: data}

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> Payload:
        """Read a request's payload; one without any runs at full depth."""
        data = (extra_args or {}).get(KEY)
        if data is None:
            return cls(LayerSelection())
        probe: Probe | None = None
        if "importance" in data:
            probe = ImportanceProbe(data["importance"])
        elif "gram" in data:
            probe = GramProbe(data["gram"])
        elif "quality" in data:
            probe = QualityProbe(*data["quality"])
        return cls(
            LayerSelection(
                tuple(data["prefill_skips"]), tuple(data["decode_skips"]), data.get("repair")
            ),
            data.get("num_context"),
            probe,
        )
