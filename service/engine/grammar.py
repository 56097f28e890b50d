"""Owns the question whether a schema or a pattern compiles in time, asked in a child process that can be killed.

The engine compiles grammars on its own threads without a time limit, so a hostile one would stall every episode
(vLLM 0.32). Here each is compiled first, by the same library, under a time and a memory limit.
Run as a program it is the child: one JSON line in, one JSON line out.
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
"""Of CPU time. vLLM parses a constraint anew at each request, on the event loop."""


class GrammarChecker:
    """Compiles constraints for one tokenizer. `tokenizer_info` is xgrammar's own serialized form of it."""

    def __init__(self, tokenizer_info: str, *, limit_s: float) -> None:
        self._tokenizer_info = tokenizer_info
        self._limit_s = limit_s
        self._child: Process | None = None
        self._lock = asyncio.Lock()  # the child answers one question at a time
        self._passed: set[Constraint] = set()
        self._is_closed = False

    async def check(self, constraint: Constraint) -> None:
        """Raises ConstraintRefused when it does not compile, or not within the limits; EngineUnavailable if closed."""
        if constraint in self._passed:
            return
        await self._ask(constraint)
        if len(self._passed) >= 1024:
            self._passed.clear()
        self._passed.add(constraint)

    async def matches(self, constraint: Constraint, text: str) -> bool:
        """Whether the constraint allows the text as a whole. Raises ConstraintRefused, EngineUnavailable."""
        return bool(await self._ask(constraint, text))

    async def close(self) -> None:
        """Ends the child, with the engine. Whoever waits for an answer or asks later gets EngineUnavailable."""
        self._is_closed = True
        await self._end_child()

    async def _end_child(self) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()
        self._child = None

    async def _ask(self, constraint: Constraint, text: str | None = None) -> bool | None:
        async with self._lock:
            answer = await self._answer({"kind": constraint.kind, "spec": constraint.spec, "text": text})
        if answer["error"]:
            raise ConstraintRefused(answer["error"])
        return answer["matches"]

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        child = await self._started()
        try:
            async with asyncio.timeout(self._limit_s):
                answer = await _exchange(child, question)
        except TimeoutError:
            await self._end_child()
            return {"error": f"it does not compile within {self._limit_s:g} s"}
        except asyncio.CancelledError:
            await self._end_child()  # its late answer must not meet the next question
            raise
        if answer is None:
            await self._end_child()
            self._check_open()  # it did not die of the question
            return {"error": "compiling it takes more memory than is allowed"}
        return answer

    async def _started(self) -> Process:
        self._check_open()
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", __spec__.name, stdin=PIPE, stdout=PIPE, limit=1 << 20
            )
            try:
                async with asyncio.timeout(_START_LIMIT_S):
                    answer = await _exchange(self._child, {"tokenizer_info": self._tokenizer_info})
                self._check_open()  # closed meanwhile, perhaps before there was a child to end
                if answer is None:
                    raise RuntimeError("the grammar compiler did not start")
            except BaseException:
                await self._end_child()  # its late answer must not meet a question
                raise
        return self._child

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineUnavailable("the engine was closed")


async def _exchange(child: Process, question: dict[str, Any]) -> dict[str, Any] | None:
    """The child's answer; None if it died."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(question).encode() + b"\n")
        await child.stdin.drain()
        line = await child.stdout.readline()
    except (BrokenPipeError, ConnectionResetError):
        return None
    return json.loads(line) if line else None


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    import xgrammar  # takes seconds; only the child pays

    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline())["tokenizer_info"])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    answers.write("{}\n")
    for line in sys.stdin:
        question = json.loads(line)
        matches: bool | None = None
        try:
            grammar = _compiled(compiler, question["kind"], question["spec"])
            if question["text"] is not None:
                matcher = xgrammar.GrammarMatcher(grammar)
                matches = matcher.accept_string(question["text"]) and matcher.accept_token(info.stop_token_ids[0])
            error = ""
        except Exception as failure:  # noqa: BLE001 - the library raises several kinds; all mean "no"
            error = str(failure).strip().split("\n")[-1][:300] or type(failure).__name__
        answers.write(json.dumps({"error": error, "matches": matches}) + "\n")


def _compiled(compiler: Any, kind: str, spec: str) -> Any:
    """As vLLM's backend for xgrammar compiles each kind. Raises ValueError for one that takes too long to parse, and
    whatever the library raises."""
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
        raise ValueError("it takes too long to parse")
    return compile_(spec)


if __name__ == "__main__":
    _serve()
