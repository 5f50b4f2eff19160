"""The large requests that a bystander is disturbed with."""

from __future__ import annotations

from typing import Any

from bench.bystander import large_requests
from server.rpc.generated.fathom.v1 import inference_pb2 as pb

KINDS: dict[str, Any] = {
    "Generate": pb.GenerateRequest,
    "Tokenize": pb.TokenizeRequest,
    "Score": pb.ScoreRequest,
}


def test_they_are_as_large_as_asked_for_or_fill_the_context() -> None:
    size, max_context = 2**16, 512
    requests = large_requests(size, max_context)
    assert requests[0].count == 0
    for request in requests[1:]:
        data = request.make()
        message = KINDS[request.method].FromString(data)
        if request.runs:
            assert len(message.token_ids.ids) < max_context
        elif "3 MiB" not in request.name and "characters" not in request.name:
            assert size <= len(data) < 1.5 * size
    assert len({request.name for request in requests}) == len(requests)
