"""The caller of the present call."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from server.engine.base import CacheNamespace


@dataclass(frozen=True, slots=True)
class Caller:
    """The client of a call.

    ``client`` is the name that it has proven to have, or else the address of its machine:
    what shares a limit, and a prefix cache. ``is_known`` tells names from addresses. ``peer`` is
    address and port of the connection.
    """

    client: str = ""
    peer: str = ""
    is_known: bool = False

    @property
    def cache_namespace(self) -> CacheNamespace | None:
        """Whose entries of the prefix cache the caller's requests share: its own alone."""
        if not self.client:
            return None
        return CacheNamespace("client" if self.is_known else "address", self.client)


_NOBODY = Caller()
_caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def current_caller() -> Caller:
    """Return the caller of the call that this task serves; an empty one outside of calls."""
    return _caller.get()


def set_caller(caller: Caller) -> None:
    """Let ``caller`` be the one of this task, and of those that it starts from now on."""
    _caller.set(caller)
