"""Reads the configuration of an encoder-decoder model, and the engine options for it."""

import importlib
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.engine.adapters import base_shapes
from service.engine.base import EngineInfo, EngineRefused
from service.engine.seq2seq.messages import ModelOptions
from service.engine.tokenizer import tokenizer_json
from service.engine.weights import model_folder, weights_version
from service.trajectory import Sampling
from service.values import immutable

_DEFAULT_MAX_LEN = 512
_UNLIMITED = 1 << 20
"""Tokenizers without a limit have a limit above this."""


class Options(BaseModel):
    """The engine options, EPISODIC_ENGINE__NAME.

    max_model_len: maximum length of the encoder's input and of a reply, in tokens. Default: that of the model.
    max_rows: maximum number of replies that are generated at the same time.
    max_encoder_tokens: maximum size of the encoder states of all replies together, in tokens with padding.
    num_threads: threads of the worker. Default: one for each core.
    enable_lora: whether adapters can be loaded. max_lora_rank: their largest rank.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=8)
    max_rows: int = Field(default=64, ge=1)
    max_encoder_tokens: int = Field(default=1 << 15, ge=8)
    num_threads: int | None = Field(default=None, ge=1)
    enable_lora: bool = False
    max_lora_rank: int = Field(default=64, ge=1)
    trust_remote_code: bool = False


def is_encoder_decoder(model: str, options: dict[str, Any]) -> bool:
    """Whether `model` is an encoder-decoder for text. A model that transformers does not know is left to vLLM."""
    transformers: Any = importlib.import_module("transformers")
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    try:
        config = transformers.AutoConfig.from_pretrained(
            model, trust_remote_code=bool(options.get("trust_remote_code"))
        )
    except Exception:  # noqa: BLE001 - vLLM says what is wrong
        return False
    known = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return bool(config.is_encoder_decoder) and (config.model_type in known or "AutoModelForSeq2SeqLM" in _code(config))


def _code(config: Any) -> dict[str, str]:
    return cast("dict[str, str]", getattr(config, "auto_map", None) or {})


@immutable
class Described:
    """A model that is not loaded yet: its tokenizer, what the worker needs, and what the service says about it."""

    tokenizer: Any
    options: ModelOptions
    info: EngineInfo


def describe(model: str, name: str, options: dict[str, Any], cache: Path | None) -> Described:
    """Reads the configuration and the tokenizer of a model. Raises EngineRefused.

    Arguments are those of `Seq2SeqEngine.load`.
    """
    chosen = _options(options)
    config, generation, tokenizer = _read(model, chosen)
    length = _max_len(config, tokenizer, chosen)
    worker = ModelOptions(
        model=model,
        dtype=chosen.dtype,
        trust_remote_code=chosen.trust_remote_code,
        prefix=_prefix(config, generation, model),
        end_token_ids=_end_tokens(config, generation, tokenizer, model),
        max_len=length,
        max_rows=chosen.max_rows,
        max_encoder_tokens=chosen.max_encoder_tokens,
        num_threads=chosen.num_threads,
        grammar_tokenizer=_for_grammars(tokenizer),
    )
    version = weights_version(Path(model), cache) or getattr(config, "_commit_hash", None) or "unknown"
    info = EngineInfo(
        model=name,
        version=version[:12],
        max_model_len=length,
        default_sampling=_sampling(generation),
        num_slots=chosen.max_rows,
        weight_shapes=base_shapes(model_folder(model)) if chosen.enable_lora else None,
        max_lora_rank=chosen.max_lora_rank if chosen.enable_lora else 0,
    )
    return Described(tokenizer, worker, info)


def _options(options: dict[str, Any]) -> Options:
    """Raises EngineRefused, with the name of the variable."""
    try:
        return Options.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        variable = f"EPISODIC_ENGINE__{str(first['loc'][0]).upper()}"
        known = ", ".join(name for name in Options.model_fields)
        is_unknown = first["type"] == "extra_forbidden"
        reason = f"an encoder-decoder model has the options {known}" if is_unknown else first["msg"]
        raise EngineRefused(f"{variable}: {reason}") from error


def _read(model: str, options: Options) -> tuple[Any, Any, Any]:
    """Returns the model's configuration, its generation configuration and its tokenizer. Raises EngineRefused."""
    transformers: Any = importlib.import_module("transformers")
    trust = {"trust_remote_code": options.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(model, **trust)
    except (OSError, ValueError) as error:
        raise EngineRefused(f"{model}: {str(error)[:500]}") from error
    if not config.is_encoder_decoder:
        raise EngineRefused(f"{model} is not an encoder-decoder model")
    try:
        generation = transformers.GenerationConfig.from_pretrained(model)
    except OSError:
        generation = transformers.GenerationConfig.from_model_config(config)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, use_fast=True, **trust)
    except Exception as error:  # the libraries raise many types
        raise EngineRefused(f"{model}: its tokenizer cannot be loaded: {str(error)[:300]}") from error
    if not tokenizer.is_fast:
        raise EngineRefused(
            f"{model}: {type(tokenizer).__name__} has no fast version; the model's folder needs a tokenizer.json"
        )
    return config, generation, tokenizer


