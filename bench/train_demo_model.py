"""Training of the demo model: a 16-layer Llama on the documentation of Python.

    python -m bench.train_demo_model --work-dir /tmp/demo-model

The training is seeded. Run again with the same ``--work-dir``, it goes on from the last
checkpoint. Layers are dropped at random during training (LayerDrop, Fan et al., arXiv
1909.11556), as a regularizer on a small corpus and to prepare the model for pruning. Matrices are
optimized by Muon, everything else by AdamW. The result is the mean of the weights over the last
part of the run (stochastic weight averaging, Izmailov et al., arXiv 1803.05407), because late in
the run the model overfits its small corpus in a different way at each step.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.model.demo_corpus import Part, documents

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
)
# Paragraphs of at least this many characters that are also in the held-out part are kept out of
# training, because the library repeats itself.
LEAK_LENGTH = 60
# After this share of the run, the weights at every report count towards the mean.
AVERAGED_FROM = 0.7


@dataclass(frozen=True)
class Settings:
    """The settings of a run; a checkpoint of other settings is refused."""

    num_steps: int
    batch_size: int
    context: int
    matrix_learning_rate: float
    learning_rate: float
    weight_decay: float
    dropout: float
    layer_drop: float
    seed: int


def model_config(context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attention_bias=False,
        mlp_bias=False,
    )


def training_documents() -> list[str]:
    """Return the training texts, without paragraphs that are also in the held-out part."""
    held_out = {
        paragraph
        for document in documents([Part.HELD_OUT])
        for paragraph in document.split("\n\n")
        if len(paragraph) >= LEAK_LENGTH
    }
    seen: set[str] = set()
    result = []
    for document in documents([Part.TRAINING, Part.CALIBRATION]):
        paragraphs = []
        for paragraph in document.split("\n\n"):
            long = len(paragraph) >= LEAK_LENGTH
            if paragraph in held_out or (long and paragraph in seen):
                continue
            seen.add(paragraph)
            paragraphs.append(paragraph)
        if paragraphs:
            result.append("\n\n".join(paragraphs))
    return result


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@torch.compile
def training_layer(
    layer: nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    dropout: float,
) -> torch.Tensor:
    """Return ``hidden`` after ``layer``, with dropout on what the layer adds."""
    update = layer(hidden, position_embeddings=rotary, position_ids=positions) - hidden
    return hidden + functional.dropout(update, dropout)


def logits_of(
    model: LlamaForCausalLM, input_ids: torch.Tensor, settings: Settings | None = None
) -> torch.Tensor:
    """Return the logits of ``input_ids``; with ``settings``, drop layers and parts of updates."""
    decoder = model.model
    hidden = decoder.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    num_layers = len(decoder.layers)
    for index, layer in enumerate(decoder.layers):
        if settings is None:
            hidden = layer(hidden, position_embeddings=rotary, position_ids=positions)
            continue
        # The first and the last layer are never dropped: no model works without them.
        drop = settings.layer_drop if 0 < index < num_layers - 1 else 0.0
        if torch.rand(()).item() >= drop:
            hidden = training_layer(layer, hidden, rotary, positions, settings.dropout)
    logits: torch.Tensor = model.lm_head(decoder.norm(hidden))
    return logits


def batches(tokens: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Yield batches [batch_size, context + 1] for ever; each epoch cuts at another offset."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        offset = int(torch.randint(settings.context, (), generator=generator))
        usable = tokens[offset:]
        starts = torch.arange(0, len(usable) - settings.context - 1, settings.context)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in starts.split(settings.batch_size):
            if len(chunk) == settings.batch_size:
                yield torch.stack([usable[s : s + settings.context + 1] for s in chunk.tolist()])


@torch.inference_mode()
def bits_per_character(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int
) -> tuple[float, float]:
    """Return bits per character and perplexity per token of ``texts``.

    Windows of ``context`` tokens overlap by half; a token is scored in the window in which it has
    more context.
    """
    model.eval()
    nats, num_tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        scored = 1
        for start in range(0, max(1, len(ids) - context // 2), context // 2):
            window = torch.tensor([ids[start : start + context + 1]])
            with torch.autocast("cpu", torch.bfloat16):
                logits = logits_of(model, window[:, :-1])
            losses = functional.cross_entropy(logits[0].float(), window[0, 1:], reduction="none")[
                scored - start - 1 :
            ]
            nats += float(losses.double().sum())
            num_tokens += len(losses)
            scored = start + window.shape[1]
    model.train()
    return nats / math.log(2) / sum(map(len, texts)), math.exp(nats / num_tokens)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return a trapezoid: warm-up, constant, then down to nothing over the last 45 %."""
    warm_up, cool_down = 40, 0.45 * num_steps
    return min(1.0, (step + 1) / warm_up, (num_steps - step) / cool_down)


