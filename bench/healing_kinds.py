"""What is trained in place of skipped layers: maps, or gated MLPs as in ShortGPT's section 4.6.

Each kind stands in for the same layers, those with the lowest Block Influence, and is trained with
the same loss on the same tokens for the same number of steps; the MLPs have as many parameters as
the maps, unless --intermediate-size says otherwise. Perplexity and divergence from the dense model
are on held-out text, in float32 with transformers. `fathom heal --kind` trains either for a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bench.export_methods import EXPORTED_MODELS
from bench.options import Options, option, pruned_depths
from bench.plots import save_lines
from bench.session import Session
from bench.texts import given_texts, held_out_texts
from pruning.checkpoint import CheckpointError, read_config
from pruning.depths import removal_order, skipped_layers
from pruning.importance import measure_block_influence
from pruning.quality import measure_quality
from pruning.repair import RepairError, fit_repair, heal, heal_gated
from pruning.repair.gated_healing import LEARNING_RATE
from pruning.text import TextError
from pruning.transformers_model import batches, load_model, load_tokenizer
from server.calibration.offline_plan import measuring_windows
from server.errors import InvalidArgument
from server.model.demo_corpus import Part
from server.model.source import find_model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HealingKindsOptions(Options):
    depths: str = option("", "Depths; none: three quarters of the layers.")
    steps: int = option(60, "Training steps of each kind, one window of 512 tokens a step.")
    intermediate_size: int = option(
        0, "Hidden size of the MLPs; 0: that with which they have as many parameters as the maps."
    )
    mlp_learning_rate: float = option(LEARNING_RATE, "Learning rate of the MLPs.")
    calibration: str = option(
        "", "Text to rank and train on; none: the documentation of Python's standard library."
    )
    calibration_tokens: int = option(16384, "Tokens of it.")
    texts: str = option(
        "", "Files of held-out text; none: a part of that documentation that was not trained on."
    )
    text_tokens: int = option(4096, "Tokens of each held-out text.")

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        for name in ("steps", "calibration_tokens", "text_tokens"):
            if getattr(self, name) < 1:
                raise typer.BadParameter(f"--{name.replace('_', '-')}: allowed: 1 or more")
        if self.intermediate_size < 0:
            raise typer.BadParameter("--intermediate-size: allowed: 0 or more")
        if not self.mlp_learning_rate > 0:
            raise typer.BadParameter("--mlp-learning-rate: allowed: more than 0")


def run(options: HealingKindsOptions) -> None:
    measure(options)


def measure(options: HealingKindsOptions) -> Session:
    try:
        source = find_model(EXPORTED_MODELS.get(options.model, options.model))
        num_layers = int(read_config(source.directory)["num_hidden_layers"])
        trained_on = given_texts(options.calibration, Part.CALIBRATION, options.calibration_tokens)
        held_out = held_out_texts(options.texts, options.text_tokens)
    except (CheckpointError, InvalidArgument, TextError) as error:
        raise typer.BadParameter(str(error)) from None
    depths = pruned_depths(options.depths, num_layers, [max(1, num_layers * 3 // 4)])
    import torch  # here to keep the help of all benchmarks quick

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    session = Session("healing_kinds", options, {"name": source.title, "dtype": "float32"})
    model = load_model(source.directory, "float32", trust=False)
    tokenizer = load_tokenizer(source.directory, trust=False)

    def windows(texts: Sequence[str], max_tokens: int) -> list[torch.Tensor]:
        found = measuring_windows(model, tokenizer, texts, max_tokens, options.max_context)
        return [torch.tensor(window) for window in found]

    fit = windows(trained_on, options.calibration_tokens)
    texts = {name: windows(of, options.text_tokens) for name, of in held_out.items()}
    with session.progress:
        try:
            _measure(session, model, options, depths, fit, texts)
        except RepairError as error:
            raise typer.BadParameter(str(error)) from None
    session.finish(lambda stem: _plot(session, stem))
    return session


def _measure(
    session: Session,
    model: Any,
    options: HealingKindsOptions,
    depths: Sequence[int],
    windows: Sequence[torch.Tensor],
    texts: dict[str, list[torch.Tensor]],
) -> None:
    progress = session.progress
    hidden = int(model.config.get_text_config().hidden_size)
    with progress.working("Ranking the layers"):
        lists = [window.tolist() for window in windows]
        influence = measure_block_influence(model, batches(lists, model.device, lambda *_: None))
    order = removal_order(influence.scores)
    with progress.working("Fitting maps in closed form"):
        closed = fit_repair(model, windows, model_fingerprint="bench", text_fingerprint="bench")

    def add(kind: str, depth: int, parameters: int, stand_ins: Any, losses: Any = None) -> None:
        skipped = sorted(skipped_layers(order, depth))
        row: dict[str, Any] = {"kind": kind, "depth": depth, "parameters": parameters}
        summary = dict(row)
        for text, of_text in texts.items():
            (quality,) = measure_quality(model, of_text, [skipped], stand_ins=stand_ins)
            row[f"text {text}"] = asdict(quality)
            summary[f"perplexity_{text}"] = quality.perplexity
            summary[f"kl_{text}"] = quality.kl_nats
        row["losses"] = losses
        session.add_round(row)
        session.report.summary.append(summary)

    add("dense", model.config.get_text_config().num_hidden_layers, 0, None)
    for depth in depths:
        skipped = sorted(skipped_layers(order, depth))
        of_maps = len(skipped) * hidden**2
        add("skip", depth, 0, None)
        add("closed-form maps", depth, of_maps, closed.layers)
        for kind, began_with in (("healed maps", closed), ("maps trained from zero", None)):
            losses: list[tuple[int, float]] = []
            healed = heal(
                model,
                windows,
                skipped,
                began_with,
                model_fingerprint="bench",
                text_fingerprint="bench",
                steps=options.steps,
                seed=options.seed,
                on_step=_following(session, f"{kind}, depth {depth}", losses),
            )
            add(kind, depth, of_maps, healed.layers, losses)
        losses = []
        mlps = heal_gated(
            model,
            windows,
            skipped,
            intermediate_size=options.intermediate_size or None,
            model_fingerprint="bench",
            text_fingerprint="bench",
            steps=options.steps,
            seed=options.seed,
            learning_rate=options.mlp_learning_rate,
            on_step=_following(session, f"gated MLPs, depth {depth}", losses),
        )
        kind = f"gated MLPs of {mlps.intermediate_size}"
        add(kind, depth, mlps.num_parameters, mlps.layers, losses)


def _following(session: Session, name: str, losses: list[tuple[int, float]]) -> Any:
    def on_step(step: Any) -> None:
        if step.held_out_loss is not None:
            losses.append((step.step, step.held_out_loss))
        session.progress.advance(f"Training {name}", step.step, step.num_steps)

    return on_step


def _plot(session: Session, stem: Path) -> None:
    save_lines(
        stem,
        {
            f"{row['kind']}, depth {row['depth']}": {float(step): loss for step, loss in losses}
            for row in session.report.rounds
            if (losses := row["losses"])
        },
        x_label="training step",
        y_label="KL from dense on windows held out, nats",
        title=session.title,
    )
