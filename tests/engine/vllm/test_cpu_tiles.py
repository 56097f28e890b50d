"""Uses the CPU's matrix tiles only with permission."""

from typing import Any

import pytest
import torch

from service.engine.vllm import cpu_tiles


@pytest.mark.parametrize("permitted", [True, False])
def test_vllm_uses_the_tiles_only_with_permission(monkeypatch: pytest.MonkeyPatch, permitted: bool) -> None:
    features: Any = torch.cpu
    monkeypatch.setattr(features, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(features, "_init_amx", lambda: permitted)

    cpu_tiles.install()

    assert features._is_amx_tile_supported() is permitted
