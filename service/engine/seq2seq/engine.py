"""Implements the engine with a worker process that runs an encoder-decoder model."""

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from service.engine.adapters import AdapterRefused
from service.engine.base import (
    ActionSpaceRefused,
    Adapter,
    Constraint,
    EngineRefused,
    EngineUnavailable,
    OnText,
)
from service.engine.completion import Completion, CompletionText, Scores
from service.engine.decision_trie import Branch
from service.engine.encoder_decoder import EncoderDecoderEngine
from service.engine.encoder_prompt import EncoderPrompt
from service.engine.grammar import GrammarChecker, TokenizerData
from service.engine.seq2seq import worker
from service.engine.seq2seq.loading import Described, describe
from service.engine.seq2seq.messages import (
    Answer,
    Cancel,
    Failed,
    Generate,
    Generated,
    LoadAdapter,
    Missing,
    ModelOptions,
    Numbered,
    Probe,
    Ready,
    Refused,
    Request,
    Score,
    Scored,
    Tokens,
    UnloadAdapter,
)
from service.engine.tokenizer import HFTokenizer
from service.observability import logs
from service.trajectory import Sampling

_log = logs.get(__name__)

_EXIT_S = 5.0
_DIED = "the engine died; retry after it is loaded again"


class Seq2SeqEngine(EncoderDecoderEngine):
    """An engine that runs an encoder-decoder model with transformers. `Seq2SeqEngine.load` creates it."""

    def __init__(
        self, described: Described, tokenizer: HFTokenizer, process: "Process", ready: Ready, grammar: GrammarChecker
    ) -> None:
        options = described.options
        prompt = EncoderPrompt(tokenizer, options.prefix, options.end_token_ids)
        room = options.max_len - len(options.prefix)
        super().__init__(replace(described.info, vocab_size=ready.vocab_size), tokenizer, prompt, room)
        self.dtype = ready.dtype
        self._process = process
        self._grammar = grammar

    @classmethod
    async def load(
        cls, model: str, given: dict[str, Any], *, name: str, grammar_limit_s: float, cache: Path | None = None
    ) -> "Seq2SeqEngine":
        """Reads the model's configuration, and starts a worker that loads the weights.

        model: a folder or the id of a model on the Hugging Face hub.
        given: engine options; see `loading.Options`.
        name: the name of the model for callers.
        grammar_limit_s: timeout for compiling one constraint, in seconds.
        cache: a file with digests of weight files; see `weights_version`.

        Raises EngineRefused for a model or an option that is not supported.
        """
        described = await asyncio.to_thread(describe, model, name, given, cache)
        _log.info("engine_starting", model=name)
        tokenizer, options = HFTokenizer(described.tokenizer), described.options
        process, ready = await Process.start(options)
        try:
            _check_vocabulary(model, max(tokenizer.max_token_id, *options.end_token_ids), ready)
            data = TokenizerData(None, options.grammar_tokenizer, ready.vocab_size, tokenizer.eos_token_id)
            engine = cls(described, tokenizer, process, ready, GrammarChecker(data, limit_s=grammar_limit_s))
            await engine._warm_up()
        except BaseException:
            await process.close()
            raise
        return engine

    @property
    def healthy(self) -> bool:
        return not self._process.has_ended

    @property
    def heartbeat(self) -> int:
        return self._process.num_answers

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
        """A stop string is found here, because the worker does not decode text."""
        text = CompletionText(self.tokenizer.decoder(), sampling.stop, on_text)
        grammar, own = constraint and constraint.spec, adapter and adapter.name
        streams = bool(on_text or sampling.stop)
        request = Generate(prompt_token_ids, replace(sampling, stop=()), grammar, own, streams)
        async with aclosing(self._process.answers(request)) as answers:
            async for answer in answers:
                assert isinstance(answer, Tokens | Generated)
                reason = answer.finish_reason if isinstance(answer, Generated) else ""
                is_ended_by_token = reason == "stop"
                spoken = answer.token_ids[:-1] if is_ended_by_token else answer.token_ids
                if text.update(spoken):
                    is_ended_by_token, reason = False, "stop"
                if reason:
                    return Completion(answer.token_ids, answer.logprobs, text.finish(spoken), reason, 0)
        raise AssertionError  # the last answer has a reason

    async def score(
        self, encoder_token_ids: list[int], branches: Sequence[Branch], *, adapter: Adapter | None = None
    ) -> list[Scores]:
        wanted = tuple((tuple(branch.path), tuple(branch.children)) for branch in branches)
        answer = await self._process.answer(Score(encoder_token_ids, wanted, adapter and adapter.name))
        assert isinstance(answer, Scored)
        return [Scores(logprobs, 0) for logprobs in answer.logprobs]

    async def check_constraint(self, constraint: Constraint) -> None:
        await self._grammar.check(constraint)

    async def watch(self) -> None:
        await self._process.ended.wait()

    async def probe(self) -> None:
        await self._process.answer(Probe())

    def kill(self) -> None:
        self._process.kill()

    async def load_adapter(self, adapter: Adapter) -> None:
        answer = await self._process.answer(LoadAdapter(adapter.name, adapter.path))
        if isinstance(answer, Refused):
            raise AdapterRefused(f"the adapter cannot be loaded: {answer.reason}")

    async def unload_adapter(self, adapter: Adapter) -> None:
        await self._process.answer(UnloadAdapter(adapter.name))

    def show_adapters(self, names: Mapping[str, Adapter]) -> None:
        """There is no /v1 whose callers could choose them."""

    async def openai_app(self) -> None:
        return None

    async def close(self) -> None:
        await self._grammar.close()
        await self._process.close()

    async def _warm_up(self) -> None:
        """Makes one call of each kind, because the first calls allocate memory."""
        prompt = self.tokenizer.encode_input("a")
        await self.score(prompt, [Branch((), (0, 1), (0, 1, 2))])
        await self.generate(prompt, Sampling(temperature=0.0, max_tokens=2), None)


