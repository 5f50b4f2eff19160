"""Limits on what clients may ask for, and on how long a server that stops waits for them."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from pydantic import BaseModel, Field


class RequestSettings(BaseModel):
    max_waiting: Annotated[int, Ge(1)] = Field(
        1024, description="Requests that wait at most; more are refused with RESOURCE_EXHAUSTED."
    )
    max_waiting_tokens: Annotated[int, Ge(1)] = Field(
        2**20,
        description="Prompt tokens of the requests that wait at most; more are refused with "
        "RESOURCE_EXHAUSTED.",
    )
    share_prefix_cache: bool = Field(
        False,
        description="Whether all clients share one prefix cache, which is faster where their "
        "prompts begin alike, and lets each find out what the others have sent. Otherwise each "
        "client has its own, and so has each machine of callers without a name.",
    )
    max_buffered_tokens: Annotated[int, Ge(1)] = Field(
        2**18,
        description="Tokens and log-probabilities of a stream that are kept for a client that "
        "reads slowly; with more the stream ends with RESOURCE_EXHAUSTED.",
    )
    drain_delay_seconds: Annotated[float, Ge(0)] = Field(
        0.0,
        description="Seconds between SIGTERM and the moment that requests are refused. Health is "
        "NOT_SERVING at once, so balancers have this long to notice.",
    )
    grace_seconds: Annotated[float, Ge(0)] = Field(
        30.0, description="Seconds that running requests get to finish when the server is stopped."
    )
