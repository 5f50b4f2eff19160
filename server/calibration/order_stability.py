"""Whether the text that layers are ranked on is enough, at the depths that levels use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from pruning.metrics import METRICS, DensePassSums, Metric
from pruning.metrics.base import Need
from pruning.metrics.names import BLOCK_INFLUENCE
from pruning.stability import Settlement, settlement
from server.depth.levels import DepthPair

logger = logging.getLogger(__name__)


class OrderStability:
    """Looks at what has been measured of the layers so far.

    The same model and text always give the same answer, as far as the engine's sums are the same.
    """

    def __init__(self, metric: Metric, num_layers: int, depths: Sequence[DepthPair]) -> None:
        """Look at the order by ``metric`` at ``depths``.

        Of a metric that ranks by something else than a pass over the text, the scores of Block
        Influence are looked at, which its plan has as well.
        """
        self._is_ranked_by_pass = metric.need is Need.DENSE_PASS
        self._metric = metric if self._is_ranked_by_pass else METRICS[BLOCK_INFLUENCE]
        self._num_layers = num_layers
        self._num_skipped = sorted(
            {
                num_layers - layers
                for pair in depths
                for layers in (pair.prefill_layers, pair.decode_layers)
                if layers < num_layers
            }
        )

    async def is_settled(self, sums: Sequence[DensePassSums]) -> bool:
        """Return whether more text would hardly change which layers the depths skip."""
        found = await self._settlement(sums)
        return found is not None and found.is_settled

    async def told(self, sums: Sequence[DensePassSums]) -> bool | None:
        """Log whether the order is settled, and return it; None where that is not known.

        It is not known of an order that the sums do not decide, either.
        """
        found = await self._settlement(sums)
        if found is None or not self._is_ranked_by_pass:
            return None
        num_tokens = sum(each.num_tokens for each in sums)
        if found.is_settled:
            logger.info(
                "%s: the layers that the levels leave out are settled after %d tokens",
                self._metric.name,
                num_tokens,
            )
            return True
        depth, share = min(
            ((self._num_layers - count, share) for count, share in found.agreement.items()),
            key=lambda each: each[1],
        )
        logger.warning(
            "%s: %d tokens are too few to be sure of the layers that the levels leave out: at "
            "depth %d, %.0f %% of the resampled texts leave out the same; they differ in the "
            "layers %s. More calibration_tokens make it surer, unless these layers matter equally",
            self._metric.name,
            num_tokens,
            depth,
            100 * share,
            ", ".join(map(str, found.rivals[self._num_layers - depth])),
        )
        return False

    async def _settlement(self, sums: Sequence[DensePassSums]) -> Settlement | None:
        return await asyncio.to_thread(settlement, sums, self._metric, self._num_skipped)
