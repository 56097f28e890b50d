"""Finds out whether vLLM can score all branches on a path in one request (`prompt_logprob_token_ids`)."""

import math
from typing import Any

from service.engine.base import ActionSpaceRefused
from service.engine.decision_paths import TriePath
from service.engine.decision_trie import Branch
from service.engine.decoder_only import DecoderOnlyEngine

_MAX_DIFFERENCE = 0.1
"""Of scores of one token in two requests. In bfloat16 they differ a little."""
_PROBE = TriePath((Branch((), (0, 1), (0, 1, 2)), Branch((1,), (0, 1), (1, 2, 3))))


def max_candidates(config: Any) -> int:
    """Returns how many candidates a place may have, from a VllmConfig; 0 if the configuration does not support them.

    vLLM's V1 model runner, which serves CPUs, does not.
    """
    if not config.use_v2_model_runner or config.cache_config.kv_sharing_fast_prefill:
        return 0
    limit: int = config.model_config.max_logprobs
    return config.model_config.get_vocab_size() if limit < 0 else limit


async def fault(engine: DecoderOnlyEngine) -> str | None:
    """Compares `score_path` with `score` on a small path. Returns why `score_path` must not be used, or None."""
    prompt = [0]
    try:
        found = await engine.score_path(prompt, _PROBE)
        expected = [await engine.score([*prompt, *branch.path], branch.children) for branch in _PROBE.branches]
    except ActionSpaceRefused as error:
        return str(error)
    if found is None:
        return "the engine returned no scores"
    differences = [
        abs(one - other)
        for scores, others in zip(found, expected, strict=True)
        for one, other in zip(scores.logprobs, others.logprobs, strict=True)
    ]
    largest = max(differences)
    return None if largest < _MAX_DIFFERENCE and not math.isnan(sum(differences)) else f"scores differ by {largest:.2g}"
