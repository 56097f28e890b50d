"""Sends the acts of many episodes in few requests."""

import asyncio
from collections import deque
from functools import partial
from math import ceil

from service.client import Act, ActFields, ApiError, AsyncClient, AsyncEpisode

MAX_REQUESTS = 8
"""Maximum number of requests in flight. While some are, the others' environments step."""

_Waiting = tuple[AsyncEpisode, str, ActFields, "asyncio.Future[Act]"]


class Acting:
    """Acts in up to `num_episodes` episodes, in at most `MAX_REQUESTS` requests at the same time.

    The acts of episodes that are ready together share a request, because a request costs the client more than what it
    contains. An act waits for all acts of its request: use it where they take equally long.
    """

    def __init__(self, client: AsyncClient, num_episodes: int) -> None:
        self._client = client
        self._max_acts = ceil(num_episodes / MAX_REQUESTS)
        self._waiting: deque[_Waiting] = deque()
        self._requests: set[asyncio.Task[None]] = set()

    async def act(self, episode: AsyncEpisode, observation: str, fields: ActFields) -> Act:
        """Acts in an episode. Raises EpisodicError. If it is cancelled, the act may still happen."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Act] = loop.create_future()
        self._waiting.append((episode, observation, fields, answered))
        loop.call_soon(self._send)  # after the other episodes that are ready now have added their acts
        return await answered

    def _send(self) -> None:
        while self._waiting and len(self._requests) < MAX_REQUESTS:
            taken = [self._waiting.popleft() for _ in range(min(self._max_acts, len(self._waiting)))]
            acts = [waiting for waiting in taken if not waiting[3].cancelled()]
            if not acts:
                continue
            request = asyncio.create_task(self._request(acts))
            self._requests.add(request)
            request.add_done_callback(self._finish)
            for *_, answered in acts:
                answered.add_done_callback(partial(_abort_unwanted, request, acts))

    def _finish(self, request: "asyncio.Task[None]") -> None:
        self._requests.discard(request)
        self._send()

    async def _request(self, acts: list[_Waiting]) -> None:
        try:
            results = await self._results(acts)
        except Exception as error:  # noqa: BLE001 - each episode reports it
            results = [error] * len(acts)
        for (*_, answered), result in zip(acts, results, strict=True):
            if answered.cancelled():
                continue
            if isinstance(result, Exception):
                answered.set_exception(result)
            else:
                answered.set_result(result)

    async def _results(self, acts: list[_Waiting]) -> list[Act | ApiError] | list[Act]:
        if len(acts) > 1:
            return await self._client.act_batch([(episode, text, fields) for episode, text, fields, _ in acts])
        ((episode, text, fields, _),) = acts
        return [await episode.act(text, **fields)]


def _abort_unwanted(request: "asyncio.Task[None]", acts: list[_Waiting], _answered: "asyncio.Future[Act]") -> None:
    """Cancels a request once all of its callers have been cancelled."""
    if all(answered.cancelled() for *_, answered in acts):
        request.cancel()
