"""Serves the OpenAI-compatible API (/v1): vLLM's own serving classes, on the engine that also serves the episodes."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from service.engine.base import CACHE_SALT, SLOT, Constraint, ConstraintRefused, EngineRefused, EngineUnavailable
from service.engine.vllm.structured_outputs import MARK

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
"""The options of vLLM's API server that can be set. The service sets the others itself, or they have no effect here."""


# Without a tool parser, vLLM refuses every request with tools, even if the caller chooses the tool.
_DEFAULTS: dict[str, Any] = {"tool_call_parser": "hermes", "enable_auto_tool_choice": True}


class InferenceOptionError(EngineRefused):
    """An option of /v1 is unknown, or cannot be set."""


def check_options(options: dict[str, Any]) -> None:
    """Raises InferenceOptionError if a name is not in OPTIONS."""
    for name in options.keys() - OPTIONS:
        near = get_close_matches(name, OPTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(sorted(OPTIONS))}"
        raise InferenceOptionError(f"EPISODIC_OPENAI__{name.upper()}: /v1 has no option {name!r}{hint}")


class SaltedClient:
    """Wraps vLLM's engine for its serving classes. Adds the tenant's cache salt to every request.

    A salt that the caller sends is appended to it, and so only divides the tenant's cache further.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompt: Any, *args: Any, **options: Any) -> Any:
        return self._llm.generate(_salted(prompt), *args, **options)

    def encode(self, prompt: Any, *args: Any, **options: Any) -> Any:
        return self._llm.encode(_salted(prompt), *args, **options)


class CheckedClient:
    """Wraps vLLM's engine for its serving classes. Checks every request for what would harm the engine.

    A constraint: vLLM would compile it without a limit of time or memory. All routes put a request's constraint into
    the sampling parameters, so one check here is sufficient.

    Token ids: vLLM accepts every id of the tokenizer, but one without an embedding in the model crashes the engine.
    """

    def __init__(self, llm: Any, check: Check) -> None:
        self._llm = llm
        self._check = check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **options: Any
    ) -> AsyncGenerator[Any]:
        """Raises ValueError if the constraint is refused. vLLM's serving classes turn it into status 400."""
        self._check_tokens(prompt)
        if sampling_params.structured_outputs is not None:
            try:
                await self._check(_constraint(sampling_params.structured_outputs))
            except ConstraintRefused as error:
                raise ValueError(f"the structured output is refused: {error}") from error

        def drawn(params: Any, name: str) -> AsyncGenerator[Any]:
            return _in_slot(lambda: self._llm.generate({**prompt}, params, name, *args, **options))

        one = sampling_params.n == 1
        outputs = drawn(sampling_params, request_id) if one else _choices(drawn, sampling_params, request_id)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    def encode(self, prompt: Any, *args: Any, **options: Any) -> Any:
        self._check_tokens(prompt)
        return _in_slot(lambda: self._llm.encode(prompt, *args, **options))

    def _check_tokens(self, prompt: Any) -> None:
        from vllm.exceptions import VLLMUnprocessableEntityError

        size = self._llm.model_config.get_vocab_size()
        if (highest := max(prompt.get("prompt_token_ids") or [0])) >= size:
            raise VLLMUnprocessableEntityError(
                f"token id {highest} is out of range: the model has {size} tokens", parameter="prompt"
            )


async def _in_slot(start: Callable[[], AsyncGenerator[Any]]) -> AsyncGenerator[Any]:
    """Runs one request to the model in a slot of its own. It waits for nothing else while it occupies the slot."""
    async with SLOT.get()(), aclosing(start()) as outputs:
        async for output in outputs:
            yield output


async def _choices(
    drawn: Callable[[Any, str], AsyncGenerator[Any]], sampling_params: Any, request_id: str
) -> AsyncGenerator[Any]:
    """Draws the `n` choices of a request as separate requests, so that each waits for a slot.

    vLLM would do the same inside the engine, where they would delay the requests of other tenants.
    """
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.async_utils import merge_async_iterators

    num_open, complete = sampling_params.n, list[Any]()
    drawing = [drawn(_choice(sampling_params, index), f"{request_id}-{index}") for index in range(num_open)]
    async with aclosing(merge_async_iterators(*drawing)) as outputs:
        async for index, output in outputs:
            num_open -= output.finished
            output.request_id, output.finished = request_id, not num_open
            output.outputs[0].index = index
            if sampling_params.output_kind == RequestOutputKind.FINAL_ONLY:
                complete += output.outputs
                output.outputs = sorted(complete, key=lambda choice: choice.index)
                if num_open:
                    continue
            yield output


def _choice(sampling_params: Any, index: int) -> Any:
    """Returns the sampling parameters of one of `n` choices, with the seed that vLLM would give it."""
    changed = copy(sampling_params)
    changed.n = 1
    if changed.seed is not None:
        changed.seed += index
    return changed


