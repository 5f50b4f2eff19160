"""The texts of a report, cut into windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pruning.checkpoint import CheckpointError, read_config
from pruning.text import TextError
from pruning.transformers_model import load_tokenizer
from server.calibration.text_windows import WINDOW, text_windows
from server.config import Settings
from server.model.inputs import StartError, refused_as
from server.report.subject import Subject

_MIN_WINDOW = 4
_UNKNOWN_CONTEXT_TOKENS = 2048


class Windows:
    """Windows of token ids of a model's texts.

    Everything raises :class:`StartError`, which names the setting, for too little text.
    """

    def __init__(self, settings: Settings, subject: Subject) -> None:
        self._settings = settings
        self._subject = subject

    @cached_property
    def calibration(self) -> list[list[int]]:
        """Those of the calibration text."""
        texts = self._subject.texts
        return self._cut(texts, self._settings.calibration_tokens, "calibration", WINDOW)

    @cached_property
    def held_out(self) -> list[list[int]]:
        """Those of the held-out text; two or more."""
        texts = self._subject.held_out_texts
        return self._two_or_more(texts, self._settings.quality_tokens, "quality_text", WINDOW)

    def of_search(self, num_tokens: int, window: int) -> list[list[int]]:
        """Return those of the calibration text that a search runs on; two or more."""
        return self._two_or_more(self._subject.texts, num_tokens, "calibration", window)

    def prompts(self, num_tokens: int, number: int) -> list[list[int]]:
        """Return beginnings of the held-out windows."""
        windows = self.held_out
        return [windows[prompt % len(windows)][:num_tokens] for prompt in range(number)]

    def _two_or_more(
        self, texts: Sequence[str], num_tokens: int, setting: str, window: int
    ) -> list[list[int]]:
        """Return as many windows as a standard error needs: shorter ones of little text."""
        windows = self._cut(texts, num_tokens, setting, window)
        if len(windows) < 2:
            half = (len(windows[0]) + 1) // 2
            windows = self._cut(texts, num_tokens, setting, max(half, _MIN_WINDOW))
        if len(windows) < 2:
            raise StartError(
                f"{setting}: got {len(windows[0])} tokens, allowed: {2 * _MIN_WINDOW} or more"
            )
        return windows

    def _cut(
        self, texts: Sequence[str], num_tokens: int, setting: str, window: int
    ) -> list[list[int]]:
        tokenizer = self._tokenizer

        def tokenize(text: str, *, special_tokens: bool = True) -> list[int]:
            # Quiet, for a text longer than the context is cut into windows.
            return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids)

        config = read_config(self._subject.directory)
        config = config.get("text_config") or config
        context = config.get("max_position_embeddings") or _UNKNOWN_CONTEXT_TOKENS
        with refused_as(setting, TextError):
            return text_windows(
                tokenize,
                texts,
                max_context=min(context, self._settings.max_context or context),
                max_tokens=num_tokens,
                vocab_size=config.get("vocab_size") or len(tokenizer),
                window=window,
            )

    @cached_property
    def _tokenizer(self) -> Any:
        with refused_as("model", CheckpointError):
            trust = self._settings.trust_remote_code
            return load_tokenizer(self._subject.directory, trust=trust)
