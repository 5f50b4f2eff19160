"""Distillation: weights that stand in for skipped layers, trained with the dense model as teacher.

Of each window of text, the weights learn to bring the next-token distributions of the model
without the layers closer to its own, and everything else stays as it is.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.decoder import StandIn, find_decoder, inference_options, without_layers
from pruning.fingerprint import token_fingerprint
from pruning.repair.errors import RepairError
from pruning.repair.maps import Healing
from pruning.repair.training_state import TrainingFile, TrainingState
from pruning.repair.windows import split_windows

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT_STEPS = 120
# Steps between two looks at the held-out windows, and looks in a row without gain that end it.
EVALUATE_EVERY = 20
PATIENCE = 3
# A look at more of the held-out windows would cost more than the steps between two looks.
_MAX_HELD_OUT = 4
# Steps that are lost at most when the process is killed.
_SAVE_EVERY = 10
# What a map learns from less text is that text.
MIN_TOKENS = 1024
# Limits each temporary tensor of a chunk of tokens to some 64 MiB.
_CHUNK_ELEMENTS = 1 << 24

# Makes stand-ins of weights by layer: those of a training.
StandInsOf = Callable[[Mapping[int, "torch.Tensor"]], dict[int, StandIn]]


@dataclass(frozen=True, slots=True)
class HealingStep:
    """What a step of a training has shown.

    ``loss`` is the divergence from the dense model on the step's window before the step, in nats
    a token, ``held_out_loss`` that on the held-out windows after it; None: it was not measured.
    """

    step: int
    num_steps: int
    loss: float | None
    held_out_loss: float | None


class Distillation:
    """The training of what stands in for one set of skipped layers, all of it at once.

    One window in eight is held out, and the weights that count are those with the least
    divergence there, be it those of the beginning. A step takes one window. Held in memory are the
    activations of that window, which for windows of 512 tokens are fewer than the weights of any
    but the smallest models, and its logits three times.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Sequence[torch.Tensor],
        skipped: Collection[int],
        *,
        model_fingerprint: str,
        steps: int = DEFAULT_STEPS,
        seed: int = 0,
        layers: Sequence[nn.Module] | None = None,
    ) -> None:
        """Prepare a training on ``windows`` of token ids, [length] each.

        Raises :class:`ValueError` for a model in training mode, for one whose layers cannot be
        found and for layers that it does not have; :class:`RepairError` for too little text, for
        no skipped layers and for no steps.
        """
        if steps < 1:
            raise RepairError(f"steps: got {steps}, allowed: 1 or more")
        if not skipped:
            raise RepairError(
                "skipped: got no layers, allowed: one or more; there is nothing to heal"
            )
        fit, held_out = split_windows(windows)
        if (num_tokens := sum(map(len, fit))) < MIN_TOKENS:
            raise RepairError(
                f"text: got {num_tokens} tokens to train on, allowed: {MIN_TOKENS} or more"
            )
        decoder = find_decoder(model, layers)
        for layer in skipped:
            if not 0 <= layer < len(decoder.layers):
                allowed = f"0 to {len(decoder.layers) - 1}"
                raise ValueError(f"skipped: got layer {layer}, allowed: {allowed}")
        self._model = model
        self._options = inference_options(model)
        self._layers = decoder.layers
        self._tokens = token_fingerprint(window.tolist() for window in windows)
        self._windows = fit
        self._held_out = held_out[:_MAX_HELD_OUT]
        self._skipped = tuple(sorted(skipped))
        self._model_fingerprint = model_fingerprint
        self._steps = steps
        self._seed = seed
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.device: torch.device = embeddings.weight.device
        config: Any = model.config
        self.hidden_size = int(config.get_text_config().hidden_size)
        self.num_layers = len(decoder.layers)
        self.num_tokens = num_tokens

    def run(
        self,
        first: Mapping[int, torch.Tensor],
        stand_ins_of: StandInsOf,
        learning_rate: float,
        checkpoint: Path | None = None,
        on_step: Callable[[HealingStep], None] | None = None,
    ) -> TrainingState:
        """Train weights that begin with ``first``, float32 tensors by layer.

        ``stand_ins_of`` makes of such weights what the layers do instead. Adam's
        ``learning_rate`` at the first step falls to 0 along a cosine. The result, the state at
        the end, is determined by the arguments, the number of threads and the machine.
        ``checkpoint`` is a file that keeps the state: after an interruption the training goes on
        from there, with the same result. It is removed at the end.

        Raises :class:`RepairError` for a training that gives what is not a finite number.
        """
        kept = None
        if checkpoint is not None:
            identity = {
                "model": self._model_fingerprint,
                "tokens": self._tokens,
                "skipped": list(self._skipped),
                "began_with": _fingerprint(first),
                "steps": self._steps,
                "seed": self._seed,
                "learning_rate": learning_rate,
            }
            kept = TrainingFile(checkpoint, identity)
        state = self._train(first, stand_ins_of, learning_rate, kept, on_step or (lambda _: None))
        if kept is not None:
            kept.remove()
        return state

    def healing(self, state: TrainingState, started_from: str | None = None) -> Healing:
        """Return how the weights of ``state`` were trained, for the file that they are kept in."""
        return Healing(
            skipped=self._skipped,
            started_from=started_from,
            steps=self._steps,
            num_steps_taken=state.step,
            seed=self._seed,
            first_loss=state.first_loss,
            loss=state.best_loss,
        )

    def _train(
        self,
        first: Mapping[int, torch.Tensor],
        stand_ins_of: StandInsOf,
        learning_rate: float,
        kept: TrainingFile | None,
        on_step: Callable[[HealingStep], None],
    ) -> TrainingState:
        import torch

        state = None if kept is None else kept.load()
        if state is None:
            state = _first_state(first)
            self._evaluate(state, stand_ins_of)
            state.first_loss = state.best_loss
        on_step(HealingStep(state.step, self._steps, None, state.best_loss))
        parameters = {
            layer: torch.nn.Parameter(weight.to(first[layer]))
            for layer, weight in state.weight.items()
        }
        state.weight = {layer: parameter.detach() for layer, parameter in parameters.items()}
        optimizer = _adam(parameters, state, learning_rate)
        with _frozen(self._model):
            while state.step < self._steps and state.num_stale < PATIENCE:
                share_done = state.step / self._steps
                rate = learning_rate * (1 + math.cos(math.pi * share_done)) / 2
                optimizer.param_groups[0]["lr"] = rate
                loss = self._step(optimizer, parameters, stand_ins_of, state.step)
                state.step += 1
                held_out_loss = None
                if state.step % EVALUATE_EVERY == 0 or state.step == self._steps:
                    held_out_loss = self._evaluate(state, stand_ins_of)
                if kept is not None and state.step % _SAVE_EVERY == 0:
                    _take_moments(optimizer, parameters, state)
                    kept.save(state)
                on_step(HealingStep(state.step, self._steps, loss, held_out_loss))
        return state

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[int, nn.Parameter],
        stand_ins_of: StandInsOf,
        step: int,
    ) -> float:
        import torch

        window = self._window(step)
        target = self._logits(window)
        stand_ins = stand_ins_of(parameters)
        with torch.enable_grad(), without_layers(self._layers, self._skipped, stand_ins):
            logits = self._model(input_ids=window[None], **self._options).logits[0]
        # What the loss does to the logits is known, so it needs no graph of its own: that would
        # hold several tensors of the size of the logits.
        loss, gradient = divergence(logits.detach(), target)
        _check_finite(loss, f"the loss of step {step + 1}")
        optimizer.zero_grad()
        logits.backward(gradient)
        for layer, parameter in parameters.items():
            if parameter.grad is None or not bool(parameter.grad.isfinite().all()):
                raise RepairError(
                    f"healing: the gradient of what stands in for layer {layer} at step {step + 1} "
                    "is not finite"
                )
        optimizer.step()
        return loss

    def _window(self, step: int) -> torch.Tensor:
        """Return the window of a step: all of them in turn, in another order each time."""
        epoch, place = divmod(step, len(self._windows))
        order = list(range(len(self._windows)))
        random.Random(f"{self._seed} {epoch}").shuffle(order)
        return self._windows[order[place]].to(self.device)

    def _evaluate(self, state: TrainingState, stand_ins_of: StandInsOf) -> float:
        """Return the loss on the held-out windows, and note whether it is the best."""
        total, num_tokens = 0.0, 0
        for window in self._held_out:
            window = window.to(self.device)
            target = self._logits(window)
            loss, _ = divergence(self._logits(window, stand_ins_of(state.weight)), target)
            total += loss * len(window)
            num_tokens += len(window)
        loss = total / num_tokens
        _check_finite(loss, f"the loss on held-out text after {state.step} steps")
        if loss < state.best_loss:
            state.best_loss, state.num_stale = loss, 0
            state.best = {layer: weight.clone() for layer, weight in state.weight.items()}
        else:
            state.num_stale += 1
        return loss

    def _logits(
        self, window: torch.Tensor, stand_ins: Mapping[int, StandIn] | None = None
    ) -> torch.Tensor:
        """Return the logits of a window with ``stand_ins``, or of the dense model."""
        import torch

        skipped = () if stand_ins is None else self._skipped
        with torch.no_grad(), without_layers(self._layers, skipped, stand_ins or {}):
            output = self._model(input_ids=window[None], **self._options)
        logits: torch.Tensor = output.logits[0]
        return logits


