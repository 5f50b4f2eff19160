"""Provenance of a quantized checkpoint, kept in one of its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pruning.plan import Plan
from pruning.quantization.errors import QuantizationError

QUANTIZATION_FILE = "fathom_quantization.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Provenance:
    """The model, the settings and the texts that a checkpoint was quantized with.

    ``base_fingerprint`` is that of the model that was quantized. ``versions`` maps names of
    packages to versions.
    """

    base_fingerprint: str
    bits: int
    group_size: int
    act_order: bool
    text_fingerprint: str
    num_tokens: int
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, directory: str | Path) -> Provenance | None:
        """Return what :meth:`save` wrote; None for a checkpoint without it.

        Raises :class:`QuantizationError`, naming the file, for a file that is damaged or of
        another version.
        """
        path = Path(directory) / QUANTIZATION_FILE
        if not path.is_file():
            return None
        try:
            document = json.loads(path.read_bytes())
            if document["format_version"] != FORMAT_VERSION:
                raise QuantizationError(
                    f"{path}: format_version: found {document['format_version']!r}, "
                    f"allowed: {FORMAT_VERSION}"
                )
            found = cls(**document)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, QuantizationError):
                raise
            raise QuantizationError(f"{path}: damaged: {error}") from None
        for field in fields(cls):
            expected = {"str": str, "int": int, "bool": bool}.get(str(field.type), dict)
            if not isinstance(getattr(found, field.name), expected):
                raise QuantizationError(f"{path}: {field.name}: allowed: {field.type}")
        return found

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"


def plan_of_base(plan: Plan, directory: str | Path, fingerprint: str) -> Plan:
    """Return ``plan`` for the quantized model in ``directory``, if it ranks the layers of its base.

    Quantization does not move layers, so the ranking of the base holds for the quantized model,
    too. ``fingerprint`` is that of ``directory``. Any other plan is returned unchanged.
    """
    provenance = Provenance.load(directory)
    if provenance is None or plan.model_fingerprint != provenance.base_fingerprint:
        return plan
    return replace(plan, model_fingerprint=fingerprint)
