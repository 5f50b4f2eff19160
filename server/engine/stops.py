"""What ends a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.engine.base import SamplingOptions
from server.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Stops:
    """What a request asks to stop at, in the form that vLLM can stop at.

    Special tokens never show in a text, so a stop string that names one stops at its id.
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
        """Return what the request named that ended its text, if it was that.

        ``reason`` is vLLM's: the string, or the token unless it is the model's end of text.
        """
        if isinstance(reason, str):
            return reason if reason in self.requested_strings else None
        if last_token is None:
            return None
        named = self.requested_specials.get(last_token)
        return named or (last_token if last_token in self.requested_ids else None)