def average_weights(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of the state dictionaries in ``paths``."""
    states = [torch.load(path, weights_only=True) for path in paths]
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]
    }


def train(settings: Settings, work_dir: Path, report_every: int) -> None:
    torch.manual_seed(settings.seed)
    work_dir.mkdir(parents=True, exist_ok=True)
    texts = training_documents()
    held_out = list(documents([Part.HELD_OUT]))
    config = model_config(settings.context)
    tokenizer = train_tokenizer(texts, config.vocab_size, settings.context)
    tokens = torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in ids])
    print(
        f"{len(tokens)} training tokens, {sum(map(len, texts)) / len(tokens):.2f} characters each"
    )

    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=settings.matrix_learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [settings.matrix_learning_rate, settings.learning_rate]

    checkpoint_path = work_dir / "checkpoint.pt"
    first_step = 0
    if checkpoint_path.exists():
        checkpoint = torch.load(checkpoint_path, weights_only=True)
        if checkpoint["settings"] != vars(settings):
            raise SystemExit(f"{checkpoint_path} was made with {checkpoint['settings']}")
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step = checkpoint["step"]
        print(f"resuming at step {first_step}")

    data = batches(tokens, settings)
    for _ in range(first_step):
        next(data)
    started, running = time.monotonic(), 0.0
    for step in range(first_step, settings.num_steps):
        torch.manual_seed(settings.seed * 1_000_003 + step)  # resuming changes nothing
        batch = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(model, batch[:, :-1], settings)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(step, settings.num_steps)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        done = step + 1
        if done % report_every == 0 or done == settings.num_steps:
            bits, perplexity = bits_per_character(model, tokenizer, held_out, settings.context)
            seconds = (time.monotonic() - started) / (done - first_step)
            print(
                f"step {done}/{settings.num_steps} training loss {running / report_every:.3f} "
                f"held-out {bits:.3f} bits/character, perplexity {perplexity:.2f}; "
                f"{seconds:.2f} s/step, {(settings.num_steps - done) * seconds / 60:.0f} min left",
                flush=True,
            )
            running = 0.0
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            if done >= AVERAGED_FROM * settings.num_steps:
                torch.save(weights, work_dir / f"weights-{done:06}.pt")
            torch.save(
                {
                    "settings": vars(settings),
                    "step": done,
                    "model": weights,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                },
                checkpoint_path.with_suffix(".new"),
            )
            checkpoint_path.with_suffix(".new").replace(checkpoint_path)

    averaged = sorted(work_dir.glob("weights-*.pt"))
    print(f"averaging the weights of {', '.join(path.stem for path in averaged)}")
    model.load_state_dict(average_weights(averaged))
    model.bfloat16()
    bits, perplexity = bits_per_character(model, tokenizer, held_out, settings.context)
    output = work_dir / "model"
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(
        json.dumps(
            {
                "settings": vars(settings),
                "num_training_tokens": len(tokens),
                "held_out_characters": sum(map(len, held_out)),
                "held_out_bits_per_character": bits,
                "held_out_perplexity": perplexity,
            },
            indent=2,
        )
        + "\n"
    )
    print(f"bfloat16 weights: {bits:.3f} bits/character, perplexity {perplexity:.2f}; {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--num-steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--matrix-learning-rate", type=float, default=3e-3)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--layer-drop", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=20240306)
    parser.add_argument("--report-every", type=int, default=50)
    arguments = vars(parser.parse_args())
    work_dir, report_every = arguments.pop("work_dir"), arguments.pop("report_every")
    train(Settings(**arguments), work_dir, report_every)


if __name__ == "__main__":
    main()
