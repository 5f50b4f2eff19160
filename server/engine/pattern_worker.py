"""A process that compiles patterns to see whether that can be done within limits.

``python -m server.engine.pattern_worker MODEL VOCAB_SIZE`` reads lines of JSON from stdin, each
``[kind, pattern]`` with the values of :class:`server.engine.base.StructureKind`, and answers each
with a line of JSON: what is wrong with it, or null.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What patterns may take beyond what the process has when it is ready.
_MEMORY_BYTES = 1 << 30


def main() -> None:
    """Answer until stdin ends."""
    compile_pattern = _compiler(sys.argv[1], int(sys.argv[2]))
    limit = _virtual_bytes() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, pattern = json.loads(line)
        problem = None
        try:
            compile_pattern(kind, pattern)
        except Exception as error:  # xgrammar documents no base class of what it raises
            problem = str(error) or type(error).__name__
        print(json.dumps(problem), flush=True)


def _compiler(model: str, vocab_size: int) -> Callable[[str, str], Any]:
    import xgrammar
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile_pattern(kind: str, pattern: str) -> Any:
        match kind:
            case "json":
                return compiler.compile_json_schema(pattern)
            case "regex":
                return compiler.compile_regex(pattern)
            case "grammar":
                return compiler.compile_grammar(pattern)
            case _:
                return compiler.compile_structural_tag(pattern)

    return compile_pattern


def _virtual_bytes() -> int:
    num_pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    return num_pages * resource.getpagesize()


if __name__ == "__main__":
    main()
