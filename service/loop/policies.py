"""The policy's versions and its alias, over HTTP."""

from pathlib import Path
from typing import Any

from service.client import ApiError, Client
from service.loop import LearningFailed

_NO_VERSION = "00000000"
"""A digest that no version has."""


def check_rights(client: Client, name: str) -> None:
    """Checks that versions can be loaded under this name, by a call that changes nothing. Raises LearningFailed."""
    try:
        client.load_policy(name, version=f"{name}@{_NO_VERSION}", alias=False)
    except ApiError as error:
        if error.status == 403:
            raise LearningFailed(
                "the API key lacks the scope admin, which loading a policy needs (PUT /policy). Set EPISODIC_API_KEY "
                f"to a key with the scopes act, read and admin. The service says: {error.detail}"
            ) from error
        if error.status != 422 or _is_about(error, "name"):
            raise LearningFailed(f"the service cannot load adapters as {name!r}: {error.detail or error}") from error


def _is_about(error: ApiError, field: str) -> bool:
    faults: list[dict[str, Any]] = error.context.get("errors") or []
    return any(field in fault.get("loc", ()) for fault in faults)


def base_of(client: Client) -> dict[str, Any]:
    """The name and the version of the base model."""
    base = next(policy for policy in client.policies() if policy.kind == "base")
    return {"name": base.name, "policy_version": base.policy_version}


def check_base(client: Client, expected: dict[str, Any]) -> None:
    """Checks that the service has the base model that the run began with. Raises LearningFailed."""
    if (served := base_of(client)) != expected:
        raise LearningFailed(
            f"the run began with the base model {_shown(expected)}, but the service has {_shown(served)}. Serve the "
            "same model, or choose another folder for --out."
        )


def _shown(base: dict[str, Any]) -> str:
    return f"{base['name']} ({base['policy_version']})"


def check_unused(client: Client, name: str) -> None:
    """Checks that nobody uses this alias. Raises LearningFailed."""
    if name in {policy.name for policy in client.policies()}:
        raise LearningFailed(
            f"the service has a policy {name!r} already. Choose another --name, or continue the run that made it with "
            "its folder as --out."
        )


def load(client: Client, name: str, adapter: Path, parent: str | None, number: int) -> dict[str, Any]:
    """Uploads an adapter as a version. The alias stays."""
    loaded = client.upload_policy(name, adapter, alias=False, parent=parent, round=number)
    return {"version": loaded.version, "policy_version": loaded.policy_version}


def decide(client: Client, name: str, version: str, evaluation: dict[str, Any], *, is_better: bool) -> None:
    """Stores the evaluation with the version, and lets the alias point to it if it is better."""
    client.load_policy(name, version=version, alias=is_better, evaluation=evaluation)
