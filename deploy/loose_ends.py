"""Owns what no schema tells of the deployment's files: objects that belong to nothing, names of what is not there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

BY_REFERENCE = {"episodic", "episodic-metrics", "episodic-tls"}  # Secrets that the operator makes
LABELS = {f"app.kubernetes.io/{name}" for name in ("name", "component", "part-of")}

Object = dict[str, Any]
ByKind = dict[str, dict[str, Object]]


def in_kubernetes(things: list[Object]) -> Iterator[str]:
    """Yields what is wrong among the objects of one installation."""
    by_kind: ByKind = {}
    for thing in things:
        by_kind.setdefault(thing["kind"], {})[thing["metadata"]["name"]] = thing
    for thing in things:
        yield from astray(thing, by_kind)
    for deployment in by_kind["Deployment"].values():
        yield from unmet(deployment["spec"]["template"]["spec"], by_kind)
        yield from ill_matched(deployment["spec"])
    yield from led_nowhere(by_kind)


def astray(thing: Object, by_kind: ByKind) -> Iterator[str]:
    """All are in the one namespace and labelled, and what they select are the service's pods."""
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
        yield f"{name_of(thing)} selects {selected}, which the pods are not"


def unmet(pod: Object, by_kind: ByKind) -> Iterator[str]:
    """What a pod names is there, and what is there it uses."""
    there = {
        "secretName": BY_REFERENCE | by_kind.get("Secret", {}).keys(),
        "claimName": set(by_kind.get("PersistentVolumeClaim", {})),
        "serviceAccountName": set(by_kind["ServiceAccount"]),
    }
    for field, names in there.items():
        for named in sorted(set(values(pod, field)) - names):
            yield f"the pods name {field} {named}, which is not there"
    for unused in sorted(there["claimName"] - set(values(pod, "claimName"))):
        yield f"no pod uses the claim {unused}"
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    for odd in sorted(mounted ^ {volume["name"] for volume in pod["volumes"]}):
        yield f"the volume {odd} is not mounted, or mounted and not there"


def ill_matched(spec: Object) -> Iterator[str]:
    """Pods that ask for a GPU run the image for one, and no others do; a Deployment that recreates rolls nothing."""
    for container in spec["template"]["spec"]["containers"]:
        asks = "nvidia.com/gpu" in container.get("resources", {}).get("limits", {})
        if asks != ("gpu" in container["image"].rpartition(":")[2]):
            yield f"the image {container['image']} runs with{'' if asks else 'out'} a GPU"
    strategy = spec.get("strategy", {})
    if strategy.get("type") == "Recreate" and "rollingUpdate" in strategy:
        yield "the strategy is Recreate and has rollingUpdate, which the API server refuses"


def led_nowhere(by_kind: ByKind) -> Iterator[str]:
    """Autoscalers and routes have their ends here."""
    for autoscaler in by_kind.get("HorizontalPodAutoscaler", {}).values():
        if autoscaler["spec"]["scaleTargetRef"]["name"] not in by_kind["Deployment"]:
            yield f"{name_of(autoscaler)} scales what is not there"
    ends = {(name, port["port"]) for name, service in by_kind["Service"].items() for port in service["spec"]["ports"]}
    for route in by_kind.get("HTTPRoute", {}).values():
        for backend in (backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]):
            if (backend["name"], backend["port"]) not in ends:
                yield f"{name_of(route)} leads to {backend['name']}:{backend['port']}, which is not there"


def in_compose(root: Path, files: list[str]) -> Iterator[str]:
    """Yields what compose files, read together, name that is not there."""
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
    """Takes !override and !reset, which say how files are merged, for what stands behind them."""


def untagged(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


ComposeLoader.add_multi_constructor("!", untagged)


def read_compose(text: str) -> Object:
    """With every ${NAME:-default} as its default."""
    plain = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    return yaml.load(plain, ComposeLoader)  # noqa: S506 - a safe loader


def missing_for(root: Path, name: str, service: Object, declared: dict[str, set[str]]) -> Iterator[str]:
    """Yields what one service of a compose file names that is not there."""
    for key, named in references(service).items():
        for unknown in sorted(named - declared[key]):
            yield f"{name}: there is no {unknown} under {key}"
    for source in map(source_of, service.get("volumes") or []):
        if source.startswith("."):
            yield from missing_file(root, name, source)
    if "build" in service:
        yield from missing_stage(root, name, service["build"])


def references(service: Object) -> dict[str, set[str]]:
    """What a service of a compose file names of the file's other parts."""
    mounts = set(map(source_of, service.get("volumes") or []))
    return {
        "services": set(service.get("depends_on") or ()),
        "networks": set(service.get("networks") or ()),
        "secrets": set(map(source_of, service.get("secrets") or ())),
        "configs": set(map(source_of, service.get("configs") or ())),
        "volumes": {source for source in mounts if source and not source.startswith((".", "/"))},
    }


def source_of(item: str | Object) -> str:
    """What a mount, secret or config of a service comes from; "" for a volume without a name."""
    return str(item.get("source", "")) if isinstance(item, dict) else item.partition(":")[0]


def missing_file(root: Path, what: str, path: str) -> Iterator[str]:
    """Whoever deploys makes the secrets, so git does not have them: what it ignores need not be there."""
    ignored = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=root, check=False).returncode == 0  # noqa: S603, S607
    if not ignored and not (root / path).exists():
        yield f"{what}: there is no {path}"


def missing_stage(root: Path, what: str, build: str | Object) -> Iterator[str]:
    given = build if isinstance(build, dict) else {"context": build}
    dockerfile = root / given.get("context", ".") / given.get("dockerfile", "Dockerfile")
    if not dockerfile.exists():
        yield f"{what}: there is no {dockerfile.name} in {given.get('context', '.')}"
    elif "target" in given:
        stages = re.findall(r"^FROM .* AS (\S+)$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE | re.IGNORECASE)
        if given["target"] not in stages:
            yield f"{what}: {dockerfile.name} has no stage {given['target']}"


def name_of(thing: Object) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


def values(document: Any, field: str) -> Iterator[str]:
    """Every value of a field, however deep."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == field:
                yield value
            else:
                yield from values(value, field)
    elif isinstance(document, list):
        for item in document:
            yield from values(item, field)
