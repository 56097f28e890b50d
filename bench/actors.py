"""Actors for the HTTP contenders: one plays an episode with POST /act, the other with vLLM's chat completions."""

from collections.abc import Sequence
from typing import Any

from bench.http_client import Connection
from bench.measure import Reply
from bench.workloads import INSTRUCTIONS, Workload


class ServiceActor:
    """Plays an episode on the service. It sends only the new observation of each step."""

    def __init__(self, connection: Connection, episode_id: str, workload: Workload) -> None:
        self._connection = connection
        self._id = episode_id
        self._headers = f"X-Episode-Id: {episode_id}\r\n"
        space: dict[str, Any] = {"type": "discrete", "actions": workload.actions}
        self._request = {
            "episode_id": episode_id,
            "instructions": INSTRUCTIONS,
            "action_space": space if workload.actions else {"type": "text"},
            "sampling": workload.sampling,
        }
        self._observations: Sequence[str] = ()

    async def open(self, observations: Sequence[str]) -> None:
        self._observations = observations
        await self._connection.open()
        await self._connection.post("/episode", self._request, self._headers)

    async def act(self, step: int) -> Reply:
        sent = self._connection.bytes_sent
        body = {"episode_id": self._id, "observation": self._observations[step], "step": step}
        answer = await self._connection.post("/act", body, self._headers)
        usage = answer["usage"]
        sent = self._connection.bytes_sent - sent
        return Reply(answer["text"], usage["prompt_tokens"], usage["completion_tokens"], sent, answer["timing"])

    def close(self) -> None:
        self._connection.close()


class ChatActor:
    """Plays an episode on a chat API. The client keeps the conversation and sends all of it at each step."""

    def __init__(self, connection: Connection, model: str, workload: Workload) -> None:
        self._connection = connection
        self._messages = [{"role": "system", "content": INSTRUCTIONS}]
        self._request: dict[str, Any] = {"model": model, "messages": self._messages, **workload.sampling}
        if workload.actions:
            self._request["structured_outputs"] = {"choice": workload.actions}
        else:  # request special tokens too, so that the history sent back is as long as the service's
            self._request |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        self._observations: Sequence[str] = ()

    async def open(self, observations: Sequence[str]) -> None:
        self._observations = observations
        await self._connection.open()

    async def act(self, step: int) -> Reply:
        sent = self._connection.bytes_sent
        self._messages.append({"role": "user", "content": self._observations[step]})
        answer = await self._connection.post("/v1/chat/completions", self._request)
        text = answer["choices"][0]["message"]["content"] or ""
        self._messages.append({"role": "assistant", "content": text})
        usage = answer["usage"]
        return Reply(text, usage["prompt_tokens"], usage["completion_tokens"], self._connection.bytes_sent - sent)

    def close(self) -> None:
        self._connection.close()