def divergence(logits: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the mean KL(target || logits), in nats, and its gradient with respect to ``logits``.

    Both are [num_tokens, vocabulary]. ``target`` is overwritten with the gradient, (softmax(logits)
    - softmax(target)) / num_tokens.
    """
    import torch

    num_tokens, vocab_size = logits.shape
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    chunk = max(_CHUNK_ELEMENTS // max(vocab_size, 1), 1)
    with torch.no_grad():
        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            logprobs = logits[rows].float().log_softmax(-1)
            reference = target[rows].float().log_softmax(-1)
            probabilities = reference.exp()
            # A token with probability 0 in the target adds nothing, even if it is 0 in both.
            total += torch.where(
                reference.isneginf(), 0.0, probabilities * (reference - logprobs)
            ).sum(dtype=torch.float64)
            target[rows] = (logprobs.exp() - probabilities) / num_tokens
    return float(total / num_tokens), target


def _first_state(first: Mapping[int, torch.Tensor]) -> TrainingState:
    import torch

    return TrainingState(
        weight=dict(first),
        first_moment={i: torch.zeros_like(weight) for i, weight in first.items()},
        second_moment={i: torch.zeros_like(weight) for i, weight in first.items()},
        best={i: weight.clone() for i, weight in first.items()},
    )


def _adam(
    parameters: Mapping[int, nn.Parameter], state: TrainingState, learning_rate: float
) -> torch.optim.Optimizer:
    import torch

    optimizer = torch.optim.Adam(parameters.values(), lr=learning_rate)
    if state.step:
        for layer, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.first_moment[layer].to(parameter, copy=True),
                "exp_avg_sq": state.second_moment[layer].to(parameter, copy=True),
            }
    return optimizer


def _take_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[int, nn.Parameter], state: TrainingState
) -> None:
    for layer, parameter in parameters.items():
        moments = optimizer.state[parameter]
        state.first_moment[layer] = moments["exp_avg"]
        state.second_moment[layer] = moments["exp_avg_sq"]


class _frozen:
    """Keeps the model's own weights from learning, while in context."""

    def __init__(self, model: nn.Module) -> None:
        self._learning = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(True)


def _check_finite(loss: float, what: str) -> None:
    if not math.isfinite(loss):
        raise RepairError(f"healing: {what} is not a finite number")


def _fingerprint(maps: Mapping[int, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for layer in sorted(maps):
        digest.update(f"{layer} {list(maps[layer].shape)}\n".encode())
        digest.update(maps[layer].cpu().contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"
