"""Every combination of step, Idempotency-Key and body, while an act is in flight and after its commit."""

import asyncio
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.tokenizer import HFTokenizer
from tests.support.serving import HeldEngine, Served, serve, until

BODIES = {"same": "look", "other": "another"}
KEYS = {"none": None, "same": "k", "committed": "zero", "other": "new"}
STEPS = {"none": None, "committed": 0, "same": 1, "next": 2}


def expected(key: str, step: str, body: str, *, first_has: str, in_flight: bool) -> tuple[int, Any]:
    """Returns the expected status, and the step of the answer or the code.

    Step 0 is committed with the key "zero" and the body "zero". The act of step 1 has the body "look" and, as
    `first_has` says, a key, a step, both or neither. It is in flight or committed.
    """
    key_names = {"committed": 0, "same": 1 if "key" in first_has else None}.get(key)
    step_names = STEPS[step]
    if key_names is not None and step_names not in (None, key_names):
        return 409, "idempotency_mismatch"
    named = step_names if key_names is None else key_names
    if named == 0:  # no request of this test has the body of step 0
        return 409, "idempotency_mismatch"
    if named == 1:
        if body == "same":
            return 200, 1
        if in_flight and key_names is None and "step" not in first_has:
            return 409, "episode_busy"
        return 409, "idempotency_mismatch"
    return (409, "episode_busy") if in_flight else (200, 2)


async def post(api: Served, key: str | None, **fields: Any) -> httpx.Response:
    return await api.post_act(headers={"Idempotency-Key": key} if key else None, **fields)


@pytest.mark.parametrize("in_flight", [True, False], ids=["in flight", "committed"])
@pytest.mark.parametrize("first_has", ["key", "step", "key and step", "neither"])
async def test_a_request_after_another(tmp_path: Path, tokenizer: HFTokenizer, first_has: str, in_flight: bool):
    async with serve(tmp_path, HeldEngine(tokenizer)) as api:
        for number, (key, step, body) in enumerate(product(KEYS, STEPS, BODIES)):
            api.name = f"e{number}"
            await api.open()
            api.engine.release.set()
            assert (await post(api, "zero", observation="zero")).status_code == 200
            api.engine.release.clear()
            num_held = api.engine.num_held
            first_fields = {"step": 1} if "step" in first_has else {}
            first = asyncio.create_task(post(api, "k" if "key" in first_has else None, **first_fields))
            await until(lambda num_held=num_held: api.engine.num_held > num_held)
            if not in_flight:
                api.engine.release.set()
                await first
            fields: dict[str, Any] = {"observation": BODIES[body], **({} if step == "none" else {"step": STEPS[step]})}
            second = asyncio.create_task(post(api, KEYS[key], **fields))
            status, outcome = expected(key, step, body, first_has=first_has, in_flight=in_flight)
            if status == 200 and in_flight:
                await until(lambda: api.app.state.services.sessions._cache.peek(api.name).in_flight.num_waiters == 2)
                api.engine.release.set()
            answer = await second
            found = answer.json()
            case = (key, step, body)
            assert (answer.status_code, found.get("code", found.get("step"))) == (
                status,
                outcome,
            ), case
            api.engine.release.set()
            assert (await first).json()["step"] == 1, case
            num_steps = 3 if outcome == 2 else 2
            assert (await api.get())["step"] == num_steps, case
