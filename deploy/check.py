"""`make check-deploy`: checks the deployment's files without a Docker daemon or a cluster.

Runs in .venv-deploy, which install.py creates. Each check prints one line: `ok`, `FAILED` with what it found, or
`not run` if its tool is not available. All checks run, even if one fails. Exit code 1 if any failed.
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
from one_off import job
from references import Object, in_compose, in_kubernetes, name_of

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / "bin"
KUBERNETES = ROOT / "deploy" / "kubernetes"
PROMETHEUS = ROOT / "deploy" / "prometheus"
COMPOSE = (["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"])
OLDEST_KUBERNETES = (1, 30)
# Overlays with components, as users may combine and order them. Also, each single component is tried on `replicated`.
COMBINATIONS = [
    ("replicated", "gpu", "monitoring", "queue-autoscaling"),
    ("replicated", "shared-models", "model-hub", "shared-data", "gpu"),
    ("gpu", "model-hub"),
    ("gpu", "gateway", "monitoring"),
    ("cpu", "gateway", "monitoring", "model-hub"),
]
# Kinds that other programs define, without a schema here. Any other kind without a schema is an error.
CUSTOM = {
    "gateway.networking.k8s.io/v1 Gateway",
    "gateway.networking.k8s.io/v1 HTTPRoute",
    "gateway.envoyproxy.io/v1alpha1 BackendTrafficPolicy",
    "monitoring.coreos.com/v1 ServiceMonitor",
    "monitoring.coreos.com/v1 PrometheusRule",
}

Rendered = dict[str, list[Object]]


class Failed(Exception):
    """A check failed. The message has one line for each problem."""


class NotRun(Exception):
    """A check cannot run here. The message says why."""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max_workers=2) as workers:
        folder, rendered = Path(scratch), dict[str, list[Object]]()
        kustomize = result("kustomize", partial(render, folder, rendered))  # runs first: the others read its output
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
    """Runs a check and prints its result. Returns "ok", "FAILED" or "not run"."""
    started = time.monotonic()
    try:
        status, message = "ok", check()
    except Failed as failed:
        status, message = "FAILED", str(failed).replace("\n", "\n    ")
    except NotRun as reason:
        status, message = "not run", str(reason)
    except Exception as error:  # noqa: BLE001 - the other checks run even if this one crashes
        status, message = "FAILED", f"{type(error).__name__}: {error}"
    sys.stdout.write(f"{status:8}{name:21}{time.monotonic() - started:4.1f} s  {message}\n")
    sys.stdout.flush()
    return status


def render(folder: Path, rendered: Rendered) -> str:
    """Renders each overlay, example and combination with kustomize, and adds the Job that one_off.py makes of each.

    The objects go into `rendered` and, for tools that read files, into `folder`/rendered. The examples are rendered in
    a copy, with placeholder secrets.
    """
    copy = folder / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("secrets"))
    examples = sorted(copy.glob("example*"))
    for example in examples:
        (example / "secrets").mkdir()
        for name in ("episodic_admin_key", "episodic_store"):
            (example / "secrets" / name).write_text("placeholder", encoding="utf-8")
    sites = {path.name: path for path in (*copy.glob("overlays/*"), *examples)}
    example = yaml.safe_load((copy / "example" / "kustomization.yaml").read_text(encoding="utf-8"))
    head = {field: example[field] for field in ("apiVersion", "kind", "namespace", "labels")}
    alone = {path.name for path in copy.glob("components/*")} - {"single"}  # overlays/cpu and overlays/gpu include it
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
    return fail_on(problems, f"{len(sites)} installations: overlays, examples, combinations with components")


def kubernetes_validate(rendered: Rendered) -> str:
    """Validates every object with the strict schema of every Kubernetes version, from the oldest supported one."""
    import kubernetes_validate as schemas  # if this import fails, the other checks still run

    versions = [version for version in schemas.utils.all_versions() if minor(version) >= OLDEST_KUBERNETES]
    # Each problem is reported once, because overlays share most objects and versions share most of a schema.
    first: dict[str, str] = {}
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
                first.setdefault(f"{name_of(thing)}: unknown kind {kind_of(thing)}", f"{site}, {version}")
    span = " to ".join(version.rpartition(".")[0] for version in (versions[0], versions[-1]))
    left_out = ", ".join(sorted(kind.split()[1] for kind in custom))
    return fail_on(first, f"{len(distinct)} objects, {span}; without a schema: {left_out}")


def objects(rendered: Rendered) -> str:
    """Checks what no schema covers: namespaces, labels, and references to objects that exist."""
    first: dict[str, str] = {}
    for site, things in rendered.items():
        for problem in in_kubernetes(things):
            first.setdefault(problem, site)
    return fail_on(first, f"{sum(map(len, rendered.values()))} objects in {len(rendered)} installations")


def checkov(folder: Path) -> str:
    """Checks security policies for images and pods. deploy/checkov.yaml lists the skipped ones, with reasons."""
    files = [str(existing(ROOT / "Dockerfile")), *map(str, sorted((folder / "rendered").glob("*.yaml")))]
    config = ROOT / "deploy" / "checkov.yaml"
    output = run(str(BIN / "checkov"), "--config-file", str(config), "--file", *files)
    passed = re.findall(r"Passed checks: (\d+)", output)
    return f"{sum(map(int, passed))} checks passed, {len(yaml.safe_load(config.read_text())['skip-check'])} skipped"


def yamllint() -> str:
    files = [*ROOT.glob("*.yml"), *ROOT.glob(".*.yaml"), ROOT / "deploy"]
    run(str(BIN / "yamllint"), "--strict", *map(str, files))
    return f"{len(files) - 1} files in the root folder, and deploy/"


def hadolint() -> str:
    run(str(BIN / "hadolint"), "--no-color", str(existing(ROOT / "Dockerfile")))
    return "Dockerfile"


def promtool() -> str:
    """Checks the rules and the configuration of Prometheus, and runs the unit tests of the rules."""
    rules, tests, config = (
        str(existing(PROMETHEUS / name)) for name in ("rules.yml", "rules_test.yml", "prometheus.yml")
    )
    from promtools import Missing, program

    try:
        tool = str(program("promtool"))
    except Missing as reason:
        raise NotRun(str(reason)) from reason
    output = run(tool, "check", "rules", rules)
    run(tool, "test", "rules", tests)
    run(tool, "check", "config", "--syntax-only", config)  # the files that it refers to exist only where it is deployed
    found = re.search(r"(\d+) rules found", output)
    return f"{found[1] if found else 'no'} rules, their tests, prometheus.yml"


def compose() -> str:
    """Checks the compose files with Compose if it is installed. Otherwise checks that all references resolve."""
    for files in COMPOSE:
        for name in files:
            existing(ROOT / name)
    if has_compose():
        for files in COMPOSE:
            run("docker", "compose", *(word for name in files for word in ("--file", name)), "config", "--quiet")
        return "checked by docker compose config"
    problems = {problem: files[-1] for files in COMPOSE for problem in in_compose(ROOT, files)}
    return fail_on(problems, "all referenced names and files exist; not checked by Compose, which is not installed")


def has_compose() -> bool:
    """Whether docker and its plugin Compose are installed."""
    version = ["docker", "compose", "version"]
    return bool(shutil.which("docker")) and subprocess.run(version, check=False, capture_output=True).returncode == 0  # noqa: S603


def fail_on(problems: dict[str, str], summary: str) -> str:
    """Returns the summary if there are no problems. Otherwise raises Failed with each problem and where it occurs."""
    if problems:
        raise Failed("\n".join(f"{problem} ({where})" for problem, where in problems.items()))
    return summary


def run(*command: str) -> str:
    """Runs a tool and returns its output. Raises Failed with the output if the tool fails."""
    ran = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)  # noqa: S603
    if ran.returncode != 0:
        raise Failed("\n".join(line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()))
    return ran.stdout + ran.stderr


def existing(path: Path) -> Path:
    """Returns the path. Raises Failed if it does not exist."""
    if not path.exists():
        raise Failed(f"{path.relative_to(ROOT)} does not exist")
    return path


def minor(version: str) -> tuple[int, int]:
    major, minor_version = version.split(".")[:2]
    return int(major), int(minor_version)


def kind_of(thing: Object) -> str:
    return f"{thing['apiVersion']} {thing['kind']}"


if __name__ == "__main__":
    main()
