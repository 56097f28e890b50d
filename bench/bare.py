"""The bare engine as a contender: a process that plays cells on AsyncLLM with no HTTP, no store and no rendering.

Driven over pipes by `bench.contenders`: a line of JSON in names a cell and a run, a line out holds the sample.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import orjson
import uvloop

from bench.measure import Actor, Reply, measure
from bench.workloads import INSTRUCTIONS, WORKLOADS, Cell, Workload
from service.engine.vllm.engine import VLLMEngine
from service.trajectory import Sampling


class BareActor:
    """Grows a list of token ids, the very ones that the service would send, and asks the engine for the next step."""

    def __init__(self, engine: VLLMEngine, workload: Workload) -> None:
        self._engine = engine
        self._prompt = engine.prompt
        self._sampling = Sampling(**workload.sampling)
        self._token_ids: list[int] = []
        self._turns: list[list[int]] = []
        self._choices: list[tuple[str, tuple[int, ...]]] = []
        self._children: tuple[int, ...] = ()
        if workload.actions:
            trie = engine.trie(workload.actions)
            (branch,) = trie.branches  # else one pass would not decide, and this would be another workload
            self._choices = list(zip(trie.actions, trie.sequences, strict=True))
            self._children = branch.children

    async def open(self, observations: Sequence[str]) -> None:
        first, *later = observations
        self._turns = [self._prompt.first_turn(INSTRUCTIONS, first), *map(self._prompt.next_turn, later)]

    async def act(self, step: int) -> Reply:
        self._token_ids += self._turns[step]
        return await (self._choose() if self._choices else self._write())

    async def _choose(self) -> Reply:
        num_tokens = len(self._token_ids)
        scores = (await self._engine.score(self._token_ids[:], self._children)).logprobs
        action, token_ids = self._choices[scores.index(max(scores))]
        self._token_ids += token_ids
        return Reply(action, num_tokens, len(token_ids))

    async def _write(self) -> Reply:
        num_tokens = len(self._token_ids)
        completion = await self._engine.generate(self._token_ids[:], self._sampling, None)
        self._token_ids += completion.token_ids
        if completion.token_ids[-1:] != (self._prompt.terminator,):
            self._token_ids.append(self._prompt.terminator)
        return Reply(completion.text, num_tokens, len(completion.token_ids))


async def serve(model: str, options: dict[str, Any], answers: BinaryIO) -> None:
    """Loads the engine, says so, and plays every cell that is asked for until the pipe closes."""
    engine = await VLLMEngine.load(model, options, name="bench", grammar_limit_s=5.0)
    watch = asyncio.create_task(engine.watch())
    _write_line(answers, {"ready": True})
    try:
        while line := await asyncio.to_thread(sys.stdin.buffer.readline):
            asked = orjson.loads(line)
            workload = next(workload for workload in WORKLOADS if workload.name == asked["workload"])
            cell = Cell(workload, asked["num_episodes"], asked["num_steps"], asked["num_sets"])
            sample = await measure(cell, asked["run"], _actors(engine, workload), time.process_time)
            _write_line(answers, asdict(sample))
    finally:
        watch.cancel()
        await engine.close()


def _actors(engine: VLLMEngine, workload: Workload) -> Callable[[int], Actor]:
    return lambda _: BareActor(engine, workload)


def _write_line(answers: BinaryIO, document: Any) -> None:
    answers.write(orjson.dumps(document) + b"\n")
    answers.flush()


def main() -> None:
    """Takes the model and the engine options, as JSON, from the command line."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    uvloop.run(serve(sys.argv[1], orjson.loads(sys.argv[2]), answers))


if __name__ == "__main__":
    main()
