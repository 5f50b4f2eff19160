"""Real tokenizers: what they add, what a token's text is, and characters that are cut."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from server.engine.model_tokenizer import ModelTokenizer
from server.engine.partial_character import go_on_within_character
from server.model.source import DEMO_MODEL


def load(directory: Path) -> Any:
    auto: Any = AutoTokenizer
    return auto.from_pretrained(directory)


BYTE_LEVEL = load(DEMO_MODEL)


@pytest.fixture(scope="module")
def metaspace(stories_model: Path) -> Any:
    return load(stories_model)


def generated_text(tokenizer: Any, prompt: list[int], generated: list[int]) -> str:
    """Return what vLLM's own detokenizer makes of ``generated`` after ``prompt``."""
    request: Any = SimpleNamespace(
        request_id="test", prompt_token_ids=prompt, sampling_params=SamplingParams()
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    go_on_within_character(detokenizer, ModelTokenizer(tokenizer, "test"), prompt)
    for token_id in generated:
        detokenizer.update([token_id], False)
    return detokenizer.get_next_output_text(finished=True, delta=False)


def check_cut(tokenizer: Any, ids: list[int], cut: int) -> None:
    prompt, generated = ids[:cut], ids[cut:]
    echo = ModelTokenizer(tokenizer, "test").detokenize_prompt(prompt)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert echo + generated_text(tokenizer, prompt, generated) == whole


TEXTS = st.text(st.sampled_from("ab é😀漢 \n"), min_size=1, max_size=12)


@given(TEXTS, st.data())
def test_prompt_and_generated_text_make_the_whole_text_wherever_it_is_cut(
    text: str, data: st.DataObject
) -> None:
    ids = BYTE_LEVEL.encode("x" + text + "x")
    check_cut(BYTE_LEVEL, ids, data.draw(st.integers(1, len(ids) - 1)))


@pytest.mark.parametrize("text", ["The list of 😀 and é", "a 漢字 b", "😀", "x 😀😀 y"])
def test_cut_characters_of_byte_fallback_tokens(metaspace: Any, text: str) -> None:
    ids = metaspace.encode(text + " end")
    for cut in range(1, len(ids)):
        check_cut(metaspace, ids, cut)


def test_a_token_of_a_space_and_part_of_a_character() -> None:
    """Large byte-level vocabularies have such tokens."""
    alphabet = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    merges = [("Ġ", "ð"), ("Ġð", "Ł")]
    vocabulary = alphabet | {a + b: len(alphabet) + i for i, (a, b) in enumerate(merges)}
    backend = Tokenizer(BPE(vocabulary, merges))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer.encode("of 😀 or")
    assert vocabulary["ĠðŁ"] in ids
    for cut in range(1, len(ids)):
        check_cut(tokenizer, ids, cut)
    cut = ids.index(vocabulary["ĠðŁ"]) + 1
    assert ModelTokenizer(tokenizer, "test").detokenize_prompt(ids[:cut]) == "of "
    assert generated_text(tokenizer, ids[:cut], ids[cut:]) == "😀 or"


def test_bytes_that_are_no_text_end_in_a_prompt_of_their_own() -> None:
    broken = BYTE_LEVEL.encode("😀", add_special_tokens=False)[:1] * 40
    assert ModelTokenizer(BYTE_LEVEL, "test").num_complete(broken) is None
    assert (
        generated_text(BYTE_LEVEL, broken, BYTE_LEVEL.encode("so on", add_special_tokens=False))
        == "so on"
    )


def test_texts_of_tokens_have_their_leading_spaces(metaspace: Any) -> None:
    tokenizer = ModelTokenizer(metaspace, "test")
    ids = metaspace.encode("Once upon a time", add_special_tokens=False)
    assert "".join(tokenizer.token_texts(ids)) == " Once upon a time"
    assert tokenizer.token_texts(ids)[1].startswith(" ")
    assert tokenizer.token_texts([metaspace.bos_token_id]) == ["<s>"]
    ids = BYTE_LEVEL.encode(" a list of", add_special_tokens=False)
    assert "".join(ModelTokenizer(BYTE_LEVEL, "test").token_texts(ids)) == " a list of"


def test_what_the_tokenizer_appends_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, {"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    path.write_text(json.dumps(content), "utf-8")
    appending = load(tmp_path)
    plain = appending.encode("Return", add_special_tokens=False)
    assert appending.encode("Return") == [0, *plain, 0]
    tokenizer = ModelTokenizer(appending, "appending")
    assert tokenizer.tokenize("Return") == [0, *plain]
    assert tokenizer.tokenize("Return", special_tokens=False) == plain
    assert "the tokenizer of appending appends ['<|endoftext|>'] to every text" in caplog.text


def test_special_tokens_are_known_by_name(metaspace: Any) -> None:
    special = ModelTokenizer(metaspace, "test").special_tokens
    assert special == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_a_text_longer_than_the_context_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load(DEMO_MODEL)
    tokenizer.model_max_length = 4
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        ids = ModelTokenizer(tokenizer, "test").tokenize("a list of values " * 10)
        assert len(ids) > 4
        assert caplog.text == ""
        tokenizer.encode("a list of values " * 10)
        assert "Token indices sequence length is longer" in caplog.text, "as it says otherwise"
    finally:
        library.removeHandler(caplog.handler)
