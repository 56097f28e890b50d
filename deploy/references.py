"""Checks references in the Kubernetes objects and the compose files: everything that they name must exist."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

BY_REFERENCE = {"episodic", "episodic-metrics", "episodic-tls"}  # Secrets that the administrator creates
LABELS = {f"app.kubernetes.io/{name}" for name in ("name", "component", "part-of")}

Object = dict[str, Any]
ByKind = dict[str, dict[str, Object]]


def in_kubernetes(things: list[Object]) -> Iterator[str]:
    """Yields a message for each problem in the objects of one installation."""
    by_kind: ByKind = {}
    for thing in things:
        by_kind.setdefault(thing["kind"], {})[thing["metadata"]["name"]] = thing
    for thing in things:
        yield from metadata_problems(thing, by_kind)
    for deployment in by_kind["Deployment"].values():
        yield from pod_problems(deployment["spec"]["template"]["spec"], by_kind)
        yield from spec_problems(deployment["spec"])
    yield from target_problems(by_kind)


def metadata_problems(thing: Object, by_kind: ByKind) -> Iterator[str]:
    """Checks that the object is in the namespace, has the labels, and selects the service's pods if it selects any."""
    (namespace,) = by_kind["Namespace"]
    (deployment,) = by_kind["Deployment"].values()
    pod_labels = deployment["spec"]["template"]["metadata"]["labels"]
    if thing["kind"] != "Namespace" and thing["metadata"].get("namespace") != namespace:
        yield f"{name_of(thing)} is not in the namespace {namespace}"
    if missing := LABELS - thing["metadata"].get("labels", {}).keys():
        yield f"{name_of(thing)} lacks the labels {', '.join(sorted(missing))}"
    spec = thing.get("spec", {})
    selector = spec.get("podSelector") or spec.get("selector") or {}
    selected = selector if thing["kind"] == "Service" else selector.get("matchLabels", {})
    if not selected.items() <= pod_labels.items():
        yield f"{name_of(thing)} selects {selected}, but the service's pods have no such labels"


def pod_problems(pod: Object, by_kind: ByKind) -> Iterator[str]:
    """Checks that all that a pod refers to exists, and that it uses every claim and volume."""
    existing = {
        "secretName": BY_REFERENCE | by_kind.get("Secret", {}).keys(),
        "claimName": set(by_kind.get("PersistentVolumeClaim", {})),
        "serviceAccountName": set(by_kind["ServiceAccount"]),
    }
    for field, names in existing.items():
        for named in sorted(set(values(pod, field)) - names):
            yield f"the pods refer to {field} {named}, which does not exist"
    for unused in sorted(existing["claimName"] - set(values(pod, "claimName"))):
        yield f"no pod uses the claim {unused}"
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    for odd in sorted(mounted ^ {volume["name"] for volume in pod["volumes"]}):
        yield f"the volume {odd} is declared but not mounted, or mounted but not declared"


def spec_problems(spec: Object) -> Iterator[str]:
    """Checks that a Deployment's GPU requests match its image, and that its strategy is consistent."""
    for container in spec["template"]["spec"]["containers"]:
        asks = "nvidia.com/gpu" in container.get("resources", {}).get("limits", {})
        if asks != ("gpu" in container["image"].rpartition(":")[2]):
            yield f"the image {container['image']} runs with{'' if asks else 'out'} a GPU"
    strategy = spec.get("strategy", {})
    if strategy.get("type") == "Recreate" and "rollingUpdate" in strategy:
        yield "the strategy is Recreate and has rollingUpdate, which the API server rejects"


def target_problems(by_kind: ByKind) -> Iterator[str]:
    """Checks that the targets of autoscalers and routes exist."""
    for autoscaler in by_kind.get("HorizontalPodAutoscaler", {}).values():
        if autoscaler["spec"]["scaleTargetRef"]["name"] not in by_kind["Deployment"]:
            yield f"{name_of(autoscaler)} scales a Deployment that does not exist"
    targets = {
        (name, port["port"]) for name, service in by_kind["Service"].items() for port in service["spec"]["ports"]
    }
    for route in by_kind.get("HTTPRoute", {}).values():
        for backend in (backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]):
            if (backend["name"], backend["port"]) not in targets:
                yield f"{name_of(route)} routes to {backend['name']}:{backend['port']}, which does not exist"


