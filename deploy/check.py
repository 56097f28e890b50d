"""Owns `make check-deploy`: what can be told of the deployment's files without a daemon or a cluster, a line a check.

Runs on .venv-deploy, which install.py makes. A check that finds something fails, the others run all the same; one whose
tool is not to be had here says that it was not run. Exit code 1 if any failed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import yaml
from loose_ends import Object, in_compose, in_kubernetes, name_of
from one_off import job

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / "bin"
KUBERNETES = ROOT / "deploy" / "kubernetes"
PROMETHEUS = ROOT / "deploy" / "prometheus"
COMPOSE = (["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"])
OLDEST_KUBERNETES = (1, 30)
# What users put together, in an order they may name it in; each component alone is put on the replicated overlay too.
COMBINATIONS = [
    ("replicated", "gpu", "monitoring", "queue-autoscaling"),
    ("replicated", "shared-models", "model-hub", "shared-data", "gpu"),
    ("gpu", "model-hub"),
    ("gpu", "gateway", "monitoring"),
    ("cpu", "gateway", "monitoring", "model-hub"),
]
# Kinds of other programs: there is no schema of them here. Any other kind without a schema is an error.
CUSTOM = {
    "gateway.networking.k8s.io/v1 Gateway",
    "gateway.networking.k8s.io/v1 HTTPRoute",
    "gateway.envoyproxy.io/v1alpha1 BackendTrafficPolicy",
    "monitoring.coreos.com/v1 ServiceMonitor",
    "monitoring.coreos.com/v1 PrometheusRule",
}

Rendered = dict[str, list[Object]]


class Failed(Exception):
    """What a check found, over as many lines as it takes."""


class NotRun(Exception):
    """Why a check cannot be made here."""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max_workers=2) as workers:
        folder, rendered = Path(scratch), dict[str, list[Object]]()
        kustomize = result("kustomize", partial(render, folder, rendered))  # the others read what it writes
        checks: dict[str, Callable[[], str]] = {
            "checkov": partial(checkov, folder),
            "kubernetes-validate": partial(kubernetes_validate, rendered),
            "objects": partial(objects, rendered),
            "yamllint": yamllint,
            "hadolint": hadolint,
            "promtool": promtool,
            "compose": compose,
        }
        results = [kustomize, *workers.map(lambda name: result(name, checks[name]), checks)]
    sys.exit("FAILED" in results)


def result(name: str, check: Callable[[], str]) -> str:
    started = time.monotonic()
    try:
        how, said = "ok", check()
    except Failed as failed:
        how, said = "FAILED", str(failed).replace("\n", "\n    ")
    except NotRun as why:
        how, said = "not run", str(why)
    except Exception as error:  # noqa: BLE001 - a check that breaks must not keep the others from being made
        how, said = "FAILED", f"{type(error).__name__}: {error}"
    sys.stdout.write(f"{how:8}{name:21}{time.monotonic() - started:4.1f} s  {said}\n")
    sys.stdout.flush()
    return how


def render(folder: Path, rendered: Rendered) -> str:
    """Fills `rendered`, and `folder`/rendered for tools that read files: each overlay, example and combination, and the
    Job that one_off.py makes of each. The examples' secrets are made up, in a copy."""
    copy = folder / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("secrets"))
    examples = sorted(copy.glob("example*"))
    for example in examples:
        (example / "secrets").mkdir()
        for name in ("episodic_admin_key", "episodic_store"):
            (example / "secrets" / name).write_text("made up", encoding="utf-8")
    sites = {path.name: path for path in (*copy.glob("overlays/*"), *examples)}
    example = yaml.safe_load((copy / "example" / "kustomization.yaml").read_text(encoding="utf-8"))
    head = {field: example[field] for field in ("apiVersion", "kind", "namespace", "labels")}
    alone = {path.name for path in copy.glob("components/*")} - {"single"}  # the other overlays have that one
    for overlay, *components in [*COMBINATIONS, *(("replicated", name) for name in alone)]:
        site = sites["+".join((overlay, *components))] = copy / "+".join((overlay, *components))
        site.mkdir()
        parts = {
            "resources": [f"../overlays/{overlay}"],
            "components": [f"../components/{name}" for name in components],
        }
        (site / "kustomization.yaml").write_text(yaml.safe_dump({**head, **parts}), encoding="utf-8")
    (folder / "rendered").mkdir()
    problems: dict[str, str] = {}
    for name, path in sorted(sites.items()):
        ran = subprocess.run([BIN / "kubectl", "kustomize", path], check=False, capture_output=True, text=True)  # noqa: S603
        if ran.returncode != 0 or ran.stderr:
            problems[ran.stderr.strip().replace(str(copy), "deploy/kubernetes")] = name
            continue
        rendered[name] = list(yaml.safe_load_all(ran.stdout))
        (deployment,) = (thing for thing in rendered[name] if thing["kind"] == "Deployment")
        rendered[name].append(job(deployment, ["episodic", "migrate"]))
        text = yaml.safe_dump_all(rendered[name])
        (folder / "rendered" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return told(problems, f"{len(sites)} installations: overlays, examples, combinations with components")


def kubernetes_validate(rendered: Rendered) -> str:
    """Every object against the strict schema of every minor version from the oldest supported one."""
    import kubernetes_validate as schemas  # the fast tests import this module without it

    versions = [version for version in schemas.utils.all_versions() if minor(version) >= OLDEST_KUBERNETES]
    first: dict[
        str, str
    ] = {}  # where each problem is met first: overlays share most objects, versions most of a schema
    custom = set[str]()
    distinct: dict[str, tuple[str, Object]] = {}
    for site, things in rendered.items():
        for thing in things:
            distinct.setdefault(yaml.safe_dump(thing), (site, thing))
    for site, thing in distinct.values():
        if kind_of(thing) in CUSTOM:
            custom.add(kind_of(thing))
            continue
        for version in versions:
            try:
                schemas.validate(thing, version, strict=True)
            except schemas.ValidationError as error:
                place = ".".join(str(step) for step in error.path)
                first.setdefault(f"{name_of(thing)}: {place}: {error.message}", f"{site}, {version}")
            except schemas.SchemaNotFoundError:
                first.setdefault(f"{name_of(thing)}: there is no such kind: {kind_of(thing)}", f"{site}, {version}")
    span = " to ".join(version.rpartition(".")[0] for version in (versions[0], versions[-1]))
    left_out = ", ".join(sorted(kind.split()[1] for kind in custom))
    return told(first, f"{len(distinct)} objects, {span}; without a schema: {left_out}")


def objects(rendered: Rendered) -> str:
    """What a schema does not tell: that they are one namespace's, labelled, and refer to what is there."""
    first: dict[str, str] = {}
    for site, things in rendered.items():
        for problem in in_kubernetes(things):
            first.setdefault(problem, site)
    return told(first, f"{sum(map(len, rendered.values()))} in {len(rendered)} installations")


def checkov(folder: Path) -> str:
    """Policies for images and pods; deploy/checkov.yaml says which are left out, and why."""
    files = [str(there(ROOT / "Dockerfile")), *map(str, sorted((folder / "rendered").glob("*.yaml")))]
    config = ROOT / "deploy" / "checkov.yaml"
    said = run(str(BIN / "checkov"), "--config-file", str(config), "--file", *files)
    passed = re.findall(r"Passed checks: (\d+)", said)
    return f"{sum(map(int, passed))} policies hold, {len(yaml.safe_load(config.read_text())['skip-check'])} left out"


def yamllint() -> str:
    files = [*ROOT.glob("*.yml"), *ROOT.glob(".*.yaml"), ROOT / "deploy"]
    run(str(BIN / "yamllint"), "--strict", *map(str, files))
    return f"{len(files) - 1} files at the top, and deploy/"


def hadolint() -> str:
    run(str(BIN / "hadolint"), "--no-color", str(there(ROOT / "Dockerfile")))
    return "Dockerfile"


def promtool() -> str:
    """Rules, their unit tests and the configuration, by Prometheus's own tool."""
    rules, tests, config = (str(there(PROMETHEUS / name)) for name in ("rules.yml", "rules_test.yml", "prometheus.yml"))
    from promtools import Missing, program

    try:
        tool = str(program("promtool"))
    except Missing as why:
        raise NotRun(str(why)) from why
    said = run(tool, "check", "rules", rules)
    run(tool, "test", "rules", tests)
    run(tool, "check", "config", "--syntax-only", config)  # the files it names are where it is deployed
    found = re.search(r"(\d+) rules found", said)
    return f"{found[1] if found else 'no'} rules, their tests, prometheus.yml"


def compose() -> str:
    """By Compose itself where it is installed; else what it would look up is looked up here."""
    for files in COMPOSE:
        for name in files:
            there(ROOT / name)
    if has_compose():
        for files in COMPOSE:
            run("docker", "compose", *(word for name in files for word in ("--file", name)), "config", "--quiet")
        return "read by docker compose config"
    problems = {problem: files[-1] for files in COMPOSE for problem in in_compose(ROOT, files)}
    return told(problems, "names and files are there; Compose is not here to read them itself")


def has_compose() -> bool:
    """Whether docker is here and knows Compose, which is a plugin of it."""
    version = ["docker", "compose", "version"]
    return bool(shutil.which("docker")) and subprocess.run(version, check=False, capture_output=True).returncode == 0  # noqa: S603


def told(problems: dict[str, str], summary: str) -> str:
    """The summary if there are no problems. Raises Failed with each, and where it was met."""
    if problems:
        raise Failed("\n".join(f"{problem} ({where})" for problem, where in problems.items()))
    return summary


def run(*command: str) -> str:
    """Runs a tool and returns what it printed. Raises Failed with that."""
    ran = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)  # noqa: S603
    if ran.returncode != 0:
        raise Failed("\n".join(line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()))
    return ran.stdout + ran.stderr


def there(path: Path) -> Path:
    if not path.exists():
        raise Failed(f"there is no {path.relative_to(ROOT)}")
    return path


def minor(version: str) -> tuple[int, int]:
    major, minor_version = version.split(".")[:2]
    return int(major), int(minor_version)


def kind_of(thing: Object) -> str:
    return f"{thing['apiVersion']} {thing['kind']}"


if __name__ == "__main__":
    main()
