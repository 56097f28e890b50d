"""deploy/references.py finds each kind of mistake, and reports none for correct files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import references

LABELS = {f"app.kubernetes.io/{name}": "episodic" for name in ("name", "component", "part-of")}
SELECTOR = {"app.kubernetes.io/name": "episodic"}


def thing(kind: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": "episodic", "namespace": "episodic", "labels": dict(LABELS)}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec}


POD = {
    "serviceAccountName": "episodic",
    "containers": [
        {
            "name": "episodic",
            "image": "registry:5000/episodic:1-cpu",
            "resources": {"limits": {"cpu": 2}},
            "volumeMounts": [{"name": "secrets", "mountPath": "/secrets"}],
        }
    ],
    "volumes": [{"name": "secrets", "secret": {"secretName": "episodic"}}],
}
TEMPLATE = {"metadata": {"labels": LABELS}, "spec": POD}
THINGS = {
    "namespace": thing("Namespace"),
    "account": thing("ServiceAccount"),
    "service": thing("Service", selector=SELECTOR, ports=[{"port": 8000}]),
    "deployment": thing("Deployment", selector={"matchLabels": SELECTOR}, template=TEMPLATE),
    "autoscaler": thing("HorizontalPodAutoscaler", scaleTargetRef={"name": "episodic"}),
    "route": thing("HTTPRoute", rules=[{"backendRefs": [{"name": "episodic", "port": 8000}]}]),
    "deny": thing("NetworkPolicy", podSelector={}),
}


def test_a_whole_installation_has_none() -> None:
    assert list(references.in_kubernetes(list(THINGS.values()))) == []


@pytest.mark.parametrize(
    ("which", "path", "value", "words"),
    [
        ("service", "metadata.namespace", "default", "Service episodic is not in the namespace"),
        ("service", "metadata.labels", {}, "Service episodic lacks the labels"),
        ("service", "spec.selector", {"app": "other"}, "Service episodic selects"),
        ("deny", "spec.podSelector", {"matchLabels": {"app": "other"}}, "NetworkPolicy episodic selects"),
        ("deployment", "spec.template.spec.serviceAccountName", "other", "serviceAccountName other"),
        ("deployment", "spec.template.spec.volumes", [], "the volume secrets"),
        ("deployment", "spec.template.spec.volumes.0.secret.secretName", "other", "secretName other"),
        ("deployment", "spec.template.spec.containers.0.image", "episodic:1-gpu", "runs without a GPU"),
        ("deployment", "spec.template.spec.containers.0.resources.limits", {"nvidia.com/gpu": 1}, "runs with a GPU"),
        ("deployment", "spec.strategy", {"type": "Recreate", "rollingUpdate": {"maxSurge": 0}}, "strategy is Recreate"),
        ("autoscaler", "spec.scaleTargetRef.name", "other", "scales a Deployment that does not exist"),
        ("route", "spec.rules.0.backendRefs.0.port", 80, "routes to episodic:80"),
    ],
)
def test_a_mistake_is_found(which: str, path: str, value: Any, words: str) -> None:
    things = copy.deepcopy(THINGS)
    *steps, last = path.split(".")
    place: Any = things[which]
    for step in steps:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    (found,) = references.in_kubernetes(list(things.values()))
    assert words in found


def test_a_claim_that_no_pod_uses_is_found() -> None:
    (found,) = references.in_kubernetes([*THINGS.values(), thing("PersistentVolumeClaim")])
    assert found == "no pod uses the claim episodic"


COMPOSE = {
    "services": {
        "db": {"image": "postgres", "volumes": ["db:/var/lib"], "secrets": ["password"]},
        "service": {
            "build": {"context": ".", "target": "cpu"},
            "depends_on": {"db": {"condition": "service_healthy"}},
            "volumes": ["./file:/file:ro", {"type": "volume", "source": "db", "target": "/db"}],
        },
    },
    "volumes": {"db": None},
    "secrets": {"password": {"file": "./file"}},
}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("", "", None),
        ("target: cpu", "target: gpu", "has no stage gpu"),
        ("- db:/var", "- other:/var", "other is not declared under volumes"),
        ("- password", "- other", "other is not declared under secrets"),
        ("      db:\n        condition", "      other:\n        condition", "other is not declared under services"),
        ("- ./file:", "- ./other:", "service: ./other does not exist"),
        ("file: ./file", "file: ./other", "secrets.password: ./other does not exist"),
    ],
)
def test_what_a_compose_file_names_is_there(tmp_path: Path, before: str, after: str, words: str | None) -> None:
    text = yaml.safe_dump(COMPOSE)
    assert before in text
    (tmp_path / "file").touch()
    (tmp_path / "Dockerfile").write_text("FROM scratch AS cpu\n")
    (tmp_path / "compose.yml").write_text(text.replace(before, after) if before else text)
    found = list(references.in_compose(tmp_path, ["compose.yml"]))
    assert [words in problem for problem in found] == [True] if words else found == []


def test_compose_variables_have_their_defaults_and_tags_of_merging_are_read_over() -> None:
    read = references.read_compose("a: ${SOME:-./there}/file\nb: !override [x]\nc: !reset null\nd: !override {e: 1}\n")
    assert read == {"a": "./there/file", "b": ["x"], "c": "null", "d": {"e": 1}}
