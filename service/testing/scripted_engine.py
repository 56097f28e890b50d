"""An engine for tests without a model. It is deterministic and replaces vLLM."""

import asyncio
import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence

from service.engine.base import Adapter, Constraint, ConstraintRefused, EngineInfo, EngineUnavailable, OnText
from service.engine.completion import Completion, Scores
from service.engine.decoder_only import DecoderOnlyEngine
from service.engine.tokenizer import Tokenizer
from service.trajectory import Sampling
from service.validation import lark

Reply = Callable[[str], str]
"""Returns the text of the completion for the text of a prompt."""

_TOTAL_WEIGHT = 97.0 * 4096
"""More than the weights of all tokens of a small vocabulary."""


class ScriptedEngine(DecoderOnlyEngine):
    """Completes prompts with the function `reply`, and computes scores from the ids of the prompt and the candidate.

    prompts, cache_salts: those of all requests so far, in order.
    adapters: the adapters that are loaded now. names: those that callers of /v1 could choose.
    num_aborted: number of requests that were cancelled.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, reply: Reply = lambda _: "ok", latency_s: float = 0.0, max_model_len: int = 4096
    ) -> None:
        """`latency_s`: seconds that every request takes."""
        info = EngineInfo("scripted", "scripted-1", max_model_len, Sampling(temperature=0.0, max_tokens=64))
        super().__init__(info, tokenizer)
        self.healthy = True
        self.heartbeat = 0
        self.prompts: list[list[int]] = []
        self.cache_salts: list[str | None] = []
        self.adapters: list[Adapter] = []
        self.names: dict[str, Adapter] = {}
        self.num_aborted = 0
        self._reply = reply
        self._latency_s = latency_s
        self._died = asyncio.Event()
        self._hangs = False

    @property
    def num_calls(self) -> int:
        return len(self.prompts)

    def die(self) -> None:
        """Makes all calls fail, including those in flight, as if the engine's process had ended."""
        self.healthy = False
        self._died.set()

    kill = die

    def hang(self) -> None:
        """Makes all later calls wait forever, as if the engine's process were stopped."""
        self._hangs = True

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: Sampling,
        constraint: Constraint | None,
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
        on_text: OnText | None = None,
    ) -> Completion:
        await self._call(prompt_token_ids, cache_salt)
        text = self._reply(self.tokenizer.decode(prompt_token_ids))
        if on_text:
            for word in re.findall(r"\s*\S+\s*$|\s*\S+", text):
                await asyncio.sleep(0)
                on_text(word)
        ids = self.tokenizer.encode(text)
        for stop in sampling.stop:
            before, found, _ = text.partition(stop)
            if found:
                return self._completion(self.tokenizer.encode(before + found), before, "stop")
        if len(ids) >= sampling.max_tokens:
            cut = ids[: sampling.max_tokens]
            return self._completion(cut, self.tokenizer.decode(cut), "length")
        eos = self.tokenizer.eos_token_id
        return self._completion(ids if eos is None else [*ids, eos], text, "stop")

    async def score(
        self,
        prompt_token_ids: list[int],
        candidates: Sequence[int],
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
    ) -> Scores:
        await self._call(prompt_token_ids, cache_salt)
        base = sum(prompt_token_ids[-8:]) + (int(adapter.version[:6], 16) if adapter else 0)
        weights = [1.0 + (base * 31 + candidate * 17) % 97 for candidate in candidates]
        return Scores(tuple(math.log(weight / _TOTAL_WEIGHT) for weight in weights), 0)

    async def check_constraint(self, constraint: Constraint) -> None:
        if lark.matcher(constraint.spec).is_error():
            raise ConstraintRefused("the constraint does not compile")

    async def watch(self) -> None:
        await self._died.wait()

    async def probe(self) -> None:
        await self._wait()

    async def load_adapter(self, adapter: Adapter) -> None:
        self.adapters.append(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        self.adapters.remove(adapter)

    def show_adapters(self, names: Mapping[str, Adapter]) -> None:
        self.names = dict(names)

    async def openai_app(self) -> None:
        return None

    async def close(self) -> None:
        self.die()

    async def _call(self, prompt_token_ids: list[int], cache_salt: str | None) -> None:
        if self.healthy:
            self.prompts.append(prompt_token_ids)
            self.cache_salts.append(cache_salt)
        try:
            await self._wait()
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise

    async def _wait(self) -> None:
        """Waits for the latency, or forever if the engine hangs. Raises EngineUnavailable once the engine is dead."""
        if self._hangs or self._latency_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._died.wait(), None if self._hangs else self._latency_s)
        if not self.healthy:
            raise EngineUnavailable("the scripted engine is dead")
        self.heartbeat += 1

    def _completion(self, ids: list[int], text: str, finish_reason: str) -> Completion:
        return Completion(tuple(ids), (-0.5,) * len(ids), text, finish_reason, 0)
