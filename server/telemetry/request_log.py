"""The request log: one line for every call at its end, without text of the client."""

from __future__ import annotations

import logging

from server.calls.call_record import CallRecord
from server.telemetry.log_format import with_fields

logger = logging.getLogger("server.requests")


def log_request(record: CallRecord) -> None:
    """Log what is known of the call; times are in seconds."""
    if not logger.isEnabledFor(logging.INFO):
        return
    served = record.served
    fields = {
        "request_id": record.request_id or None,
        "client": record.caller.client or None,
        "peer": record.caller.peer or None,
        "method": record.method,
        "code": record.code,
        "refused_field": record.refused_field or None,
        "prefill_layers": None if served is None else served.prefill_layers,
        "decode_layers": None if served is None else served.decode_layers,
        "served": None if served is None else served.reason.value,
        "stand_in": None if served is None else served.stand_in_name,
        "finish_reason": None if record.finish_reason is None else record.finish_reason.value,
        "prompt_tokens": record.num_prompt_tokens,
        "generated_tokens": record.num_generated_tokens if record.num_prompt_tokens else None,
        "cached_tokens": record.num_cached_tokens,
        "queue": _rounded(record.queue),
        "time_to_first_token": _rounded(record.time_to_first_token),
        "total": _rounded(record.total),
    }
    logger.info(
        "request", extra=with_fields({name: v for name, v in fields.items() if v is not None})
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
