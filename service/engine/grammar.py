"""Checks in a child process that a constraint compiles within limits of time and memory.

The engine compiles grammars on its own threads without a time limit (vLLM 0.32), so that a malicious one would block
every episode. Therefore each constraint is first compiled here, by the same library, in a process that can be killed.

This module is also the program of the child process. It reads a request from each line of stdin, as JSON, and writes
the response as a line of JSON.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from service.engine.base import Constraint, ConstraintRefused, EngineUnavailable
from service.validation import lark

_MEMORY_LIMIT_BYTES = 3 << 30
_START_LIMIT_S = 120.0
_EXIT_LIMIT_S = 5.0
_PARSE_LIMIT_S = 0.25
"""Limit of CPU time in seconds. It is low, because vLLM parses constraints of /v1 again, on the event loop."""
_SIMPLIFY = "use a simpler schema or pattern"
_OUT_OF_MEMORY = f"compiling the constraint takes more memory than is allowed; {_SIMPLIFY}"
_MEMORY_WORDS = ("memory allocation", "bad_alloc", "MemoryError", "Cannot allocate memory")
_NUM_WALKS, _WALK_TOKENS = 3, 48

_log: Any = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """A tokenizer as the compilers need it.

    xgrammar: serialized by xgrammar; None for an engine whose constraints all have the kind "guidance".
    llguidance: the tokenizer.json of a Hugging Face tokenizer; None if llguidance does not support the tokenizer.
    vocab_size: number of the model's token ids.
    eos_token_id: of the tokenizer.
    """

    xgrammar: str | None
    llguidance: str | None
    vocab_size: int
    eos_token_id: int | None


class GrammarChecker:
    """Compiles constraints for one tokenizer, in a child process that starts on demand."""

    def __init__(self, tokenizer: TokenizerData, *, limit_s: float, limit_bytes: int = _MEMORY_LIMIT_BYTES) -> None:
        """`limit_s`: timeout for one constraint in seconds. `limit_bytes`: memory of the child process."""
        self._tokenizer = tokenizer
        self._limit_s = limit_s
        self._limit_bytes = limit_bytes
        self._child: _Child | None = None
        self._lock = asyncio.Lock()  # the child handles one request at a time
        self._accepted: set[Constraint] = set()
        self._is_closed = False

    async def check(self, constraint: Constraint) -> None:
        """Compiles the constraint. Raises ConstraintRefused if it does not compile within the limits, and
        EngineUnavailable if the checker is closed or the child process does not start."""
        if constraint in self._accepted:
            return
        if constraint.kind == "guidance" and self._tokenizer.llguidance is None:
            raise ConstraintRefused("the tokenizer of this model is not supported for json, regex and tools spaces")
        async with self._lock:
            error = await self._compile({"kind": constraint.kind, "spec": constraint.spec})
        if error:
            raise ConstraintRefused(error)
        if len(self._accepted) >= 1024:
            self._accepted.clear()
        self._accepted.add(constraint)

    async def close(self) -> None:
        """Kills the child. Pending and later calls raise EngineUnavailable."""
        self._is_closed = True
        await self._end_child()

    async def _end_child(self) -> None:
        if self._child is not None:
            await asyncio.to_thread(self._child.kill)
        self._child = None

    async def _compile(self, request: dict[str, Any]) -> str:
        """Returns why the child refuses the constraint; empty if it accepts it. A child that crashed may have been
        killed by somebody else, so a second child tries again."""
        error = ""
        for _ in range(2):
            child = await self._running_child()
            try:
                async with asyncio.timeout(self._limit_s):
                    response = await asyncio.to_thread(child.exchange, request)
            except TimeoutError:
                await self._end_child()
                return f"compiling the constraint takes more than {self._limit_s:g} s; {_SIMPLIFY}"
            except asyncio.CancelledError:
                await self._end_child()  # otherwise the next request would read this response
                raise
            if response is not None:
                return response["error"]
            error = await asyncio.to_thread(child.why_ended)
            self._check_open()  # if `close` killed the child, the constraint is not at fault
            if error == _OUT_OF_MEMORY:
                break
        return error

    async def _running_child(self) -> "_Child":
        self._check_open()
        if self._child is None or not self._child.is_alive:
            await self._end_child()
            self._child = _Child()
            try:
                async with asyncio.timeout(_START_LIMIT_S):
                    start = {"limit_bytes": self._limit_bytes, **asdict(self._tokenizer)}
                    response = await asyncio.to_thread(self._child.exchange, start)
                self._check_open()  # `close` may have been called before there was a child that it could kill
                if response is None:
                    raise EngineUnavailable("the process that compiles constraints ended while it started")
            except BaseException as error:
                await self._end_child()  # otherwise the next request would read this response
                if isinstance(error, TimeoutError):
                    raise EngineUnavailable("the process that compiles constraints does not start") from error
                raise
        return self._child

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineUnavailable("the engine was closed")


class _Child:
    """The child process. Its methods block.

    It is started by `subprocess`, which uses vfork. asyncio's subprocesses on uvloop fork: handlers of fork then run in
    a copy of this process that has only one thread, and torch's may wait there for a lock forever, and with them the
    event loop.
    """

    def __init__(self) -> None:
        self._ending = threading.Lock()
        self._output = ""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        command = [sys.executable, "-m", __spec__.name]
        self._process = subprocess.Popen(  # noqa: S603 - a fixed command
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._responses = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def exchange(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Sends a request. Returns the response, or None if the child died."""
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
            line = self._responses.readline()
        except (OSError, ValueError):  # ValueError: `kill` has closed the pipes
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def kill(self) -> None:
        """Kills the child, which ends a pending exchange, and closes the pipes. May be called again."""
        with self._ending:
            if self._stderr.closed:
                return
            self._process.kill()
            self._process.wait()
            self._stderr.seek(0)
            self._output = self._stderr.read()[-2000:].decode(errors="replace")
            for file in (self._stderr, self._requests, self._responses):
                with contextlib.suppress(BrokenPipeError):  # closing flushes
                    file.close()

    def why_ended(self) -> str:
        """Returns why the child ended without a response."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_LIMIT_S)
        self.kill()
        if any(word in self._output for word in _MEMORY_WORDS):
            return _OUT_OF_MEMORY
        code = self._process.returncode
        _log.warning("grammar_compiler_crashed", returncode=code, output=self._output)
        cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        return f"the compiler of constraints ended {cause} on this constraint; {_SIMPLIFY}"


def _serve() -> None:
    """The main function of the child process."""
    responses = os.fdopen(os.dup(1), "w", buffering=1)
    # Libraries may print to stdout. Redirect that to stderr, so that the parent does not read it as a response.
    os.dup2(2, 1)
    start = json.loads(sys.stdin.readline())
    limit_bytes = start.pop("limit_bytes")
    tokenizer = TokenizerData(**start)
    compiler = tokenizer.xgrammar and _xgrammar_compiler(tokenizer.xgrammar)
    guidance = _Guidance(tokenizer) if tokenizer.llguidance is not None else None
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    responses.write("{}\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["kind"] == "guidance" and guidance is not None:
                guidance.compile(request["spec"])
            else:
                _compile(compiler, request["kind"], request["spec"])
            error = ""
        except Exception as failure:  # noqa: BLE001 - the libraries raise many types
            error = _reason(failure)
            if isinstance(failure, MemoryError) or any(word in error for word in _MEMORY_WORDS):
                error = _OUT_OF_MEMORY
        responses.write(json.dumps({"error": error}) + "\n")


def _xgrammar_compiler(tokenizer: str) -> Any:
    import xgrammar  # imported here because it takes seconds, and the parent does not need it

    info = xgrammar.TokenizerInfo.deserialize_json(tokenizer)
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


_SOURCE_LINE = re.compile(r"\[[0-9:.]+\] \S+:[0-9]+: ")
"""What xgrammar writes before its messages: the time, and the line of its source."""


def _reason(failure: Exception) -> str:
    """Returns the line of a library's message that says what is wrong."""
    lines = _SOURCE_LINE.sub("", str(failure)).strip().splitlines() or [type(failure).__name__]
    return lines[0 if lines[-1].strip() == "^" else -1][:300]  # a lone ^ points into the line before


class _Guidance:
    """Compiles grammars for llguidance."""

    def __init__(self, tokenizer: TokenizerData) -> None:
        from llguidance import LLTokenizer

        self._tokenizer = LLTokenizer(
            tokenizer.llguidance or "", n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eos_token_id
        )

    def compile(self, spec: str) -> None:
        """Compiles a grammar, and follows it for some tokens, because llguidance does much of its work only then.
        Raises ValueError."""
        start = lark.matcher(spec, self._tokenizer)
        generator = random.Random(0)  # noqa: S311 - not a secret
        for _ in range(_NUM_WALKS):
            matcher = start.deep_copy()
            for _ in range(_WALK_TOKENS):
                mask = matcher.compute_bitmask()
                if matcher.is_error():
                    sys.stderr.write(matcher.get_error()[:1000] + "\n")  # the library's text says nothing to callers
                    raise ValueError(f"the schema or the pattern is too complex to be enforced; {_SIMPLIFY}")
                allowed = [index for index, byte in enumerate(mask) if byte]
                if not allowed or matcher.is_stopped():
                    break
                index = generator.choice(allowed)
                bits = [bit for bit in range(8) if mask[index] >> bit & 1]
                matcher.consume_token(index * 8 + generator.choice(bits))


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
