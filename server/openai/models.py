"""The list of models: the model, and each of its levels under a name of its own."""

from __future__ import annotations

import time
from typing import Any

from server.depth.depth_choice import Auto, DepthChoice, NamedLevel
from server.depth.levels import DepthPair
from server.depth.policy import DepthPolicy
from server.openai.failures import UnknownModel
from server.serving.service import Service


class ModelList:
    """What ``/v1/models`` answers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    def all(self) -> list[dict[str, Any]]:
        """Return the model, its levels in their order, and automatic depth."""
        policy, base = self._service.policy, self._service.model_name
        return [
            self._card(base, None, None),
            *(
                self._card(f"{base}:{level.name}", level.name, NamedLevel(level.name))
                for level in policy.levels
            ),
            self._card(f"{base}:auto", "auto", Auto()),
        ]

    def one(self, name: str) -> dict[str, Any]:
        """Return the model of that name; raise :class:`UnknownModel` if it is not listed."""
        for card in self.all():
            if card["id"] == name:
                return card
        raise UnknownModel(name, self._service.model_name)

    def _card(self, name: str, level: str | None, choice: DepthChoice) -> dict[str, Any]:
        service = self._service
        base, policy = service.model_name, service.policy
        _, served = policy.resolve(choice)
        depths = DepthPair(served.prefill_layers, served.decode_layers)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "fathom",
            "root": base,
            "parent": None if name == base else base,
            "max_model_len": service.model.max_context,
            "fathom": {"level": level, **_measured(depths, policy)},
        }


def _measured(depths: DepthPair, policy: DepthPolicy) -> dict[str, Any]:
    """Return depths with what was measured of them; None for what was not."""
    quality, speed = policy.qualities.get(depths), policy.speeds.get(depths)
    dense = policy.qualities.get(policy.dense)
    loss = None
    if quality is not None and dense is not None:
        loss = quality.perplexity / dense.perplexity - 1
    return {
        "prefill_layers": depths.prefill_layers,
        "decode_layers": depths.decode_layers,
        "num_layers": policy.num_layers,
        "perplexity": quality and quality.perplexity,
        "quality_loss": loss,
        "agreement": quality and quality.agreement,
        "kl_nats": quality and quality.kl_nats,
        "tokens_per_second": speed and speed.tokens_per_second,
        "speedup": speed and speed.speedup,
    }
