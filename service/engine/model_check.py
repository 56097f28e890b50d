"""Finds out quickly whether there is a model at `EPISODIC_MODEL`. Loading imports vLLM first, which takes seconds."""

import os
import re
from pathlib import Path
from typing import Any

import httpx

from service.engine.base import EngineRefused
from service.engine.fetch import RECIPES
from service.settings import Settings

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_CONFIGURATIONS = ("config.json", "params.json")
_CHOICES = (
    "Name an existing folder, a Hugging Face id such as Qwen/Qwen3-0.6B, or a packaged policy (toy-text, toy-t5)."
)
_HUB_S = 10.0


def check_model(settings: Settings) -> str:
    """Returns where the model comes from. Raises EngineRefused if it is certain that there is none."""
    path = Path(settings.model_path)
    if path.is_file():
        return f"the file {path}"
    if path.is_dir():
        return _check_folder(path)
    if "://" in settings.model or os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return settings.model  # vLLM loads it from another place
    if settings.model in RECIPES:
        hint = f"Run `episodic models fetch {settings.model}`, with the same EPISODIC_DATA."
        raise EngineRefused(f"EPISODIC_MODEL: the model {settings.model!r} has not been fetched. {hint}")
    if not _HUB_ID.fullmatch(settings.model):
        raise EngineRefused(f"EPISODIC_MODEL: the folder {path} does not exist. {_CHOICES}")
    return _check_hub(settings.model)


def _check_folder(path: Path) -> str:
    configuration = next((path / name for name in _CONFIGURATIONS if (path / name).is_file()), None)
    if configuration is None:
        raise EngineRefused(f"EPISODIC_MODEL: the folder {path} has no config.json. Name the folder of a model.")
    return f"the folder {path}"


def _check_hub(model: str) -> str:
    """Looks for the model in the local cache of the hub, and otherwise whether the hub can be reached."""
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    name, token = model.partition(":")[0], get_token()
    missing = f"EPISODIC_MODEL: there is no folder and no packaged policy {model!r}"
    hub: Any = constants
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in _CONFIGURATIONS):
        return f"{model}, in the local cache of the Hugging Face hub"
    if hub.HF_HUB_OFFLINE:
        raise EngineRefused(f"{missing}, the hub's local cache does not have it, and HF_HUB_OFFLINE is set. {_CHOICES}")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(f"{hub.ENDPOINT}/api/models/{name}", headers=headers, timeout=_HUB_S, follow_redirects=True)
    except httpx.TransportError as error:
        raise EngineRefused(f"{missing}, and {hub.ENDPOINT} cannot be reached ({error}). {_CHOICES}") from error
    if answer.status_code in (401, 403, 404):  # 401 for a model that does not exist, too
        private = "If it is private, set HF_TOKEN."
        raise EngineRefused(f"{missing}, and {hub.ENDPOINT} has no such model. {private} {_CHOICES}")
    return f"{model}, which the Hugging Face hub downloads"
