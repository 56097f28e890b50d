"""Makes classes of immutable values."""

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def immutable(cls: type[_T]) -> type[_T]:
    """Makes a dataclass of immutable values: the type checker refuses assignments to its fields.

    They are not refused at run time, because a frozen dataclass takes three times as long to construct, and each act
    makes a dozen values.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
