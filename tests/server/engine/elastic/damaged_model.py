"""A small real model with damaged weights, and an embedding of another size than its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# Rows of the embedding; the tokenizer has 512 tokens.
NUM_ROWS = 520


def damaged_model(source: Path, directory: Path) -> Path:
    """Write ``source``, which is stories260K, with a NaN in layer 2 of its 5 layers.

    The embedding gets 8 rows without a token, the tokenizer marks words, and the generation config
    names an end of text that is no token.
    """
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(NUM_ROWS, mean_resizing=False)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
        # What is generated then is as often a row without a token as not.
        model.get_input_embeddings().weight[512:] = model.get_input_embeddings().weight[400:408]
    model.save_pretrained(directory)
    shutil.copy(source / "tokenizer_config.json", directory)
    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    tokenizer["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": False,
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    ends = {"eos_token_id": [2, NUM_ROWS, 1 << 40]}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    return directory
