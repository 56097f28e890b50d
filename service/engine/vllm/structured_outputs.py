"""Makes vLLM enforce grammars of llguidance beside those of xgrammar.

vLLM 0.32 has a backend for each of the two, but an engine uses only one. The service needs both: action spaces are
compiled for llguidance, which alone can intersect patterns and lengths; vLLM's parsers of tool calls (/v1) need
xgrammar. Both backends write the same bit masks, so one backend can choose for each request.

vLLM passes llguidance only the tokenizer's own end token. Here it also gets the stop tokens of the request, as xgrammar
does: otherwise a constrained completion could not end with the token that ends a turn of the chat template.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from service.engine.tokenizer import tokenizer_json
from service.validation import lark

MARK = "%llguidance"
"""The start of a grammar for llguidance."""


def install() -> None:
    """Replaces vLLM's xgrammar backend in this process. Each process of the engine must call it once."""
    manager: Any = importlib.import_module("vllm.v1.structured_output")
    xgrammar: Any = importlib.import_module("vllm.v1.structured_output.backend_xgrammar")
    if manager.XgrammarBackend is xgrammar.XgrammarBackend:
        manager.XgrammarBackend = _backend(xgrammar.XgrammarBackend)
        xgrammar.validate_xgrammar_grammar = partial(_validate, xgrammar.validate_xgrammar_grammar)


def _validate(validate: Callable[[Any], None], params: Any) -> None:
    """Validates the constraint of a request. A grammar for llguidance was compiled before, by `GrammarChecker`."""
    wanted = params.structured_outputs
    if not (wanted and wanted.grammar and wanted.grammar.startswith(MARK)):
        validate(params)


def _backend(xgrammar_backend: Any) -> Any:
    """Returns a function that creates the backend, which also compiles grammars for llguidance."""
    from vllm.v1.structured_output.backend_guidance import GuidanceGrammar

    def make(*args: Any, **options: Any) -> Any:
        backend = xgrammar_backend(*args, **options)
        compile_others = backend.compile_grammar
        tokenizer_for = lru_cache(maxsize=4)(partial(_tokenizer, backend.tokenizer, backend.vocab_size))

        def compile_grammar(request_type: Any, grammar_spec: str, stop_token_ids: set[int] | None = None) -> Any:
            if not grammar_spec.startswith(MARK):
                return compile_others(request_type, grammar_spec, stop_token_ids)
            tokenizer = tokenizer_for(frozenset(stop_token_ids or ()))
            matcher = lark.matcher(grammar_spec, tokenizer)
            return GuidanceGrammar(ll_matcher=matcher, ll_tokenizer=tokenizer, vocab_size=backend.vocab_size)

        backend.compile_grammar = compile_grammar
        return backend

    return make


def _tokenizer(tokenizer: Any, vocab_size: int, stop_token_ids: frozenset[int]) -> Any:
    """Returns llguidance's tokenizer, which ends a text with one of these tokens."""
    from llguidance import LLTokenizer

    ends = sorted(stop_token_ids) or [tokenizer.eos_token_id]
    return LLTokenizer(tokenizer_json(tokenizer) or "", n_vocab=max(vocab_size, len(tokenizer)), eos_token=ends)
