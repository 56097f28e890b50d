"""The worker: the process that runs an encoder-decoder model.

A thread receives requests. The main loop then encodes the requests that wait, scores actions, and generates one more
token of every reply that is in progress, again and again (continuous batching). It waits while there is nothing to do.
"""

import contextlib
import math
import os
import random
import signal
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from service.engine.base import EngineRefused
from service.engine.seq2seq.messages import (
    Answer,
    Cancel,
    Done,
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
from service.engine.seq2seq.model import Seq2SeqModel
from service.engine.seq2seq.rows import Rows
from service.engine.seq2seq.sampling import Reply, draw
from service.validation import lark

_MAX_PADDING = 1.5
"""Maximum size of a batch of the encoder, with padding, compared with its tokens."""


def main(connection: Connection, options: ModelOptions) -> None:
    """The main function of the process. It ends when the connection does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl+C the service still needs the worker while it drains
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    try:
        model = Seq2SeqModel(options)
    except EngineRefused as refusal:
        connection.send(Refused(str(refusal)))
        return
    connection.send(Ready(model.vocab_size, model.dtype))
    Worker(connection, options, model).run()


class _Batch:
    """Replies that are decoded together, with one adapter. `replies` and the rows of the cache have the same order."""

    def __init__(self, adapter: str | None) -> None:
        self.adapter = adapter
        self.rows = Rows()
        self.replies: list[Reply] = []

    def remove(self, places: Sequence[int]) -> None:
        """Removes replies, as `Rows.leave` does."""
        for place in sorted(places, reverse=True):
            self.rows.leave(place)
            last = self.replies.pop()
            if place < len(self.replies):
                self.replies[place] = last


class Worker:
    """Serves the requests that arrive on a connection."""

    def __init__(self, connection: Connection, options: ModelOptions, model: Seq2SeqModel) -> None:
        self._connection = connection
        self._options = options
        self._model = model
        self._arrived: SimpleQueue[Numbered] = SimpleQueue()
        self._waiting: deque[Numbered] = deque()
        self._batches: list[_Batch] = []
        self._answers: list[tuple[int, Answer]] = []
        self._unloading: set[str] = set()
        self._grammar_tokenizer: Any = None

    @torch.inference_mode()
    def run(self) -> None:
        """Serves requests forever."""
        Thread(target=self._receive, name="receive", daemon=True).start()
        while True:
            self._take()
            self._admit()
            for batch in self._batches:
                self._step(batch)
            self._batches = [batch for batch in self._batches if batch.replies]
            self._unload_adapters()
            if self._answers:
                self._connection.send(self._answers)
                self._answers = []

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while message := self._connection.recv():
                self._arrived.put(message)
        os._exit(0)  # immediately: the service has ended, and the main thread may be busy with a pass

    def _take(self) -> None:
        """Takes all requests that have arrived. Waits for one if there is nothing else to do."""
        is_idle = not self._waiting and not self._batches
        while is_idle or not self._arrived.empty():
            arrived: tuple[int, Request] = self._arrived.get()
            number, request = arrived
            is_idle = False
            match request:
                case Cancel():
                    self._cancel(number)
                case LoadAdapter():
                    self._answers.append((number, self._load_adapter(request)))
                case UnloadAdapter():
                    self._unloading.add(request.name)
                    self._answers.append((number, Done()))
                case Generate() | Score():
                    self._waiting.append((number, request))
                case Probe():
                    self._answers.append((number, Done()))

    def _cancel(self, number: int) -> None:
        self._waiting = deque(one for one in self._waiting if one[0] != number)
        for batch in self._batches:
            batch.remove([place for place, reply in enumerate(batch.replies) if reply.number == number])

    def _load_adapter(self, request: LoadAdapter) -> Answer:
        self._unloading.discard(request.name)
        try:
            self._model.load_adapter(request.name, request.path)
        except Exception as error:  # noqa: BLE001 - PEFT raises many types
            return Refused(f"{type(error).__name__}: {str(error)[:300]}")
        return Done()

    def _unload_adapters(self) -> None:
        """Unloads the adapters that no request needs any more."""
        needed = {batch.adapter for batch in self._batches} | {request.adapter for _, request in self._waiting}
        for name in self._unloading - needed:
            self._model.unload_adapter(name)
            self._unloading.remove(name)

    def _admit(self) -> None:
        """Encodes the waiting requests that have room, in the order of their arrival."""
        num_rows = sum(len(batch.rows) for batch in self._batches)
        width = max((batch.rows.width for batch in self._batches), default=0)
        admitted: list[Numbered] = []
        while self._waiting:
            total = num_rows + len(admitted) + 1
            wider = max(width, len(self._waiting[0][1].encoder_token_ids))
            if total > self._options.max_rows or total * wider > self._options.max_encoder_tokens:
                break
            width = wider
            admitted.append(self._waiting.popleft())
        by_adapter: dict[str | None, list[Numbered]] = {}
        for one in admitted:
            by_adapter.setdefault(one[1].adapter, []).append(one)
        for adapter, requests in by_adapter.items():
            try:
                self._model.use(adapter)
            except KeyError:
                self._answers += [(number, Missing()) for number, _ in requests]
                continue
            for bucket in _buckets(requests):
                self._begin(adapter, bucket)

    def _begin(self, adapter: str | None, requests: Sequence[Numbered]) -> None:
        """Encodes requests of one adapter together. Answers `Score`, and draws the first token for `Generate`."""
        inputs = [request.encoder_token_ids for _, request in requests]
        cache, logits = self._model.begin(inputs)
        widths = list(map(len, inputs))
        scoring = [row for row, (_, request) in enumerate(requests) if isinstance(request, Score)]
        if scoring:
            self._score(cache, logits, widths, {row: requests[row] for row in scoring})
        generating = [row for row, (_, request) in enumerate(requests) if isinstance(request, Generate)]
        replies = {row: reply for row in generating if (reply := self._reply(*requests[row]))}
        if not replies:
            return
        draw(logits[list(replies)], list(replies.values()))
        going = [row for row, reply in replies.items() if not self._settle(reply)]
        if going:
            batch = self._batch_for(adapter)
            batch.rows.join(cache, widths, going)
            batch.replies += [replies[row] for row in going]

    def _batch_for(self, adapter: str | None) -> _Batch:
        """Returns the batch that replies may join: one with this adapter, or a new one."""
        for batch in self._batches:
            if self._model.is_ragged and batch.adapter == adapter:
                return batch
        batch = _Batch(adapter)
        self._batches.append(batch)
        return batch

    def _reply(self, number: int, request: Generate) -> Reply | None:
        """Returns the reply to generate. Answers the request and returns None if its grammar does not compile."""
        reply = Reply(number, request, random.Random(request.sampling.seed))  # noqa: S311 - draws actions, not secrets
        if request.grammar is not None:
            try:
                reply.matcher = lark.matcher(request.grammar, self._tokenizer())
            except Exception as error:  # noqa: BLE001 - the library raises many types
                self._answers.append((number, Failed(f"the grammar does not compile: {str(error)[:200]}")))
                return None
        return reply

    def _tokenizer(self) -> Any:
        if self._grammar_tokenizer is None:
            from llguidance import LLTokenizer

            self._grammar_tokenizer = LLTokenizer(
                self._options.grammar_tokenizer or "",
                n_vocab=self._model.vocab_size,
                eos_token=list(self._options.end_token_ids),
            )
        return self._grammar_tokenizer

    def _step(self, batch: _Batch) -> None:
        """Generates the next token of each reply of a batch."""
        if not batch.replies:
            return
        self._model.use(batch.adapter)
        draw(self._model.step(batch.rows, [reply.token_ids[-1] for reply in batch.replies]), batch.replies)
        batch.remove([place for place, reply in enumerate(batch.replies) if self._settle(reply)])

    def _settle(self, reply: Reply) -> bool:
        """Answers a reply that is complete. Returns whether it is. A reply whose probability is no number is, too."""
        ids, sampling = reply.token_ids, reply.sampling
        is_ended = ids[-1] in sampling.stop_token_ids or not math.isfinite(reply.logprobs[-1])
        room = min(sampling.max_tokens, self._options.max_len - len(self._options.prefix))
        if is_ended or len(ids) >= room:
            reason = "stop" if is_ended else "length"
            self._answers.append((reply.number, Generated(tuple(ids), tuple(reply.logprobs), reason)))
            return True
        if reply.request.streams:
            self._answers.append((reply.number, Tokens(tuple(ids), tuple(reply.logprobs))))
        return False

    def _score(self, cache: Any, logits: Tensor, widths: list[int], requests: dict[int, Numbered]) -> None:
        """Scores the children of the branches of each request, which are rows of the cache."""
        paths = [(row, path) for row, (_, request) in requests.items() for path in _longest(request.branches)]
        places: dict[tuple[int, tuple[int, ...]], Tensor] = {(row, ()): logits[row] for row in requests}
        for (row, path), behind in zip(paths, self._model.follow(cache, widths, paths) if paths else (), strict=True):
            for length in range(1, len(path) + 1):
                places[row, tuple(path[:length])] = behind[length - 1]
        for row, (number, request) in requests.items():
            scores = tuple(_among(places[row, tuple(path)], children) for path, children in request.branches)
            self._answers.append((number, Scored(scores)))


def _among(logits: Any, children: Sequence[int]) -> tuple[float, ...]:
    """Returns the log-probabilities of these tokens, over the whole vocabulary."""
    return tuple(logits.log_softmax(-1)[list(children)].tolist())


def _longest(branches: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[int, ...]]:
    """Returns the paths that contain all others, without those that another one begins with."""
    paths = sorted({tuple(path) for path, _ in branches})
    following = [*paths[1:], ()]
    return [path for path, after in zip(paths, following, strict=True) if path and after[: len(path)] != path]


def _buckets(requests: Sequence[Numbered]) -> list[list[Numbered]]:
    """Splits requests into batches of similar lengths, so that there is little padding."""
    buckets: list[list[Numbered]] = []
    num_tokens = 0
    for one in sorted(requests, key=lambda one: len(one[1].encoder_token_ids), reverse=True):
        length = len(one[1].encoder_token_ids)
        if buckets:
            longest = len(buckets[-1][0][1].encoder_token_ids)
            if longest * (len(buckets[-1]) + 1) <= _MAX_PADDING * (num_tokens + length):
                buckets[-1].append(one)
                num_tokens += length
                continue
        buckets.append([one])
        num_tokens = length
    return buckets
