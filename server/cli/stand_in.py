"""What stands in for skipped layers, in words."""

from __future__ import annotations

from server.rpc.generated.fathom.v1 import common_pb2


def stand_in_name(kind: common_pb2.StandIn) -> str:
    """Return the name of a kind as the settings write it, such as "closed-form"."""
    return common_pb2.StandIn.Name(kind).removeprefix("STAND_IN_").lower().replace("_", "-")
