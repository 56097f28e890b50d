"""Runs a program and samples which part of it uses the CPU: `python -m bench.sampler OUTPUT MODULE [ARGUMENT...]`.

SIGUSR1 starts the sampling. SIGUSR2 stops it and writes the counts to OUTPUT, as JSON: the number of samples of each
part in the main thread, and the CPU seconds of the main thread and of all others.

A sample is taken after each millisecond of CPU time of the process. A part is a group of modules. A sample counts for
the part of the innermost frame that belongs to one, so what a library does counts for its caller.
"""

import json
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType

_INTERVAL_S = 0.001

_PARTS: dict[str, tuple[str, ...]] = {
    "commit": ("/service/store/", "/service/sessions/commits", "/sqlalchemy/", "/sqlite3/"),
    "security": ("/service/access/", "/service/api/http/security"),
    "body": ("/service/api/http/body", "/service/validation/", "/service/api/http/schemas"),
    "answer": ("/service/api/http/serialization", "/service/api/http/json_response"),
    "metrics": ("/prometheus_client/", "/service/observability/metrics", "/vllm/v1/metrics/"),
    "logs": ("/structlog/", "/logging/__init__", "/service/observability/"),
    "prompt": ("/service/engine/prompt", "/service/engine/token", "/service/engine/template", "/transformers/"),
    "decision": ("/service/engine/decision", "/service/engine/decoder_only", "/service/agent/"),
    "engine outputs": (
        "/vllm/v1/engine/output_processor",
        "/vllm/v1/engine/logprobs",
        "/vllm/outputs",
        "/vllm/logprobs",
    ),
    "engine client": ("/service/engine/vllm/", "/vllm/", "/zmq/", "/msgspec/"),
    "session": ("/service/sessions/", "/service/lifecycle", "/service/trajectory"),
    "HTTP": ("/service/api/", "/fastapi/", "/starlette/", "/uvicorn/", "/pydantic/"),
    "event loop": ("/asyncio/", "/contextlib", "/concurrent/futures/", "/threading"),
}


class Sampler:
    """Counts samples of the main thread's stack."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._counts: Counter[str] = Counter()
        self._started = (0.0, 0.0)

    def install(self) -> None:
        signal.signal(signal.SIGUSR1, self._start)
        signal.signal(signal.SIGUSR2, self._stop)
        signal.signal(signal.SIGPROF, self._sample)

    def _start(self, *_: object) -> None:
        self._counts.clear()
        self._started = time.thread_time(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL_S, _INTERVAL_S)

    def _stop(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        main, process = time.thread_time() - self._started[0], time.process_time() - self._started[1]
        document = {"counts": self._counts, "main_s": main, "others_s": process - main}
        written = self._output.with_suffix(".part")
        written.write_text(json.dumps(document))
        written.rename(self._output)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        self._counts[_part(frame)] += 1


def _part(frame: FrameType | None) -> str:
    while frame is not None:
        file = frame.f_code.co_filename
        for part, names in _PARTS.items():
            if any(name in file for name in names):
                return part
        frame = frame.f_back
    return "other"


if __name__ == "__main__":
    Sampler(Path(sys.argv[1])).install()
    module, sys.argv = sys.argv[2], sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
