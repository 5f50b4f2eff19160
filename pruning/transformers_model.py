"""Models that transformers loads, to be measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pruning.checkpoint_file import CheckpointError
from pruning.weights import loadable_view


def load_model(directory: Path, dtype: str, *, trust: bool) -> Any:
    """Return the model, on the GPU if there is one.

    ``trust`` says whether code that comes with the model may run. For a model that cannot be
    loaded, the error is that of transformers.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # It would write over the progress of what the model is loaded for.
    logging.disable_progress_bar()
    auto_model: Any = AutoModelForCausalLM
    with loadable_view(directory) as view:
        model = auto_model.from_pretrained(view, dtype=dtype, trust_remote_code=trust)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tokenizer(directory: Path, *, trust: bool) -> Any:
    """Return the tokenizer; ``trust``: whether its own code may run.

    Raises :class:`pruning.checkpoint.CheckpointError` for one that cannot be loaded.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    auto_tokenizer: Any = AutoTokenizer
    try:
        return auto_tokenizer.from_pretrained(directory, trust_remote_code=trust)
    except Exception as error:  # the package documents no base class of what it raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{directory}: its tokenizer cannot be loaded: {reason}") from error


def batches(
    windows: Sequence[Sequence[int]],
    device: Any,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Any]:
    """Yield each window as int64 [1, num_tokens].

    ``advance`` is called with the number of tokens that are done and the number of all tokens.
    """
    import torch

    total = sum(map(len, windows))
    done = 0
    for window in windows:
        yield torch.tensor([list(window)], device=device)
        done += len(window)
        advance(done, total)
