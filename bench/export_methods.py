"""What stands in for removed layers in an exported checkpoint: skip, ReplaceMe, LinearPatch, LaCo.

All methods leave the same number of layers, and are measured in one process on the same held-out
text, in float32 with transformers. Skip, the folded maps and the patches leave out the same layers,
those with the lowest Block Influence; LaCo chooses its own. The patch on the whole stream is that
of the paper, which no plain checkpoint can hold: it shows what is lost by folding half of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bench.options import Options, option, pruned_depths
from bench.plots import save_lines
from bench.session import Session
from bench.texts import given_texts, held_out_texts
from pruning.checkpoint import CheckpointError, read_config
from pruning.collapse import CollapseError, check_mergeable, collapse_layers
from pruning.depths import removal_order, skipped_layers
from pruning.importance import measure_block_influence
from pruning.quality import Quality, measure_quality
from pruning.repair import RepairError
from pruning.repair.folding import check_foldable, fit_folds, folded
from pruning.repair.linear_patch import fit_linear_patches, fit_stream_patches
from pruning.text import TextError
from pruning.transformers_model import batches, load_model, load_tokenizer
from server.calibration.offline_collapse import MAX_TOKENS
from server.calibration.offline_plan import measuring_windows
from server.errors import InvalidArgument
from server.model.demo_corpus import Part
from server.model.source import find_model

if TYPE_CHECKING:
    import torch

# Speed is measured on random weights by default, quality cannot be.
EXPORTED_MODELS = {"random": None}


@dataclass(frozen=True)
class ExportMethodsOptions(Options):
    depths: str = option("", "Depths; none: three quarters of the layers.")
    calibration: str = option(
        "", "Text to rank, fit and merge on; none: the documentation of Python's standard library."
    )
    calibration_tokens: int = option(8192, "Tokens of it.")
    texts: str = option(
        "", "Files of held-out text; none: a part of that documentation that was not fitted on."
    )
    text_tokens: int = option(4096, "Tokens of each held-out text.")

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        for name in ("calibration_tokens", "text_tokens"):
            if getattr(self, name) < 1:
                raise typer.BadParameter(f"--{name.replace('_', '-')}: allowed: 1 or more")


def run(options: ExportMethodsOptions) -> None:
    measure(options)


def measure(options: ExportMethodsOptions) -> Session:
    try:
        source = find_model(EXPORTED_MODELS.get(options.model, options.model))
        config = read_config(source.directory)
        check_foldable(config)
        check_mergeable(config)
        fitted_on = given_texts(options.calibration, Part.CALIBRATION, options.calibration_tokens)
        held_out = held_out_texts(options.texts, options.text_tokens)
    except (CheckpointError, CollapseError, InvalidArgument, RepairError, TextError) as error:
        raise typer.BadParameter(str(error)) from None
    num_layers = int(config["num_hidden_layers"])
    depths = pruned_depths(options.depths, num_layers, [max(1, num_layers * 3 // 4)])
    import torch  # here to keep the help of all benchmarks quick

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    session = Session("export_methods", options, {"name": source.title, "dtype": "float32"})
    measured = _Methods(session, source.directory, options, fitted_on, held_out)
    with session.progress:
        measured.add("dense", num_layers, ())
        for depth in depths:
            measured.measure(depth)
    _summarize(session, list(held_out))
    session.finish(lambda stem: _plot(session, stem, num_layers))
    return session


_MEASURED = ("perplexity", "perplexity_stderr", "num_tokens")


class _Methods:
    """The model, the texts, and the rows that are measured."""

    def __init__(
        self,
        session: Session,
        directory: Path,
        options: ExportMethodsOptions,
        fitted_on: Sequence[str],
        held_out: dict[str, Sequence[str]],
    ) -> None:
        import torch

        self._session = session
        self._directory = directory
        self._model = load_model(directory, "float32", trust=False)
        tokenizer = load_tokenizer(directory, trust=False)

        def windows(texts: Sequence[str], max_tokens: int) -> list[torch.Tensor]:
            found = measuring_windows(
                self._model, tokenizer, texts, max_tokens, options.max_context
            )
            return [torch.tensor(window) for window in found]

        self._windows = windows(fitted_on, options.calibration_tokens)
        self._held_out = {name: windows(of, options.text_tokens) for name, of in held_out.items()}
        # LaCo runs all of them for each merge that it tries.
        self._merged_on = windows(fitted_on, min(options.calibration_tokens, MAX_TOKENS))
        with session.progress.working("Ranking the layers"):
            lists = [window.tolist() for window in self._windows]
            influence = measure_block_influence(
                self._model, batches(lists, self._model.device, lambda *_: None)
            )
        self._order = removal_order(influence.scores)

    def measure(self, depth: int) -> None:
        """Add a row for each method at a depth."""
        model, progress = self._model, self._session.progress
        removed = tuple(sorted(skipped_layers(self._order, depth)))
        self.add("skip", depth, removed)
        with progress.working(f"Fitting maps, depth {depth}"):
            folds = fit_folds(model, self._windows, removed)
            patches = fit_linear_patches(model, self._windows, removed)
            stream = fit_stream_patches(model, self._windows, removed)
        self.add("folded (ReplaceMe)", depth, removed, lambda: folded(model, folds))
        self.add("linear-patch, folded", depth, removed, lambda: folded(model, patches))
        self.add("LinearPatch, whole stream", depth, removed, stand_ins=stream)
        collapsed = load_model(self._directory, "float32", trust=False)
        found = collapse_layers(
            collapsed,
            self._merged_on,
            depth,
            on_tried=lambda *c: progress.advance(f"Merging layers, depth {depth}", *c),
        )
        self.add("skip, the layers of LaCo", depth, found.removed)
        row = self.add("laco", depth, found.removed, model=collapsed)
        row |= {"similarity": found.similarity, "threshold": found.threshold}
        row["merged"] = {str(layer): list(taken) for layer, taken in found.merged.items()}

    def add(
        self,
        method: str,
        depth: int,
        removed: tuple[int, ...],
        context: Callable[[], Any] = nullcontext,
        *,
        stand_ins: Any = None,
        model: Any = None,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"method": method, "depth": depth, "removed": list(removed)}
        with self._session.progress.working(f"Perplexity, {method}, depth {depth}"), context():
            for text, windows in self._held_out.items():
                quality: Quality
                (quality,) = measure_quality(
                    model or self._model, windows, [removed], stand_ins=stand_ins
                )
                # The rest compares with all layers, whose weights may be those of the method.
                row[f"text {text}"] = {name: getattr(quality, name) for name in _MEASURED}
        self._session.add_round(row)
        return row


def _summarize(session: Session, texts: Sequence[str]) -> None:
    dense, *_ = session.report.rounds
    for row in session.report.rounds:
        summary: dict[str, Any] = {"depth": row["depth"], "method": row["method"]}
        logs = []
        for text in texts:
            perplexity = row[f"text {text}"]["perplexity"]
            summary[f"perplexity_{text}"] = perplexity
            logs.append(math.log(perplexity / dense[f"text {text}"]["perplexity"]))
        summary["of_dense"] = math.exp(math.fsum(logs) / len(logs))
        session.report.summary.append(summary)
    session.report.notes.append(
        "of dense: the geometric mean over the texts of perplexity / that of the dense model"
    )


def _plot(session: Session, stem: Path, num_layers: int) -> None:
    lines: dict[str, dict[float, float]] = {}
    for row in session.report.summary[1:]:
        line = lines.setdefault(row["method"], {float(num_layers): 1.0})
        line[float(row["depth"])] = row["of_dense"]
    save_lines(
        stem,
        lines,
        x_label="depth",
        y_label="perplexity / dense",
        title=session.title,
        log_y=True,
        dashed=["LinearPatch, whole stream", "skip, the layers of LaCo"],
    )
