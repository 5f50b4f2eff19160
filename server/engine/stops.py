"""Stop strings and stop tokens of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.engine.base import SamplingOptions
from server.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Stops:
    """The stops of a request, in the form that vLLM takes.

    The text of an answer never has special tokens, so a stop string that names one is turned into
    a stop at its id.
    """

    strings: tuple[str, ...]
    token_ids: tuple[int, ...]
    # Ids that the request names, and those that its stop strings name.
    requested_ids: frozenset[int]
    requested_specials: Mapping[int, str]
    # Stop strings that the request names.
    requested_strings: frozenset[str]

    @staticmethod
    def of(
        options: SamplingOptions,
        special_tokens: Mapping[str, int],
        default_strings: tuple[str, ...] = (),
    ) -> Stops:
        """Return the stops of ``options``, and of the model's own stop strings.

        Raises :class:`InvalidArgument` for a string that can never be found: one with a special
        token and other text.
        """
        specials: dict[int, str] = {}
        strings: list[str] = []
        for i, string in enumerate(options.stop):
            if string in special_tokens:
                specials[special_tokens[string]] = string
                continue
            for name in special_tokens:
                if name and name in string:
                    raise InvalidArgument(
                        f"stop.stop[{i}]",
                        string,
                        f"text without special tokens, or {name} alone: special tokens are no "
                        "part of the text",
                    )
            strings.append(string)
        for string in default_strings:
            if string in special_tokens:
                specials.setdefault(special_tokens[string], "")
            else:
                strings.append(string)
        return Stops(
            strings=tuple(dict.fromkeys(strings)),
            token_ids=tuple(dict.fromkeys((*options.stop_token_ids, *specials))),
            requested_ids=frozenset(options.stop_token_ids),
            requested_specials={key: name for key, name in specials.items() if name},
            requested_strings=frozenset(options.stop),
        )

    def stopped_by(self, reason: str | int | None, last_token: int | None) -> str | int | None:
        """Return the stop of the request that ended its text; None if something else did.

        ``reason`` is vLLM's stop reason: a string or a token; None for the model's end of text.
        """
        if isinstance(reason, str):
            return reason if reason in self.requested_strings else None
        if last_token is None:
            return None
        named = self.requested_specials.get(last_token)
        return named or (last_token if last_token in self.requested_ids else None)