def _max_len(config: Any, tokenizer: Any, options: Options) -> int:
    """Returns the maximum length of the encoder's input, in tokens. Raises EngineRefused."""
    positions = getattr(config, "max_position_embeddings", None)
    trained = positions or getattr(config, "n_positions", None)
    if trained is None:
        trained = tokenizer.model_max_length if tokenizer.model_max_length < _UNLIMITED else _DEFAULT_MAX_LEN
    length = options.max_model_len or trained
    if positions is not None and length > positions:
        raise EngineRefused(f"EPISODIC_ENGINE__MAX_MODEL_LEN: the model has only {positions} positions")
    if length > options.max_encoder_tokens:
        raise EngineRefused(f"EPISODIC_ENGINE__MAX_ENCODER_TOKENS: it must be at least {length}, the model's length")
    return length


def _prefix(config: Any, generation: Any, model: str) -> tuple[int, ...]:
    """Returns the ids that each reply begins with. Raises EngineRefused."""
    start = generation.decoder_start_token_id
    start = config.decoder_start_token_id if start is None else start
    if start is None:
        raise EngineRefused(f"{model}: its configuration has no decoder_start_token_id")
    forced = generation.forced_bos_token_id
    return (start,) if forced is None else (start, forced)


def _end_tokens(config: Any, generation: Any, tokenizer: Any, model: str) -> tuple[int, ...]:
    """Returns the tokens that end a reply. Raises EngineRefused."""
    candidates = (generation.eos_token_id, config.eos_token_id, tokenizer.eos_token_id)
    found = next((one for one in candidates if one not in (None, [])), None)
    if found is None:
        raise EngineRefused(f"{model}: its configuration has no eos_token_id")
    return tuple(cast("list[int]", found)) if isinstance(found, list) else (cast("int", found),)


def _for_grammars(tokenizer: Any) -> str | None:
    """Returns the tokenizer as text for llguidance; None if llguidance does not support it."""
    from llguidance import LLTokenizer

    text = tokenizer_json(tokenizer)
    try:
        LLTokenizer(text or "")
    except ValueError:
        return None
    return text


def _sampling(generation: Any) -> Sampling:
    """Returns the sampling of the model's own generation configuration."""
    default = Sampling()

    def given(name: str, otherwise: Any) -> Any:
        value = getattr(generation, name, None)
        return otherwise if value is None else value

    return Sampling(
        temperature=given("temperature", default.temperature),
        top_p=given("top_p", default.top_p),
        top_k=given("top_k", default.top_k),
        min_p=given("min_p", default.min_p),
        max_tokens=given("max_new_tokens", default.max_tokens),
    )
