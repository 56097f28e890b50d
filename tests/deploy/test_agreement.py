"""The Dockerfile, the compose files and deploy/ are consistent with the service and with each other."""

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY
from pydantic import ValidationError

from deploy import one_off, prometheus_rule, references
from service.access.keys import new_key
from service.api.http.shutdown import FINAL_RESPONSES_S
from service.app import create_app
from service.client import calls
from service.engine.vllm.loading import CPU_OPTIONS
from service.observability import metrics
from service.settings import Settings
from service.testing.memory_store import MemoryStore

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"
PROMETHEUS = DEPLOY / "prometheus"
NOT_SETTINGS = {
    *("EPISODIC_API_KEY", "EPISODIC_URL"),  # read by the commands that call a service
    *("EPISODIC_TAG", "EPISODIC_MEMORY"),  # read by the compose files only
}
NESTED = {"engine", "openai", "quota", "tenants"}
LAST_S = 2 * FINAL_RESPONSES_S  # first the server waits for the last answers, then uvicorn does
CLOSE_S = 10  # vLLM waits 5 s for its process to end, and then kills it


def documents(*folders: Path) -> list[dict[str, Any]]:
    """Returns all YAML documents in these folders and their subfolders."""
    files = [path for folder in folders for path in sorted(folder.rglob("*.yaml"))]
    return [document for path in files for document in yaml.safe_load_all(path.read_text()) if document]


def one(kind: str, folder: Path = KUBERNETES / "base") -> dict[str, Any]:
    """Returns the only object of this kind in the folder."""
    (found,) = [document for document in documents(folder) if document["kind"] == kind]
    return found


def container_of(deployment: dict[str, Any]) -> dict[str, Any]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


def environment_of(container: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in container["env"]}


BASE = one("Deployment")
POD = BASE["spec"]["template"]["spec"]
CONTAINER = container_of(BASE)
GPU = one("Deployment", KUBERNETES / "components" / "gpu")


def compose_service() -> dict[str, Any]:
    return references.read_compose(COMPOSE.read_text())["services"]["service"]


def texts() -> list[Path]:
    """Returns all deployment files."""
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sorted([DOCKERFILE, *ROOT.glob("docker-compose*.yml"), *files])


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_variable_is_a_setting(path: Path) -> None:
    for name in set(re.findall(r"\bEPISODIC_[A-Z0-9_]+", path.read_text())) - NOT_SETTINGS:
        setting, nested, _ = name.removeprefix("EPISODIC_").lower().partition("__")
        assert setting in Settings.model_fields, name
        assert not nested or setting in NESTED, name


def test_what_is_probed_is_in_the_openapi_document() -> None:
    probed = {CONTAINER[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    monitor = one("ServiceMonitor", KUBERNETES / "components" / "monitoring")
    probed |= {endpoint["path"] for endpoint in monitor["spec"]["endpoints"]}
    probed |= set(re.findall(r"/(?:readyz|healthz)\b", DOCKERFILE.read_text()))
    assert probed == {"/healthz", "/readyz", "/metrics"}
    assert probed <= create_app(Settings(), store=MemoryStore()).openapi()["paths"].keys()


def test_grace_period_covers_the_shutdown() -> None:
    drain_s = float(environment_of(CONTAINER)["EPISODIC_DRAIN_S"])
    pre_stop_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > pre_stop_s + drain_s + LAST_S + CLOSE_S


def test_a_container_of_compose_has_time_to_end() -> None:
    service = compose_service()
    drain_s = float(service.get("environment", {}).get("EPISODIC_DRAIN_S", Settings().drain_s))
    grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > drain_s + LAST_S


@pytest.mark.parametrize("patch", [BASE, GPU], ids=["cpu", "gpu"])
def test_a_rollout_waits_as_long_as_a_model_may_load(patch: dict[str, Any]) -> None:
    probe = {**CONTAINER["startupProbe"], **container_of(patch)["startupProbe"]}
    load_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert patch["spec"]["progressDeadlineSeconds"] >= 1.5 * load_s  # leaves time to pull the image first


def test_ports_agree() -> None:
    service = one("Service")
    routes = documents(KUBERNETES / "components" / "gateway")
    ports = {port["port"] for port in service["spec"]["ports"]}
    ports |= {port["containerPort"] for port in CONTAINER["ports"]}
    ports |= {
        port["port"]
        for policy in documents(KUBERNETES)
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"].get("ingress", [])
        for port in rule["ports"]
    }
    ports |= {
        backend["port"]
        for route in routes
        if route["kind"] == "HTTPRoute"
        for rule in route["spec"]["rules"]
        for backend in rule["backendRefs"]
    }
    assert ports == {Settings().port}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {port["name"] for port in CONTAINER["ports"]}


def test_the_images_port_user_and_volumes_are_those_of_the_pods() -> None:
    dockerfile = DOCKERFILE.read_text()
    assert set(re.findall(r"^EXPOSE (\d+)", dockerfile, re.MULTILINE)) == {str(Settings().port)}
    served_as = [user for user in re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE) if user != "0"]
    assert set(served_as) == {str(POD["securityContext"]["runAsUser"])}
    single = container_of(one("Deployment", KUBERNETES / "components" / "single"))
    mounted = {mount["mountPath"] for mount in [*CONTAINER["volumeMounts"], *single["volumeMounts"]]}
    declared = re.findall(r"^VOLUME (\[.*\])", dockerfile, re.MULTILINE)
    assert declared
    for volumes in declared:
        assert set(yaml.safe_load(volumes)) <= mounted
    assert re.search(r"HF_HOME=/models\b", dockerfile)
    assert re.search(r"EPISODIC_DATA=/data\b", dockerfile)


def test_the_secret_is_where_the_service_looks_for_it() -> None:
    (mount,) = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "secrets"]
    assert environment_of(CONTAINER)["EPISODIC_SECRETS"] == mount["mountPath"]
    hub = container_of(one("Deployment", KUBERNETES / "components" / "model-hub"))
    assert environment_of(hub)["HF_TOKEN_PATH"] == f"{mount['mountPath']}/hf_token"


