"""Checks in a child process that a schema or a pattern compiles within limits of time and memory.

The engine compiles grammars on its own threads without a time limit (vLLM 0.32), so that a malicious one would block
every episode. Therefore each grammar is first compiled here, by the same library, in a process that can be killed.

This module is also the program of the child process. It reads a request from each line of stdin, as JSON, and writes
the response as a line of JSON.
"""

import asyncio
import json
import os
import resource
import sys
import time
from asyncio.subprocess import PIPE, Process
from typing import Any

from service.engine.base import Constraint, ConstraintRefused, EngineUnavailable

_MEMORY_LIMIT_BYTES = 3 << 30
_START_LIMIT_S = 120.0
_PARSE_LIMIT_S = 0.25
"""Limit of CPU time in seconds. It is low, because vLLM parses each request's constraint again, on the event loop."""
_SIMPLIFY = "use a simpler schema or pattern"


class GrammarChecker:
    """Compiles constraints for one tokenizer, in a child process that starts on demand."""

    def __init__(self, tokenizer_info: str, *, limit_s: float) -> None:
        """`tokenizer_info`: the tokenizer, serialized by xgrammar. `limit_s`: timeout for one constraint in seconds."""
        self._tokenizer_info = tokenizer_info
        self._limit_s = limit_s
        self._child: Process | None = None
        self._lock = asyncio.Lock()  # the child handles one request at a time
        self._accepted: set[Constraint] = set()
        self._is_closed = False

    async def check(self, constraint: Constraint) -> None:
        """Compiles the constraint. Raises ConstraintRefused if it does not compile within the limits, and
        EngineUnavailable if the checker is closed."""
        if constraint in self._accepted:
            return
        await self._call_child(constraint)
        if len(self._accepted) >= 1024:
            self._accepted.clear()
        self._accepted.add(constraint)

    async def matches(self, constraint: Constraint, text: str) -> bool:
        """Returns whether the whole text satisfies the constraint. Raises ConstraintRefused, EngineUnavailable."""
        return bool(await self._call_child(constraint, text))

    async def close(self) -> None:
        """Kills the child. Pending and later calls raise EngineUnavailable."""
        self._is_closed = True
        await self._end_child()

    async def _end_child(self) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()
        self._child = None

    async def _call_child(self, constraint: Constraint, text: str | None = None) -> bool | None:
        async with self._lock:
            response = await self._send({"kind": constraint.kind, "spec": constraint.spec, "text": text})
        if response["error"]:
            raise ConstraintRefused(response["error"])
        return response["matches"]

    async def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        child = await self._running_child()
        try:
            async with asyncio.timeout(self._limit_s):
                response = await _exchange(child, request)
        except TimeoutError:
            await self._end_child()
            return {"error": f"the constraint does not compile within {self._limit_s:g} s; {_SIMPLIFY}"}
        except asyncio.CancelledError:
            await self._end_child()  # otherwise the next request would read this response
            raise
        if response is None:
            await self._end_child()
            self._check_open()  # if `close` killed the child, the constraint is not at fault
            return {"error": f"compiling the constraint takes more memory than is allowed; {_SIMPLIFY}"}
        return response

    async def _running_child(self) -> Process:
        self._check_open()
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", __spec__.name, stdin=PIPE, stdout=PIPE, limit=1 << 20
            )
            try:
                async with asyncio.timeout(_START_LIMIT_S):
                    response = await _exchange(self._child, {"tokenizer_info": self._tokenizer_info})
                self._check_open()  # `close` may have been called before there was a child that it could kill
                if response is None:
                    raise RuntimeError("the child process of the grammar compiler ended while it started")
            except BaseException:
                await self._end_child()  # otherwise the next request would read this response
                raise
        return self._child

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineUnavailable("the engine was closed")


async def _exchange(child: Process, request: dict[str, Any]) -> dict[str, Any] | None:
    """Sends a request to the child. Returns its response, or None if the child died."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(request).encode() + b"\n")
        await child.stdin.drain()
        line = await child.stdout.readline()
    except (BrokenPipeError, ConnectionResetError):
        return None
    return json.loads(line) if line else None


def _serve() -> None:
    """The main function of the child process."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    responses = os.fdopen(os.dup(1), "w", buffering=1)
    # Libraries may print to stdout. Redirect that to stderr, so that the parent does not read it as a response.
    os.dup2(2, 1)
    import xgrammar  # imported here because it takes seconds, and the parent does not need it

    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline())["tokenizer_info"])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    responses.write("{}\n")
    for line in sys.stdin:
        request = json.loads(line)
        matches: bool | None = None
        try:
            grammar = _compile(compiler, request["kind"], request["spec"])
            if request["text"] is not None:
                matcher = xgrammar.GrammarMatcher(grammar)
                matches = matcher.accept_string(request["text"]) and matcher.accept_token(info.stop_token_ids[0])
            error = ""
        except Exception as failure:  # noqa: BLE001 - the library raises many types
            error = str(failure).strip().split("\n")[-1][:300] or type(failure).__name__
        responses.write(json.dumps({"error": error, "matches": matches}) + "\n")


def _compile(compiler: Any, kind: str, spec: str) -> Any:
    """Compiles a constraint in the same way as vLLM's xgrammar backend. Raises what the library raises, and ValueError
    if parsing takes too long."""
    from xgrammar import Grammar, StructuralTagItem

    if kind == "structural_tag":
        tag = json.loads(spec)
        if "structures" not in tag:
            return compiler.compile_structural_tag(spec)
        items = [
            StructuralTagItem(begin=item["begin"], schema=json.dumps(item["schema"]), end=item["end"])
            for item in tag["structures"]
        ]
        return compiler.compile_structural_tag(items, tag["triggers"])
    parse, compile_ = {
        "json": (Grammar.from_json_schema, compiler.compile_json_schema),
        "regex": (Grammar.from_regex, compiler.compile_regex),
        "grammar": (Grammar.from_ebnf, compiler.compile_grammar),
        "lark": (Grammar.from_lark, compiler.compile_lark),
    }[kind]
    began = time.process_time()
    parse(spec)
    if time.process_time() - began > _PARSE_LIMIT_S:
        raise ValueError(f"the constraint takes too long to parse; {_SIMPLIFY}")
    return compile_(spec)


if __name__ == "__main__":
    _serve()
