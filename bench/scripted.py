"""A service with the scripted engine, which costs next to nothing: what remains is the cost of the API itself."""

import sys
from typing import Any

import uvicorn
from transformers import AutoTokenizer

from service.api.http import server
from service.app import create_app
from service.cli.serve import tune_garbage_collector
from service.engine.tokenizer import HFTokenizer
from service.observability import logs
from service.settings import Settings
from service.testing.scripted_engine import ScriptedEngine


def main() -> None:
    """Serves with the tokenizer of the model, on a port, with its data in a folder: MODEL PORT FOLDER."""
    model, port, folder = sys.argv[1:]
    logs.configure("console", "info")
    given: dict[str, Any] = {"port": port, "data": folder}
    settings = Settings(**given)
    tokenizer: Any = AutoTokenizer
    engine = ScriptedEngine(HFTokenizer(tokenizer.from_pretrained(model)), max_model_len=1 << 20)
    uvicorn.Server(
        server.config(create_app(settings, engine=engine, on_ready=tune_garbage_collector), port=settings.port)
    ).run()


if __name__ == "__main__":
    main()
