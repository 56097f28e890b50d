"""Actors for the HTTP contenders.

They play an episode with POST /act, POST /act/batch, vLLM's chat completions, or vLLM's decisions (/v1/systemone).
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from bench.http_client import Connection
from bench.measure import Reply
from bench.workloads import Workload


class ServiceActor:
    """Plays an episode on the service. It sends only the new observation of each step."""

    def __init__(self, connection: Connection, episode_id: str, workload: Workload) -> None:
        self._connection = connection
        self._id = episode_id
        self._headers = f"X-Episode-Id: {episode_id}\r\n"
        space: dict[str, Any] = {"type": "discrete", "actions": workload.actions}
        self._request = {
            "episode_id": episode_id,
            "instructions": workload.instructions,
            "action_space": space if workload.actions else {"type": "text"},
            "sampling": workload.sampling,
        }
        self._observations: Sequence[str] = ()

    async def open(self, observations: Sequence[str]) -> None:
        self._observations = observations
        await self._connection.open()
        await self._connection.post("/episode", self._request, self._headers)

    async def act(self, step: int) -> Reply:
        body = {"episode_id": self._id, "observation": self._observations[step], "step": step}
        answer, sent = await self._answer(body)
        usage = answer["usage"]
        return Reply(answer["text"], usage["prompt_tokens"], usage["completion_tokens"], sent, answer["timing"])

    async def _answer(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Returns the answer, and the number of bytes that were sent."""
        sent = self._connection.bytes_sent
        answer = await self._connection.post("/act", body, self._headers)
        return answer, self._connection.bytes_sent - sent

    def close(self) -> None:
        self._connection.close()


class Lockstep:
    """Sends the acts of `size` episodes as one batch, once each of them has one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]] = []

    async def act(self, body: dict[str, Any], connection: Connection) -> tuple[dict[str, Any], int]:
        """Returns the answer to this act, and its share of the bytes that were sent."""
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((body, answered))
        sent = connection.bytes_sent
        if len(self._waiting) == self._size:
            waiting, self._waiting = self._waiting, []
            try:
                results = (await connection.post("/act/batch", {"acts": [body for body, _ in waiting]}))["results"]
            except Exception as error:
                for _, future in waiting:
                    future.set_exception(error)
                raise
            for (_, future), result in zip(waiting, results, strict=True):
                future.set_result(result)
        return await answered, connection.bytes_sent - sent


class BatchActor(ServiceActor):
    """Plays an episode on the service, in lockstep with others."""

    def __init__(self, connection: Connection, episode_id: str, workload: Workload, lockstep: Lockstep) -> None:
        super().__init__(connection, episode_id, workload)
        self._lockstep = lockstep

    async def _answer(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        return await self._lockstep.act(body, self._connection)


class _VLLMActor:
    """Plays an episode on vLLM's server, which keeps nothing: the client sends all of it at each step."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._observations: Sequence[str] = ()

    async def open(self, observations: Sequence[str]) -> None:
        self._observations = observations
        await self._connection.open()

    def close(self) -> None:
        self._connection.close()


class ChatActor(_VLLMActor):
    """Plays an episode on a chat API. The client keeps the conversation and sends all of it at each step.

    With `logprobs` it also asks for the log-probability of each token, which the service always stores.
    """

    def __init__(self, connection: Connection, model: str, workload: Workload, *, logprobs: bool = False) -> None:
        super().__init__(connection)
        self._messages = [{"role": "system", "content": workload.instructions}]
        self._request: dict[str, Any] = {"model": model, "messages": self._messages, **workload.sampling}
        if workload.actions:
            self._request["structured_outputs"] = {"choice": workload.actions}
        else:  # request special tokens too, so that the history sent back is as long as the service's
            self._request |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        if logprobs:
            self._request["logprobs"] = True

    async def act(self, step: int) -> Reply:
        sent = self._connection.bytes_sent
        self._messages.append({"role": "user", "content": self._observations[step]})
        answer = await self._connection.post("/v1/chat/completions", self._request)
        text = answer["choices"][0]["message"]["content"] or ""
        self._messages.append({"role": "assistant", "content": text})
        usage = answer["usage"]
        return Reply(text, usage["prompt_tokens"], usage["completion_tokens"], self._connection.bytes_sent - sent)


class DecisionActor(_VLLMActor):
    """Plays an episode with vLLM's decisions: it sends the whole transcript as the state, and asks one question.

    vLLM reads the probabilities of the options' letters, and the chosen option becomes part of the transcript.
    """

    def __init__(self, connection: Connection, model: str, workload: Workload) -> None:
        super().__init__(connection)
        self._lines: list[str] = []
        question = {"type": "choice", "criteria": dict.fromkeys(workload.actions)}
        self._request = {"model": model, "instructions": workload.instructions, "questions": {"action": question}}

    async def act(self, step: int) -> Reply:
        sent = self._connection.bytes_sent
        self._lines.append(self._observations[step])
        answer = await self._connection.post("/v1/systemone", {**self._request, "state": "\n".join(self._lines)})
        text = answer["answers"]["action"]["choice"]
        self._lines.append(text)
        usage = answer["usage"]
        return Reply(text, usage["input_tokens"], usage["output_tokens"], self._connection.bytes_sent - sent)