class PlainTextClient:
    """Wraps vLLM's engine for /v1/completions, whose prompts open no thought.

    With a reasoning parser, vLLM enforces a constraint only after the end of a thought. A completion has none, so the
    constraint would never be enforced.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, *args: Any, **options: Any) -> Any:
        return self._llm.generate(*args, **{**options, "reasoning_ended": True})


def _constraint(wanted: Any) -> Constraint:
    """Converts vLLM's StructuredOutputsParams in the same way as vLLM's xgrammar backend. Raises ValueError."""
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
    if grammar.startswith(MARK):
        return Constraint("guidance", grammar)
    return Constraint("lark" if grammar_is_likely_lark(grammar) else "grammar", grammar)


def _salted(prompt: Any) -> Any:
    salt = CACHE_SALT.get()
    if salt is None:
        return prompt
    return {**prompt, "cache_salt": ":".join([salt, *filter(None, [prompt.get("cache_salt")])])}


@dataclass(frozen=True, slots=True)
class Served:
    """What the app of /v1 serves.

    name: the name of the model for callers.
    aliases: further names that they may use. No answer shows them.
    options: options of vLLM's API server.
    media_hosts: hosts from which media may be fetched.
    tasks: the tasks that the engine supports, as vLLM names them.
    """

    name: str
    aliases: Sequence[str]
    options: dict[str, Any]
    media_hosts: Sequence[str]
    tasks: Any


class OpenAIApp:
    """Builds vLLM's OpenAI-compatible app for one engine, at the first request."""

    def __init__(self, llm: Any, served: Served, check: Check) -> None:
        """`check` is called with each constraint, and raises ConstraintRefused if it is not supported."""
        self._llm, self._served, self._check = llm, served, check
        self._building: asyncio.Task[Any] | None = None
        self._adapters: dict[str, Any] = {}

    async def get(self) -> ASGIApp:
        """Returns the app. The first call takes seconds, because it imports the serving classes. If it fails, the next
        call tries again."""
        if self._building is None or (self._building.done() and self._building.exception()):
            self._building = asyncio.create_task(_build(self._llm, self._served, self._check))
            self._building.add_done_callback(lambda _: self._update_adapters())
        return await asyncio.shield(self._building)

    def set_adapters(self, requests: dict[str, Any]) -> None:
        """Sets the LoRA adapters that callers can choose as a model, by name. Replaces the previous ones.

        A request's own name is `name@digest`.
        """
        self._adapters = requests
        self._update_adapters()

    def _update_adapters(self) -> None:
        building = self._building
        if building and building.done() and not building.cancelled() and not building.exception():
            building.result().state.openai_serving_models.lora_requests = self._adapters


async def _build(llm: Any, served: Served, check: Check) -> Any:
    """Builds the app with vLLM's routes for inference, but without its routes that control the engine."""
    app = await asyncio.to_thread(_app, llm, served)
    _add_routes(app, served.tasks, llm.model_config)
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    client: Any = SaltedClient(CheckedClient(llm, check))
    await init_app_state(client, app.state, app.state.args, served.tasks)
    if "generate" in served.tasks:
        app.state.openai_serving_completion.engine_client = PlainTextClient(client)
    _show_names(app.state.openai_serving_models, served)
    return app


def _show_names(models: Any, served: Served) -> None:
    """Shows adapters under their names for callers. Hides the aliases of the model, and the paths of files."""
    listed = models.show_available_models

    def name_of(request: Any = None) -> str:
        return served.name if request is None else _public(request.lora_name)

    async def shown() -> Any:
        answer = await listed()
        names = [(card, _public(card.id) if card.parent else card.id) for card in answer.data]
        answer.data = [
            card.model_copy(update={"id": name, "root": name}) for card, name in names if card.id not in served.aliases
        ]
        return answer

    models.show_available_models, models.model_name = shown, name_of


def _public(name: str) -> str:
    """Returns the name of an adapter for callers, from `name@digest`."""
    return name.partition("@")[0]


def _app(llm: Any, served: Served) -> Any:
    from fastapi import FastAPI
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.exceptions import EngineDeadError

    from service.engine.vllm import media

    parser: Any = make_arg_parser(FlexibleArgumentParser())
    args: Any = parser.parse_args(["--model", served.name, "--served-model-name", served.name, *served.aliases])
    for option, value in {**_DEFAULTS, **served.options}.items():
        setattr(args, option, value)
    args.structured_outputs_config = llm.vllm_config.structured_outputs_config
    media.guard(served.media_hosts)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.args, app.state.served = args, served
    # If the engine dies, vLLM's handler stops its server. This object replaces it, so that the service keeps running.
    app.state.server = SimpleNamespace()
    init_exception_handler(app)
    app.exception_handler(HTTPException)(http_exception_handler)  # for errors of routing, which vLLM does not cover
    app.exception_handler(EngineDeadError)(_engine_died)
    return app


async def _engine_died(_: Request, __: Exception) -> Response:
    """Returns status 503, as later calls do while the engine is loaded again. vLLM's own handler would return 500."""
    error = {
        "message": "The engine died. Retry after the time in Retry-After.",
        "type": "server_error",
        "param": None,
        "code": "engine_unavailable",
    }
    return JSONResponse({"error": error}, 503, {"Retry-After": str(EngineUnavailable.retry_after_s)})


async def _model(name: str, request: Request) -> Response:
    """GET /v1/models/{name}, which vLLM lacks: returns one entry of GET /v1/models."""
    models = await request.app.state.openai_serving_models.show_available_models()
    served: Served = request.app.state.served
    for model in models.data:
        if model.id == (served.name if name in served.aliases else name):
            return JSONResponse(model.model_dump())
    known = ", ".join(repr(model.id) for model in models.data)
    raise HTTPException(404, f"There is no model {name!r}. The models are {known}.")


def _add_routes(app: Any, tasks: Any, model_config: Any) -> None:
    from vllm.entrypoints.generate.api_router import register_generate_api_routers
    from vllm.entrypoints.openai.models.api_router import attach_router as add_models
    from vllm.entrypoints.pooling.factories import register_pooling_api_routers
    from vllm.entrypoints.serve.tokenize.api_router import attach_router as add_tokenize

    add_models(app)
    app.get("/v1/models/{name:path}")(_model)
    add_tokenize(app)
    if "generate" in tasks:
        register_generate_api_routers(app)
    register_pooling_api_routers(app, tasks, model_config)
