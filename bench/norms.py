"""Why layers are redundant: two tiny models that differ in where their norms are, over training.

In a pre-norm model every layer adds to a stream that grows, so later layers turn it less and less;
in a post-norm model the norm after each sum keeps the stream as short as what is added (ShortGPT,
arXiv 2403.03853, section 2.1, Figure 2 and appendix A). Both models begin with the same weights and
see the same text. Shown is the cosine between what goes into a layer and what comes out of it,
on text that was not trained on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from bench.options import Options, option
from bench.plots import save_lines
from bench.session import Session
from server.model.demo_corpus import Part, documents
from server.model.source import DEMO_MODEL

_NAMES = {True: "pre-norm", False: "post-norm"}
_NUM_HELD_OUT_TOKENS = 1 << 16
_NUM_HELD_OUT_WINDOWS = 32
# A layer whose cosine is above this one leaves the stream nearly as it was.
_NEARLY_UNCHANGED = 0.9


@dataclass(frozen=True)
class NormsOptions(Options):
    layers: int = option(8, "Layers of each model.")
    hidden: int = option(128, "Hidden size of each model.")
    intermediate: int = option(512, "Width of the feed-forward layers.")
    heads: int = option(4, "Attention heads.")
    steps: int = option(600, "Training steps of each model.")
    batch_size: int = option(8, "Windows of text in a step.")
    window: int = option(128, "Tokens of a window.")
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    looks: int = option(10, "How often the cosines are measured during training, at least once.")

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        for name in ("steps", "batch_size", "looks"):
            if getattr(self, name) < 1:
                raise typer.BadParameter(f"--{name.replace('_', '-')}: allowed: 1 or more")
        if self.layers < 2:
            raise typer.BadParameter(f"--layers: got {self.layers}, allowed: 2 or more")
        if self.window < 2:
            raise typer.BadParameter(f"--window: got {self.window}, allowed: 2 or more tokens")
        if self.hidden % self.heads:
            raise typer.BadParameter(
                f"--hidden: got {self.hidden}, allowed: a multiple of --heads {self.heads}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise typer.BadParameter(
                f"--learning-rate: got {self.learning_rate}, allowed: a number above 0"
            )


def run(options: NormsOptions) -> None:
    measure(options)


def measure(options: NormsOptions) -> Session:
    # Imported here to keep the other benchmarks' help quick.
    import torch

    from bench.tiny_model import TinyModel, look, tokens_of, train, windows_of, without_one
    from pruning.transformers_model import load_tokenizer

    session = Session("norms", options, {"layers": options.layers, "hidden": options.hidden})
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with session.progress as progress:
        with progress.working("Reading the text"):
            tokenizer = load_tokenizer(DEMO_MODEL, trust=False)
            num_tokens = options.steps * options.batch_size * (options.window + 1)
            trained_on = tokens_of(tokenizer, documents([Part.TRAINING]), num_tokens)
            held_out = windows_of(
                tokens_of(tokenizer, documents([Part.HELD_OUT]), _NUM_HELD_OUT_TOKENS),
                _NUM_HELD_OUT_WINDOWS,
                options.window,
                torch.Generator().manual_seed(options.seed),
            )
        for done, (pre_norm, name) in enumerate(_NAMES.items()):
            torch.manual_seed(options.seed)
            model = TinyModel(options, len(tokenizer), pre_norm=pre_norm)
            for step in train(model, trained_on, options):
                if step % max(1, options.steps // options.looks) == 0 or step == options.steps:
                    row = {"norm": name, "step": step, **look(model, held_out)}
                    session.add_round(row)
                progress.advance(
                    f"Training, {name}", done * options.steps + step, len(_NAMES) * options.steps
                )
            session.report.rounds[-1] |= without_one(model, held_out)
    session.report.summary += [_summary(session.report.rounds, name) for name in _NAMES.values()]
    session.report.notes.append(paragraph(session.report.summary, options.steps))
    session.finish(lambda stem: _plot(session, stem))
    return session


def paragraph(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """Return what the summary's rows say, in words."""
    pre, post = rows
    high, low = (pre, post) if pre["median_cosine"] >= post["median_cosine"] else (post, pre)
    cheap, dear = (pre, post) if pre["loss_added"] <= post["loss_added"] else (post, pre)
    return (
        f"After {steps} steps from one seed on one text, the median layer of the {high['norm']} "
        f"model leaves the stream at a cosine of {high['median_cosine']:.3f} to what it was, that "
        f"of the {low['norm']} model at {low['median_cosine']:.3f}; before training these were "
        f"{high['median_cosine_at_first']:.3f} and {low['median_cosine_at_first']:.3f}. Above "
        f"{_NEARLY_UNCHANGED} are {pre['layers_nearly_unchanged']} of {pre['layers']} layers "
        f"pre-norm and {post['layers_nearly_unchanged']} post-norm. Held-out text costs "
        f"{pre['loss']:.3f} nats a token pre-norm and {post['loss']:.3f} post-norm. Leaving out "
        f"the layer that turns the stream least adds {cheap['loss_added']:.3f} nats to the "
        f"{cheap['norm']} model and {dear['loss_added']:.3f} to the {dear['norm']} one."
    )


def _summary(rounds: Sequence[dict[str, Any]], norm: str) -> dict[str, Any]:
    rows = [row for row in rounds if row["norm"] == norm]
    cosines = rows[-1]["cosines"]
    return {
        "norm": norm,
        "layers": len(cosines),
        "median_cosine_at_first": statistics.median(rows[0]["cosines"]),
        "median_cosine": statistics.median(cosines),
        "lowest_cosine": min(cosines),
        "highest_cosine": max(cosines),
        "layers_nearly_unchanged": sum(cosine > _NEARLY_UNCHANGED for cosine in cosines),
        "loss": rows[-1]["loss"],
        "most_redundant": rows[-1]["most_redundant"],
        "loss_added": rows[-1]["loss_without"] - rows[-1]["loss"],
    }


def _plot(session: Session, stem: Path) -> None:
    lines: dict[str, dict[float, float]] = {}
    for row in session.report.rounds:
        for line, value in (
            (f"{row['norm']}, median layer", statistics.median(row["cosines"])),
            (f"{row['norm']}, lowest layer", min(row["cosines"])),
        ):
            lines.setdefault(line, {})[float(row["step"])] = value
    save_lines(
        stem,
        lines,
        x_label="training step",
        y_label="cosine between a layer's input and output",
        title=f"{session.report.model['layers']} layers, one seed, norms before or after",
        dashed=[line for line in lines if line.endswith("lowest layer")],
    )