@pytest.mark.parametrize(("example", "files"), [("example", {"admin_key", "store"}), ("example-gpu", {"admin_key"})])
def test_an_examples_secret_has_settings_and_a_key_that_is_one(example: str, files: set[str]) -> None:
    text = (KUBERNETES / example / "kustomization.yaml").read_text()
    (generated,) = yaml.safe_load(text)["secretGenerator"]
    assert {Path(file).name.removeprefix("episodic_") for file in generated["files"]} == files
    assert files <= Settings.model_fields.keys()
    assert set(re.findall(r"> (secrets/\S+)", text)) == set(generated["files"])
    line = re.search(r"printf 'ek_%s_%s' .*-hex (\d+).*-hex (\d+)", text)
    assert line is not None
    digits = [2 * int(number) for number in line.groups()]
    key, _ = new_key("default", ["act"], 0.0)
    assert [len(part) for part in key.split("_")[1:]] == digits


def test_the_variables_of_service_links_would_be_taken_for_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because of the Service named episodic, every pod would get EPISODIC_PORT=tcp://... So service links are off."""
    assert one("Service")["metadata"]["name"] == "episodic"
    assert POD["enableServiceLinks"] is False
    monkeypatch.setenv("EPISODIC_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(ValidationError):
        Settings()


def test_what_scales_is_a_metric_and_within_what_the_engine_runs() -> None:
    autoscaler = one("HorizontalPodAutoscaler", KUBERNETES / "components" / "queue-autoscaling")
    targets = {metric["pods"]["metric"]["name"]: metric["pods"]["target"] for metric in autoscaler["spec"]["metrics"]}
    assert metrics.ACTS is not None
    assert targets.keys() <= {family.name for family in REGISTRY.collect()}
    running = CPU_OPTIONS["max_num_seqs"]
    assert int(targets["agent_running_acts"]["averageValue"]) < running
    assert int(targets["agent_waiting_acts"]["averageValue"]) < running // 4


def test_the_gateway_hashes_what_the_client_sends() -> None:
    policy = one("BackendTrafficPolicy", KUBERNETES / "components" / "gateway")
    (header,) = policy["spec"]["loadBalancer"]["consistentHash"]["headers"]
    assert f'headers["{header["name"]}"] = self.episode_id' in Path(calls.__file__).read_text()


def test_gateway_never_repeats_a_call_or_ejects_for_a_response() -> None:
    spec = one("BackendTrafficPolicy", KUBERNETES / "components" / "gateway")["spec"]
    assert set(spec["retry"]["retryOn"]["triggers"]) == {"connect-failure", "refused-stream"}  # nothing was sent yet
    passive = spec["healthCheck"]["passive"]
    assert passive["splitExternalLocalOriginErrors"]  # otherwise a failed connection counts as a 503
    assert (passive["consecutive5XxErrors"], passive["consecutiveGatewayErrors"]) == (0, 0)


def test_the_operators_rules_are_those_of_prometheus() -> None:
    rules, written = (PROMETHEUS / "rules.yml").read_text(), prometheus_rule.OBJECT.read_text()
    assert written == prometheus_rule.prometheus_rule(rules), "run `make rules`"
    assert yaml.safe_load(written)["spec"] == yaml.safe_load(rules)


def test_the_operators_scrape_has_the_job_that_the_rules_ask_for() -> None:
    """Without a jobLabel the operator uses the Service's name as the job."""
    assert "jobLabel" not in one("ServiceMonitor", KUBERNETES / "components" / "monitoring")["spec"]
    name = one("Service")["metadata"]["name"]
    assert set(re.findall(r'job="([^"]+)"', (PROMETHEUS / "rules.yml").read_text())) == {name}


def test_every_file_is_part_of_a_kustomization() -> None:
    for folder in {path.parent for path in KUBERNETES.rglob("*.yaml")}:
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        patches = [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
        named = {*kustomization.get("resources", []), *patches}
        files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert files == {name for name in named if name.endswith(".yaml")}, folder


def test_a_one_off_pod_gets_the_ways_out_and_no_calls() -> None:
    labels = {f"app.kubernetes.io/{name}": value for name, value in {"name": "episodic", "component": "server"}.items()}
    deployment = {**BASE, "metadata": {"namespace": "episodic", "labels": labels}}
    made = one_off.job(deployment, ["episodic", "migrate"])
    found = made["spec"]["template"]["metadata"]["labels"].items()
    assert (
        one("Service")["spec"]["selector"].items() == BASE["spec"]["selector"]["matchLabels"].items() == labels.items()
    )
    assert not labels.items() <= found
    policies = [document for document in documents(KUBERNETES) if document["kind"] == "NetworkPolicy"]
    for policy in [policy for policy in policies if policy["spec"]["policyTypes"] == ["Egress"]]:
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= found, policy["metadata"]["name"]
    container = container_of(made)
    assert container["command"] == ["episodic", "migrate"]
    assert container.keys() == CONTAINER.keys() - set(one_off.OF_SERVING) | {"command"}


def in_the_pod(words: str, data: Path, stdin: bytes = b"") -> bytes:
    """Runs the command of docs/deployment.md that contains `words` here, with `data` in place of /data."""
    (line,) = [line for line in (ROOT / "docs" / "deployment.md").read_text().splitlines() if words in line]
    inner = re.sub(r" [<>] backup\.db$", "", line.partition(" -- ")[2]).replace("/data/", f"{data}/")
    return subprocess.run(["sh", "-c", inner], input=stdin, capture_output=True, check=True).stdout


def test_volume_backup_and_restore_commands_work(tmp_path: Path) -> None:
    live = tmp_path / "episodic.db"
    with closing(sqlite3.connect(live)) as store:
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("CREATE TABLE kept AS SELECT 1 AS step")
        store.commit()
        in_the_pod("-- python3 -c", tmp_path)  # while the database is open
        backup = in_the_pod("-- cat /data/backup.db", tmp_path)
        in_the_pod("-- rm /data/backup.db", tmp_path)
        store.execute("INSERT INTO kept VALUES (2)")
        store.commit()
        in_the_pod("exec -i job/episodic-one-off", tmp_path, backup)
    assert [path.name for path in tmp_path.iterdir()] == ["episodic.db"]
    with closing(sqlite3.connect(live)) as restored:
        assert restored.execute("SELECT step FROM kept").fetchall() == [(1,)]


def test_the_line_that_rolls_back_makes_a_job_of_what_kubectl_prints() -> None:
    (words,) = re.findall(r"\| python3 (deploy/one_off\.py .*) \|", (ROOT / "docs" / "deployment.md").read_text())
    deployment = {**BASE, "metadata": {"namespace": "episodic", "labels": {}}}
    command = [sys.executable, *words.split()]
    ran = subprocess.run(command, input=json.dumps(deployment).encode(), capture_output=True, check=True, cwd=ROOT)
    assert container_of(json.loads(ran.stdout))["command"] == ["episodic", "migrate", "--to", "0002"]
    assert f"job/{one_off.NAME}" in (ROOT / "docs" / "deployment.md").read_text()


def test_no_secret_is_in_the_repository() -> None:
    assert not [document for document in documents(KUBERNETES) if document["kind"] == "Secret"]
