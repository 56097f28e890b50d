"""What an export must contain, so that a line that cannot be used is refused with the name of the field."""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.learning import TrainingRefused

Number = Annotated[float, Field(allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Flag = Literal[0, 1]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Parent(_Strict):
    episode_id: str
    step: Index


class _Sampling(_Strict):
    temperature: Number | None = None


class _Episode(_Strict):
    episode_id: str = ""
    status: str = ""
    stop_reason: str | None = None
    success: bool | None = None
    episode_return: Number | None = None
    parent: _Parent | None = None
    policy: str | None = None
    profile: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    metadata: dict[str, Any] | None = None
    sampling: _Sampling | None = None
    created_at: Number | None = None


class _Feedback(_Strict):
    rating: Annotated[float, Field(ge=1, le=5)]
    step: Index | None = None


class _Trajectory(_Strict):
    episode: _Episode
    feedback: list[_Feedback] | None = None


class _Support(_Strict):
    kind: Literal["ids", "all", "filtered"]
    ids: list[Index] = []


class _Segment(_Strict):
    """Exports of older versions lack the fields that have a default."""

    token_ids: list[Index]
    encoder_token_ids: Annotated[list[Index], Field(min_length=1)] | None = None
    loss_mask: list[Flag]
    logprobs: list[float | None]
    steps: list[Index]
    policy_versions: list[str | None]
    recorded_mask: list[Flag] = []
    support: list[_Support | None] | None = None
    step_starts: list[Index] | None = None
    rewards: list[Number | None] | None = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


def check_trajectory(document: Mapping[str, Any], place: str) -> None:
    """Checks everything but the segments. Raises TrainingRefused."""
    _check(_Trajectory, document, place)


def check_segment(segment: Any, place: str) -> None:
    """Raises TrainingRefused."""
    _check(_Segment, segment, place)


def _check(schema: type[BaseModel], value: Any, place: str) -> None:
    try:
        schema.model_validate(value)
    except ValidationError as error:
        raise TrainingRefused(f"{place}: {_words(error)}") from error


def _words(invalid: ValidationError) -> str:
    """Describes the first error."""
    error = invalid.errors(include_url=False)[0]
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"`{name}` is missing"
    kind = "Input should be an object" if error["type"] in ("model_type", "dict_type") else error["msg"]
    return f"{kind.replace('Input', f'`{name}`' if name else 'it', 1)}, not {reprlib.repr(error['input'])}"
