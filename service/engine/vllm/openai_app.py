"""Owns OpenAI-compatible inference: vLLM's own serving classes over the engine that the episodes use."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from service.engine.base import CACHE_SALT, Constraint, ConstraintRefused, EngineRefused

Check = Callable[[Constraint], Awaitable[None]]

OPTIONS = frozenset(
    {
        "chat_template",
        "chat_template_content_format",
        "default_chat_template_kwargs",
        "enable_auto_tool_choice",
        "enable_force_include_usage",
        "enable_prompt_tokens_details",
        "exclude_tools_when_tool_choice_none",
        "response_role",
        "return_tokens_as_token_ids",
        "tool_call_parser",
        "tool_strict_level",
        "trust_request_chat_template",
    }
)
"""Those of vLLM's front end that say how it serves; the others are the service's business, or nobody's."""


# Without a parser vLLM refuses tools altogether, even one that the caller names.
_DEFAULTS: dict[str, Any] = {"tool_call_parser": "hermes", "enable_auto_tool_choice": True}


class InferenceOptionError(EngineRefused):
    """An option that the front end does not have, or that is not the caller's to set."""


def check_options(options: dict[str, Any]) -> None:
    """Raises InferenceOptionError for a name that is not one of OPTIONS."""
    for name in options.keys() - OPTIONS:
        near = get_close_matches(name, OPTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(OPTIONS))}"
        raise InferenceOptionError(f"/v1 has no option {name!r}{hint}")


class SaltedClient:
    """vLLM's engine as its serving classes call it. Whatever they ask for goes under the salt of the request that they
    serve; one that the caller names only divides it further."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompt: Any, *args: Any, **options: Any) -> Any:
        return self._llm.generate(_salted(prompt), *args, **options)

    def encode(self, prompt: Any, *args: Any, **options: Any) -> Any:
        return self._llm.encode(_salted(prompt), *args, **options)


class CheckedClient:
    """vLLM's engine, which compiles what a caller wants its completion held to without any limit: asked here first.
    Whatever field of whatever route it came by, it is in the sampling parameters now."""

    def __init__(self, llm: Any, check: Check) -> None:
        self._llm = llm
        self._check = check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def generate(self, prompt: Any, sampling_params: Any, *args: Any, **options: Any) -> AsyncGenerator[Any]:
        """Raises ValueError, which vLLM's serving classes answer with 400."""
        if sampling_params.structured_outputs is not None:
            try:
                await self._check(_constraint(sampling_params.structured_outputs))
            except ConstraintRefused as error:
                raise ValueError(f"the structured output is refused: {error}") from error
        async with aclosing(self._llm.generate(prompt, sampling_params, *args, **options)) as outputs:
            async for output in outputs:
                yield output


def _constraint(wanted: Any) -> Constraint:
    """Of vLLM's StructuredOutputsParams, as its backend for xgrammar takes them. Raises ValueError."""
    from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

    if wanted.json is not None:
        return Constraint("json", wanted.json if isinstance(wanted.json, str) else json.dumps(wanted.json))
    if wanted.regex is not None:
        return Constraint("regex", wanted.regex)
    if wanted.structural_tag is not None:
        tag = wanted.structural_tag
        return Constraint("structural_tag", tag if isinstance(tag, str) else json.dumps(tag))
    if wanted.json_object:
        return Constraint("json", '{"type":"object"}')
    grammar = choice_as_grammar(wanted.choice) if wanted.choice else wanted.grammar or ""
    return Constraint("lark" if grammar_is_likely_lark(grammar) else "grammar", grammar)


def _salted(prompt: Any) -> Any:
    salt = CACHE_SALT.get()
    if salt is None:
        return prompt
    return {**prompt, "cache_salt": ":".join([salt, *filter(None, [prompt.get("cache_salt")])])}


@dataclass(frozen=True, slots=True)
class Served:
    """What the app serves. model: what the engine loaded. name: what callers call it. options: vLLM's front-end
    options. media_hosts: hosts that media may be fetched from. tasks: what the engine can do."""

    model: str
    name: str
    options: dict[str, Any]
    media_hosts: Sequence[str]
    tasks: Any


class OpenAIApp:
    """vLLM's OpenAI-compatible app over one engine, built at the first request."""

    def __init__(self, llm: Any, served: Served, check: Check) -> None:
        """`check` raises ConstraintRefused for a constraint that must not be compiled."""
        self._llm, self._served, self._check = llm, served, check
        self._building: asyncio.Task[Any] | None = None
        self._adapters: dict[str, Any] = {}

    async def get(self) -> ASGIApp:
        """The app. The first call takes seconds, because it imports the serving classes; a failed one is repeated."""
        if self._building is None or (self._building.done() and self._building.exception()):
            self._building = asyncio.create_task(_build(self._llm, self._served, self._check))
            self._building.add_done_callback(lambda _: self._show_adapters())
        return await asyncio.shield(self._building)

    def set_adapters(self, requests: Iterable[Any]) -> None:
        """Callers may name these LoRA requests as models, from now on."""
        self._adapters = {request.lora_name: request for request in requests}
        self._show_adapters()

    def _show_adapters(self) -> None:
        building = self._building
        if building and building.done() and not building.cancelled() and not building.exception():
            building.result().state.openai_serving_models.lora_requests = self._adapters


async def _build(llm: Any, served: Served, check: Check) -> Any:
    """vLLM's routes for inference, and none of those that steer the engine."""
    app = await asyncio.to_thread(_app, llm, served)
    _add_routes(app, served.tasks, llm.model_config)
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    client: Any = SaltedClient(CheckedClient(llm, check))
    await init_app_state(client, app.state, app.state.args, served.tasks)
    return app


def _app(llm: Any, served: Served) -> Any:
    from fastapi import FastAPI
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.exceptions import EngineDeadError

    from service.engine.vllm import media

    parser: Any = make_arg_parser(FlexibleArgumentParser())
    args: Any = parser.parse_args(["--model", served.model, "--served-model-name", served.name])
    for option, value in {**_DEFAULTS, **served.options}.items():
        setattr(args, option, value)
    args.structured_outputs_config = llm.vllm_config.structured_outputs_config
    media.guard(served.media_hosts)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.args = args
    app.state.server = SimpleNamespace()  # vLLM's handler of a dead engine ends its server; ours outlives the engine
    init_exception_handler(app)
    app.exception_handler(HTTPException)(http_exception_handler)  # of routing, which vLLM's own handlers leave out
    app.exception_handler(EngineDeadError)(_engine_died)
    return app


async def _engine_died(_: Request, __: Exception) -> Response:
    """503, as of any call that comes a moment later; vLLM's own answer is 500."""
    error = {"message": "The engine died.", "type": "server_error", "param": None, "code": "engine_unavailable"}
    return JSONResponse({"error": error}, 503, {"Retry-After": "5"})


def _add_routes(app: Any, tasks: Any, model_config: Any) -> None:
    from vllm.entrypoints.generate.api_router import register_generate_api_routers
    from vllm.entrypoints.openai.models.api_router import attach_router as add_models
    from vllm.entrypoints.pooling.factories import register_pooling_api_routers
    from vllm.entrypoints.serve.tokenize.api_router import attach_router as add_tokenize

    add_models(app)
    add_tokenize(app)
    if "generate" in tasks:
        register_generate_api_routers(app)
    register_pooling_api_routers(app, tasks, model_config)
