"""Says what is wrong with settings: one line for each fault, which names the variable and says what is expected."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from service.settings import Quota, Settings, given_names

_OTHERS = ("EPISODIC_URL", "EPISODIC_API_KEY", "EPISODIC_TAG", "EPISODIC_MEMORY")
"""Variables that are no settings of the service: of the commands that call it, and of docker-compose.yml."""


def variable(*loc: Any) -> str:
    """The variable of a setting: EPISODIC_QUOTA__CALLS_PER_S for `quota`, `calls_per_s`."""
    return "EPISODIC_" + "__".join(str(part).upper() for part in loc)


def faults(error: Exception) -> list[str]:
    """The lines for an exception that `Settings(...)` raised."""
    if isinstance(error, ValidationError):
        return [_fault(fault) for fault in error.errors(include_url=False)]
    field = re.search(r'parsing value for field "(\w+)"', str(error))
    if isinstance(error, SettingsError) and field:
        return [f'{variable(field[1])}: the value should be JSON, for example {{"name": "value"}}']
    if isinstance(error, OSError):
        return [f"EPISODIC_SECRETS: {error.filename}: {error.strerror}"]
    return [str(error)]


def unknown(settings: Settings) -> list[tuple[str, str | None]]:
    """EPISODIC_* variables and secret files that are no settings, each with the setting that was probably meant."""
    return [(name, _meant(name.upper())) for name in given_names(settings) if not _is_known(name.upper())]


def _fault(fault: Any) -> str:
    loc: tuple[Any, ...] = fault["loc"]
    if fault["type"] != "extra_forbidden":
        text = (
            str(fault["msg"]).removeprefix("Value error, ").replace("Input", "the value").replace("String", "the value")
        )
        return f"{variable(*loc)}: {text}"
    is_key_of_file = len(loc) == 1  # an unknown variable is not read
    near = _nearest(loc[-1], Settings.model_fields if is_key_of_file else Quota.model_fields)
    hint = f"did you mean {near!r}?" if near else "`episodic settings` lists the settings"
    return f"{'EPISODIC_CONFIG' if is_key_of_file else variable(*loc)}: there is no setting {loc[-1]!r}; {hint}"


def _is_known(name: str) -> bool:
    first, *nested = name.removeprefix("EPISODIC_").lower().split("__")
    return name in _OTHERS or (first in Settings.model_fields and (not nested or first in _groups()))


def _groups() -> list[str]:
    """The settings that have named parts, such as EPISODIC_ENGINE__MAX_NUM_SEQS."""
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}
    return [name for name, default in defaults.items() if isinstance(default, dict | BaseModel)]


def _meant(name: str) -> str | None:
    first, *nested = name.removeprefix("EPISODIC_").lower().split("__")
    # One underscore in place of two: EPISODIC_ENGINE_MAX_NUM_SEQS.
    split = [f"{group}__{first.removeprefix(group + '_')}" for group in _groups() if first.startswith(f"{group}_")]
    others = [other.removeprefix("EPISODIC_").lower() for other in _OTHERS]
    near = _nearest(first, [*Settings.model_fields, *others, *split])
    if near is None:
        return None
    return variable(near, *nested) if near in _groups() else variable(near)


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(get_close_matches(name, list(known), n=1)), None)