def _check_vocabulary(model: str, highest: int, ready: Ready) -> None:
    """Raises EngineRefused if a prompt could contain a token that the model does not have."""
    if highest >= ready.vocab_size:
        raise EngineRefused(
            f"{model}: the tokenizer has the token id {highest}, but the model has only {ready.vocab_size} "
            "embeddings: the tokenizer belongs to another model"
        )


class Process:
    """The worker's process, and the requests in flight. `Process.start` creates it."""

    def __init__(self, process: Any, connection: Connection, options: ModelOptions) -> None:
        self.options = options
        self.ended = asyncio.Event()
        self.num_answers = 0
        self._process = process
        self._connection = connection
        self._numbers = count()
        self._in_flight: dict[int, asyncio.Queue[Answer | None]] = {}
        self._outgoing: SimpleQueue[Numbered | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def start(cls, options: ModelOptions) -> "tuple[Process, Ready]":
        """Starts the worker, and waits until it has loaded the model. Raises EngineRefused."""
        # The worker's threads must not spin while they wait: on few cores they would take the CPU from this process.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        context = multiprocessing.get_context("spawn")
        pipe: Any = context.Pipe()
        ours, theirs = pipe
        process = context.Process(target=worker.main, args=(theirs, options), name="episodic-worker", daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()
        self = cls(process, ours, options)
        try:
            first = await asyncio.to_thread(ours.recv)
            if isinstance(first, Refused):
                raise EngineRefused(first.reason)
        except EOFError:
            await self.close()
            code = process.exitcode
            raise EngineRefused(f"the worker ended with exit code {code} while it loaded the model") from None
        except BaseException:
            self.kill()
            ours.close()
            raise
        Thread(target=self._receive, name="answers", daemon=True).start()
        Thread(target=self._send_all, name="requests", daemon=True).start()
        return self, first

    @property
    def has_ended(self) -> bool:
        return self.ended.is_set()

    async def answer(self, request: Request) -> Answer:
        """Returns the answer to a request. Raises EngineUnavailable, ActionSpaceRefused."""
        async with aclosing(self.answers(request)) as answers:
            async for answer in answers:
                return answer
        raise AssertionError  # there is always one

    async def answers(self, request: Request) -> AsyncGenerator[Answer]:
        """Yields the answers to a request, of which only `Tokens` are not the last one. If closed early, it cancels the
        request. Raises EngineUnavailable, ActionSpaceRefused."""
        if self.has_ended:
            raise EngineUnavailable(_DIED)
        number = next(self._numbers)
        arrived = self._in_flight[number] = asyncio.Queue()
        is_last = False
        try:
            self._outgoing.put((number, request))
            while not is_last:
                answer = await arrived.get()
                is_last = not isinstance(answer, Tokens)
                if answer is None:
                    raise EngineUnavailable(_DIED)
                if isinstance(answer, Missing):
                    raise EngineUnavailable("the policy's adapter was unloaded; retry the request")
                if isinstance(answer, Failed):
                    raise ActionSpaceRefused(f"the engine refuses the request: {answer.reason}")
                yield answer
        finally:
            del self._in_flight[number]
            if not is_last and not self.has_ended:
                self._outgoing.put((number, Cancel()))

    def kill(self) -> None:
        """Kills the worker. Requests in flight raise EngineUnavailable."""
        self._process.kill()
        self._end()

    async def close(self) -> None:
        """Ends the worker, whether it works or has died."""
        self._end()
        await asyncio.to_thread(self._process.join, _EXIT_S)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def _send_all(self) -> None:
        """Sends requests, in a thread of its own: if the worker hangs, it blocks."""
        try:
            while message := self._outgoing.get():
                self._connection.send(message)
            self._connection.send(None)  # the worker ends
        except OSError:
            pass  # the worker has ended, which `_receive` notices

    def _receive(self) -> None:
        """Receives answers, in a thread of its own, until the worker ends."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self._loop.call_soon_threadsafe(self._deliver, self._connection.recv())
            self._loop.call_soon_threadsafe(self._end)
        self._connection.close()

    def _deliver(self, answers: Sequence[tuple[int, Answer]]) -> None:
        self.num_answers += 1
        for number, answer in answers:
            if arrived := self._in_flight.get(number):
                arrived.put_nowait(answer)

    def _end(self) -> None:
        self.ended.set()
        self._outgoing.put(None)
        for arrived in self._in_flight.values():
            arrived.put_nowait(None)
