"""Starts vLLM's own OpenAI server with the environment and the engine options that the service uses for its engine.

Usage: `python -m bench.openai_server MODEL OPTIONS_JSON PORT`. The process replaces itself with the server (exec).
"""

import json
import os
import sys
from typing import Any

from service.engine.vllm import loading


def arguments(options: dict[str, Any]) -> list[str]:
    """Engine options as arguments of vLLM's command line."""
    found: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            no = [] if flag.startswith("disable-") else [f"--no-{flag}"]  # vLLM's "disable" flags have no opposite
            found += [f"--{flag}"] if value else no
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return found


def main() -> None:
    model, options, port = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    on_cpu = loading.prepare_environment(options)
    merged = {**loading.OPTIONS, **(loading.CPU_OPTIONS if on_cpu else {}), **options}
    serving = ["--host", "127.0.0.1", "--port", port, "--served-model-name", "bench", "--disable-uvicorn-access-log"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    os.execv(command[0], [*command, *serving, *arguments(merged)])  # noqa: S606


if __name__ == "__main__":
    main()
