"""Implements the engine with vLLM's AsyncLLM."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from starlette.types import ASGIApp

from service.engine import orphan_guard
from service.engine.adapters import AdapterRefused
from service.engine.base import (
    ActionSpaceRefused,
    Adapter,
    Constraint,
    EngineInfo,
    EngineUnavailable,
    OnText,
)
from service.engine.completion import Completion, CompletionText, Scores
from service.engine.decision_paths import TriePath
from service.engine.decoder_only import DecoderOnlyEngine
from service.engine.grammar import GrammarChecker
from service.engine.tokenizer import HFTokenizer
from service.engine.vllm import openai_app, path_scoring
from service.engine.vllm.loading import Heartbeat, build, in_daemon_thread, model_info
from service.engine.vllm.openai_app import OpenAIApp
from service.observability import logs
from service.trajectory import Sampling

_log = logs.get(__name__)

T = TypeVar("T")

_STATS_INTERVAL_S = 10.0
_POLL_INTERVAL_S = 0.5


class VLLMEngine(DecoderOnlyEngine):
    """An engine that runs a decoder-only model with vLLM. `VLLMEngine.load` creates it."""

    max_candidates = 128
    """vLLM's limit on the length of `logprob_token_ids` (vllm.sampling_params.MAX_LOGPROB_TOKEN_IDS)."""
    min_temperature = 0.01
    """vLLM raises lower ones (vllm.sampling_params._MAX_TEMP)."""

    def __init__(
        self, llm: Any, info: EngineInfo, heartbeat: Heartbeat, grammar: GrammarChecker, openai: OpenAIApp
    ) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError

        super().__init__(info, HFTokenizer(llm.get_tokenizer()))
        self._llm = llm
        self._heartbeat = heartbeat
        self._was_killed = False
        self._grammar = grammar
        self._openai = openai
        self._ids, self._lora_ids = count(), count(1)
        self._loras: dict[Adapter, Any] = {}
        self._params, self._structured, self._tokens_input = SamplingParams, StructuredOutputsParams, tokens_input
        self._final, self._cumulative = RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE
        self._dead, self._refused = EngineDeadError, VLLMClientError
        self.max_path_candidates = path_scoring.max_candidates(llm.vllm_config)

    @classmethod
    async def load(
        cls,
        model: str,
        options: dict[str, Any],
        *,
        name: str,
        aliases: Sequence[str] = (),
        grammar_limit_s: float,
        openai_options: dict[str, Any] | None = None,
        media_hosts: Sequence[str] = (),
        cache: Path | None = None,
    ) -> "VLLMEngine":
        """Loads the weights and starts the engine's processes. It takes seconds to minutes, and runs in a thread.

        model: a folder or the id of a model on the Hugging Face hub.
        options: engine options, the fields of vLLM's AsyncEngineArgs.
        name: the name of the model for callers. aliases: further names that they may use in /v1.
        grammar_limit_s: timeout for compiling one constraint, in seconds.
        openai_options: options of /v1; see `openai_app.OPTIONS`.
        media_hosts: hosts from which /v1 may fetch media.
        cache: a file with digests of weight files; see `weights_version`.

        Raises EngineRefused for a model or an option that is not supported, and whatever vLLM raises otherwise. If this
        is cancelled, the thread continues, because vLLM cannot be interrupted. It does not prevent the process from
        exiting.
        """
        openai_app.check_options(openai_options or {})
        heartbeat = Heartbeat()
        llm, tokenizer = await in_daemon_thread(lambda: build(model, name, options, heartbeat))
        grammar = GrammarChecker(tokenizer, limit_s=grammar_limit_s)
        try:
            tasks = tuple(await _result(llm, llm.get_supported_tasks()))
            info = await asyncio.to_thread(model_info, llm, model, name, cache)
            if "generate" not in tasks:
                info = replace(info, generates=False, no_episodes="it cannot generate text")
            served = openai_app.Served(name, tuple(aliases), openai_options or {}, tuple(media_hosts), tasks)
            engine = cls(llm, info, heartbeat, grammar, OpenAIApp(llm, served, grammar.check))
        except BaseException:
            await asyncio.to_thread(llm.shutdown)
            raise
        if info.generates:
            await engine._warm_up()
        return engine

    @property
    def healthy(self) -> bool:
        return not (self._was_killed or self._llm.errored)

    @property
    def heartbeat(self) -> int:
        return self._heartbeat.num_beats

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
        params = self._params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),  # only to find stop strings; `CompletionText` makes the text
            structured_outputs=constraint and self._structured(grammar=constraint.spec),
            output_kind=self._cumulative if on_text else self._final,
            skip_clone=True,
        )
        text = CompletionText(self.tokenizer.decoder(), sampling.stop, on_text)
        output = await self._run(prompt_token_ids, params, adapter, cache_salt, text)
        chosen = output.outputs[0]
        token_ids = tuple(chosen.token_ids)
        logprobs = tuple(chosen.logprobs.logprobs[start] for start in chosen.logprobs.start_indices)
        is_ended_by_token = chosen.finish_reason == "stop" and not isinstance(chosen.stop_reason, str)
        found = text.finish(token_ids[:-1] if is_ended_by_token else token_ids)
        return Completion(token_ids, logprobs, found, str(chosen.finish_reason), output.num_cached_tokens or 0)

    async def score(
        self,
        prompt_token_ids: list[int],
        candidates: Sequence[int],
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
    ) -> Scores:
        params = self._params(
            temperature=0.0,
            max_tokens=1,
            logprob_token_ids=list(candidates),
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._final,
            skip_clone=True,
        )
        output = await self._run(prompt_token_ids, params, adapter, cache_salt)
        found = output.outputs[0].logprobs
        by_token = dict(zip(found.token_ids, found.logprobs, strict=True))
        return Scores(tuple(by_token[token] for token in candidates), output.num_cached_tokens or 0)

    async def score_path(
        self,
        prompt_token_ids: list[int],
        path: TriePath,
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
    ) -> list[Scores] | None:
        candidates: Any = path.candidates  # vLLM's annotation leaves out the lists that it accepts
        params = self._params(
            temperature=0.0,
            max_tokens=1,
            prompt_logprob_token_ids=candidates,
            prompt_logprob_start=len(prompt_token_ids) + len(path.branches[0].path) - 1,
            skip_reading_prefix_cache=False,  # by default vLLM computes the whole prompt again
            detokenize=False,
            output_kind=self._final,
            skip_clone=True,
        )
        output = await self._run([*prompt_token_ids, *path.token_ids], params, adapter, cache_salt)
        rows = output.prompt_token_id_logprobs
        if rows is None:  # vLLM gives none if the first place is in the prefix cache
            return None
        scores = (rows[path.depth(branch)][: len(branch.children)] for branch in path.branches)
        return [Scores(tuple(map(float, row)), output.num_cached_tokens or 0) for row in scores]

    async def check_constraint(self, constraint: Constraint) -> None:
        await self._grammar.check(constraint)

    async def watch(self) -> None:
        elapsed_s = 0.0
        while self.healthy:
            await asyncio.sleep(_POLL_INTERVAL_S)
            elapsed_s += _POLL_INTERVAL_S
            if elapsed_s >= _STATS_INTERVAL_S and self.healthy:
                await self._log_stats()
                elapsed_s = 0.0

    async def _log_stats(self) -> None:
        try:
            await self._llm.do_log_stats()
        except Exception as failure:  # noqa: BLE001 - the engine works without statistics
            _log.warning("engine_stats_failed", reason=repr(failure))

    async def probe(self) -> None:
        if self.info.generates:
            await self.generate([0], Sampling(temperature=0.0, max_tokens=1), None)
        else:
            await _result(self._llm, self._llm.is_sleeping())
            self._heartbeat.num_beats += 1

    def kill(self) -> None:
        self._was_killed = True
        orphan_guard.cut()
        self._fail_requests()

    async def load_adapter(self, adapter: Adapter) -> None:
        from vllm.lora.request import LoRARequest

        # vLLM's prefix cache is keyed by name and path. Each version has its own path, so versions share no blocks.
        # Within a batch vLLM tells adapters apart by their names alone.
        request = self._loras.get(adapter) or LoRARequest(adapter.name, next(self._lora_ids), adapter.path)
        try:
            loaded = await _result(self._llm, self._llm.add_lora(request))
        except self._dead as error:
            raise EngineUnavailable("the engine died; retry after it is loaded again") from error
        except EngineUnavailable:
            raise
        except Exception as error:
            raise AdapterRefused(f"vLLM cannot load the adapter: {str(error)[:300]}") from error
        if not loaded:
            raise AdapterRefused("vLLM did not load the adapter")
        self._loras[adapter] = request

    async def unload_adapter(self, adapter: Adapter) -> None:
        request = self._loras[adapter]  # not removed: an in-flight act may use it again, and vLLM then reloads it
        await _result(self._llm, self._llm.remove_lora(request.lora_int_id))

    def show_adapters(self, names: Mapping[str, Adapter]) -> None:
        self._openai.set_adapters({name: self._loras[adapter] for name, adapter in names.items()})

    async def openai_app(self) -> ASGIApp:
        return await self._openai.get()

    async def close(self) -> None:
        await self._grammar.close()
        self._fail_requests()
        await asyncio.to_thread(self._llm.shutdown)

    def _fail_requests(self) -> None:
        """Fails all requests in flight. vLLM does so once it notices a dead engine, unless it is shut down before."""
        self._llm.output_processor.propagate_error(self._dead())

    async def _warm_up(self) -> None:
        """Makes one call of each kind, because the first calls take seconds for imports and memory allocation."""
        prompt = [0]
        await self.score(prompt, prompt)
        await self.generate(prompt, Sampling(temperature=0.0, max_tokens=1), None)
        if self.max_path_candidates and (reason := await path_scoring.fault(self)):
            _log.warning("path_scoring_disabled", reason=reason)
            self.max_path_candidates = 0

    async def _run(
        self,
        prompt_token_ids: list[int],
        params: Any,
        adapter: Adapter | None,
        cache_salt: str | None,
        text: CompletionText | None = None,
    ) -> Any:
        """Runs a request and returns its final output. If cancelled, it aborts the request in the engine.

        text: receives the tokens before the final output.
        """
        prompt = self._tokens_input(prompt_token_ids, cache_salt=cache_salt)
        lora = adapter and self._loras[adapter]
        try:
            async with aclosing(self._llm.generate(prompt, params, str(next(self._ids)), lora_request=lora)) as outputs:
                async for output in outputs:
                    if output.finished:
                        break
                    if text:
                        text.update(output.outputs[0].token_ids)
                else:
                    raise EngineUnavailable("the engine returned no output; retry the request")
        except Exception as error:
            if isinstance(error, self._dead) or not self.healthy:
                raise EngineUnavailable("the engine died; retry after it is loaded again") from error
            if isinstance(error, self._refused):
                raise ActionSpaceRefused(f"the engine refuses the request: {str(error)[:300]}") from error
            raise
        if output.outputs[0].finish_reason in ("abort", "error"):
            raise EngineUnavailable(f"the engine ended the request with {output.outputs[0].finish_reason!r}; retry it")
        return output


async def _result(llm: Any, call: Awaitable[T]) -> T:
    """Waits for the result of a utility call of vLLM, which would never return if the engine dies meanwhile. Raises
    EngineUnavailable."""
    pending = asyncio.ensure_future(call)
    try:
        while not pending.done():
            await asyncio.wait([pending], timeout=_POLL_INTERVAL_S)
            if llm.errored and not pending.done():
                raise EngineUnavailable("the engine died; retry after it is loaded again")
        return pending.result()
    finally:
        pending.cancel()
