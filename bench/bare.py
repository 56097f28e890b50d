"""The bare engine as a contender: a process that runs cells on AsyncLLM without HTTP, store or prompt rendering.

`bench.contenders` controls it over pipes: it reads the cell and the run as a line of JSON and writes the sample as one.
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
from bench.workloads import WORKLOADS, Cell, Workload
from service.engine.vllm.engine import VLLMEngine
from service.trajectory import Sampling


class BareActor:
    """Plays an episode with the token ids that the service would send to the engine."""

    def __init__(self, engine: VLLMEngine, workload: Workload) -> None:
        self._engine = engine
        self._prompt = engine.prompt
        self._instructions = workload.instructions
        self._sampling = Sampling(**workload.sampling)
        self._token_ids: list[int] = []
        self._turns: list[list[int]] = []
        self._choices: list[tuple[str, tuple[int, ...]]] = []
        self._children: tuple[int, ...] = ()
        if workload.actions:
            trie = engine.trie(workload.actions)
            # With one branch, one forward pass decides between the actions, as it does in the service.
            (branch,) = trie.branches
            self._choices = list(zip(trie.actions, trie.sequences, strict=True))
            self._children = branch.children

    async def open(self, observations: Sequence[str]) -> None:
        first, *later = observations
        self._turns = [self._prompt.first_turn(self._instructions, first), *map(self._prompt.next_turn, later)]

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
    """Loads the engine, reports that it is ready, and runs each requested cell until the pipe is closed."""
    engine = await VLLMEngine.load(model, options, name="bench", grammar_limit_s=5.0)
    watch = asyncio.create_task(engine.watch())
    _write_line(answers, {"ready": True})
    try:
        while line := await asyncio.to_thread(sys.stdin.buffer.readline):
            order = orjson.loads(line)
            workload = next(workload for workload in WORKLOADS if workload.name == order["workload"])
            cell = Cell(workload, order["num_episodes"], order["num_steps"], order["num_sets"])
            sample = await measure(cell, order["run"], _actors(engine, workload), time.process_time)
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
    """Runs with the model and the engine options (JSON) from the command line."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries goes to stderr, so that it cannot mix with the answers
    uvloop.run(serve(sys.argv[1], orjson.loads(sys.argv[2]), answers))


if __name__ == "__main__":
    main()