def in_compose(root: Path, files: list[str]) -> Iterator[str]:
    """Yields a message for each reference in the merged compose files to something that does not exist."""
    documents = [read_compose((root / name).read_text(encoding="utf-8")) for name in files]
    keys = ("services", "volumes", "secrets", "configs", "networks")
    declared = {key: {name for document in documents for name in document.get(key) or {}} for key in keys}
    for document in documents:
        for key in ("secrets", "configs"):
            for name, thing in (document.get(key) or {}).items():
                yield from missing_file(root, f"{key}.{name}", thing.get("file", "."))
        for name, service in document["services"].items():
            yield from missing_for(root, name, service, declared)


class ComposeLoader(yaml.SafeLoader):
    """Ignores the tags !override and !reset, which say how Compose merges files, and keeps their values."""


def untagged(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


ComposeLoader.add_multi_constructor("!", untagged)


def read_compose(text: str) -> Object:
    """Parses a compose file. Every ${NAME:-default} becomes its default."""
    plain = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    return yaml.load(plain, ComposeLoader)  # noqa: S506 - a safe loader


def missing_for(root: Path, name: str, service: Object, declared: dict[str, set[str]]) -> Iterator[str]:
    """Yields a message for each reference of one service to something that does not exist."""
    for key, named in references(service).items():
        for unknown in sorted(named - declared[key]):
            yield f"{name}: {unknown} is not declared under {key}"
    for source in map(source_of, service.get("volumes") or []):
        if source.startswith("."):
            yield from missing_file(root, name, source)
    if "build" in service:
        yield from missing_stage(root, name, service["build"])


def references(service: Object) -> dict[str, set[str]]:
    """Returns the names that a service refers to in the other sections of the compose files, by section."""
    mounts = set(map(source_of, service.get("volumes") or []))
    return {
        "services": set(service.get("depends_on") or ()),
        "networks": set(service.get("networks") or ()),
        "secrets": set(map(source_of, service.get("secrets") or ())),
        "configs": set(map(source_of, service.get("configs") or ())),
        "volumes": {source for source in mounts if source and not source.startswith((".", "/"))},
    }


def source_of(item: str | Object) -> str:
    """Returns the source of a mount, secret or config of a service; "" for an anonymous volume."""
    return str(item.get("source", "")) if isinstance(item, dict) else item.partition(":")[0]


def missing_file(root: Path, what: str, path: str) -> Iterator[str]:
    """Yields a message if a file does not exist. Files that git ignores (the secrets) may be missing."""
    ignored = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=root, check=False).returncode == 0  # noqa: S603, S607
    if not ignored and not (root / path).exists():
        yield f"{what}: {path} does not exist"


def missing_stage(root: Path, what: str, build: str | Object) -> Iterator[str]:
    """Yields a message if the Dockerfile or its stage does not exist."""
    given = build if isinstance(build, dict) else {"context": build}
    dockerfile = root / given.get("context", ".") / given.get("dockerfile", "Dockerfile")
    if not dockerfile.exists():
        yield f"{what}: {dockerfile.name} does not exist in {given.get('context', '.')}"
    elif "target" in given:
        stages = re.findall(r"^FROM .* AS (\S+)$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE | re.IGNORECASE)
        if given["target"] not in stages:
            yield f"{what}: {dockerfile.name} has no stage {given['target']}"


def name_of(thing: Object) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


def values(document: Any, field: str) -> Iterator[str]:
    """Yields every value of a field, at any depth."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == field:
                yield value
            else:
                yield from values(value, field)
    elif isinstance(document, list):
        for item in document:
            yield from values(item, field)
