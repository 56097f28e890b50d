"""Shared by all tests: the path and the tokenizer of the packaged policy, and an environment without settings."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import service
from service.engine.tokenizer import HFTokenizer

pytest_plugins = ["tests.support.databases"]

settings.register_profile("episodic", deadline=None)  # a test asserts no time
settings.load_profile("episodic")

SHARE_A_SERVER = {
    **dict.fromkeys(("agent_and_caller", "api_guide", "crash", "episodes", "faults", "openai", "readme"), "server"),
    **dict.fromkeys(("reasoning", "supports"), "thinker"),
}
"""Files of tests/e2e that use the same server, and the name of its fixture. One process runs them all."""

IN_CI = bool(os.environ.get("CI"))

POLICY = Path(service.__file__).parent / "packaged" / "policies" / "toy-text"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distributes files like --dist loadfile. Files that share a server are distributed together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            name = file.removeprefix("tests/e2e/test_").removesuffix(".py")
            return SHARE_A_SERVER.get(name, file)

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """In CI a skipped test fails: CI has everything that the tests need, and a silent skip would test nothing."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"This test must not be skipped in CI: {report.longrepr[-1]}"
    return report


@pytest.fixture(scope="session")
def hf_tokenizer() -> Any:
    """The packaged policy's Hugging Face tokenizer. A test that changes its chat template must load its own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="session")
def tokenizer(hf_tokenizer: Any) -> HFTokenizer:
    return HFTokenizer(hf_tokenizer)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the EPISODIC_* variables of the environment that the tests run in."""
    for name in [name for name in os.environ if name.startswith("EPISODIC_")]:
        monkeypatch.delenv(name)
