"""The plan of a model that no engine has loaded: one that is kept, or measured on transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pruning.checkpoint import read_config
from pruning.fingerprint import text_fingerprint, tokenizer_fingerprint
from pruning.metrics import METRICS, Evidence, measure_dense_pass
from pruning.plan import Plan, PlanError
from pruning.transformers_model import batches, load_model, load_tokenizer
from server.calibration.policy_store import PlanFile
from server.calibration.text_windows import WINDOW, text_windows
from server.config import Settings
from server.engine.arguments import cpu_dtype
from server.state import StateDirectory
from server.state_keys import transformers_plan_key
from server.telemetry.progress import ProgressReport

_PACKAGES = ("fathom-server", "torch", "transformers")

logger = logging.getLogger(__name__)


def kept_plan(
    settings: Settings,
    fingerprint: str,
    tokenizer: str,
    texts: Sequence[str],
    metric: str | None = None,
) -> Plan | None:
    """Return the newest plan in the state directory of this model on these texts.

    ``fingerprint`` is that of the model, ``tokenizer`` that of its tokenizer. Only plans of
    ``metric`` count; None: those of every metric.

    Servers keep one for each data type, context and number of tokens, on which a ranking
    depends little.
    """
    wanted = (fingerprint, tokenizer, text_fingerprint(texts))
    found: list[tuple[float, Path, Plan]] = []
    for path in settings.state_dir.glob("plan-*.json"):
        try:
            plan = Plan.load(path)
        except (PlanError, OSError) as error:
            logger.warning("%s is not used: %s", path, error)
            continue
        made_for = (plan.model_fingerprint, plan.tokenizer_fingerprint, plan.text_fingerprint)
        if made_for == wanted and metric in (None, plan.metric):
            found.append((plan.created_at, path, plan))
    if not found:
        return None
    _, path, plan = max(found, key=lambda item: item[:2])
    logger.info("Ranked before, on %d tokens: %s", plan.num_tokens, path)
    return plan


def measured_plan(
    settings: Settings,
    directory: Path,
    fingerprint: str,
    num_layers: int,
    texts: Sequence[str],
    report: ProgressReport,
    metric: str,
) -> Plan:
    """Load the model, rank its layers and keep the plan in the state directory.

    They are ranked by ``metric``, which is one that needs no search. Raises what transformers
    raises for a model that it cannot load, and :class:`ValueError` for one whose layers it cannot
    rank.
    """
    with report.working("Loading the model, to rank its layers"):
        model, tokenizer = load_offline(settings, directory)
    windows = measuring_windows(model, tokenizer, texts, settings.calibration_tokens)
    measured = measure_dense_pass(
        model,
        batches(windows, model.device, lambda *c: report.advance("Ranking the layers", *c)),
    )
    plan = Plan.from_dense_pass(
        measured,
        model_fingerprint=fingerprint,
        text_fingerprint=text_fingerprint(texts),
        tokenizer_fingerprint=tokenizer_fingerprint(directory),
        versions={name: metadata.version(name) for name in _PACKAGES},
    )
    plan = plan.ranked_by(metric, METRICS[metric].rank(Evidence(num_layers, measured)))
    key = transformers_plan_key(
        model=fingerprint,
        tokenizer=plan.tokenizer_fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        max_context=context_of(model),
        text=plan.text_fingerprint,
        num_tokens=settings.calibration_tokens,
        metric=plan.metric,
    )
    StateDirectory(settings.state_dir).save("plan", key, PlanFile(fingerprint, num_layers), plan)
    return plan


def measuring_windows(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_tokens: int,
    max_context: int | None = None,
) -> list[list[int]]:
    """Return windows of token ids to measure on, by default as long as the model's context allows.

    Raises :class:`TextError` where there are none.
    """

    def tokenize(text: str, *, special_tokens: bool = True) -> list[int]:
        # Quiet, for a text longer than the context is cut into windows.
        return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids)

    return text_windows(
        tokenize,
        texts,
        max_context=context_of(model) if max_context is None else max_context,
        max_tokens=max_tokens,
        vocab_size=model.get_input_embeddings().num_embeddings,
    )


def context_of(model: Any) -> int:
    """Return the context of a transformers model, in tokens; a window's length if unknown."""
    return getattr(model.config, "max_position_embeddings", None) or WINDOW + 1


def load_offline(settings: Settings, directory: Path) -> tuple[Any, Any]:
    """Return the model and its tokenizer, on the GPU if there is one, as transformers loads them.

    Raises what transformers raises, and :class:`CheckpointError` for the tokenizer.
    """
    import torch

    quantized = "quantization_config" in read_config(directory)
    has_gpu = torch.cuda.is_available()
    dtype = settings.dtype if has_gpu else cpu_dtype(settings.dtype, quantized=quantized)
    trust = settings.trust_remote_code
    tokenizer = load_tokenizer(directory, trust=trust)
    return load_model(directory, dtype, trust=trust), tokenizer
