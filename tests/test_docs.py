"""The README and docs/ are complete and current: settings, error codes, metrics, links, and the names of tests."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from service.api.http.problems import CODES
from service.observability import metrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def found(pattern: str, text: str) -> list[Any]:
    """All matches of `pattern` in `text`, at least one: a pattern that stopped matching would check nothing."""
    matches = re.findall(pattern, text, re.MULTILINE)
    assert matches, f"nothing matches {pattern}"
    return matches


def test_the_settings_table_is_the_generated_one() -> None:
    table = re.search(r"<!-- settings -->\n(.*)<!-- /settings -->", REFERENCE, re.DOTALL)
    assert table is not None
    assert table[1].strip() == Settings.markdown().strip(), (
        "docs/reference.md: replace the table with the output of `episodic settings`"
    )


def test_every_error_code_is_in_the_reference() -> None:
    listed = found(r"^\| (\d{3}) \| `(\w+)` \|", REFERENCE)
    assert sorted(listed) == sorted((str(status), code) for status, codes in CODES.items() for code in codes)


def test_all_service_metrics_are_in_the_reference() -> None:
    assert metrics.ACTS is not None
    ours = {family.name for family in REGISTRY.collect() if family.name.startswith("agent_")}
    assert ours == set(found(r"^\| `(agent_\w+)`", REFERENCE))


def test_the_files_that_the_docs_point_to_exist() -> None:
    link = r"\]\(([^)#:]+)(?:#[\w-]+)?\)"
    found(link, (ROOT / "README.md").read_text())
    others = [ROOT / "training" / "README.md", *(ROOT / "service" / "packaged" / "policies").glob("*/README.md")]
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *others]:
        for target in re.findall(link, page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_architecture_page_is_short_and_names_existing_tests() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert text.count("\n") < 100
    for name in found(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", ["security.md", "reliability.md"])
def test_guarantees_and_mitigations_name_existing_tests(page: str) -> None:
    """Each row of the tables names its tests, and each of these tests exists."""
    text = (ROOT / "docs" / page).read_text()
    for path, name in found(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        test = re.search(rf"^ *(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)
        assert test, f"{page}: the test {path}::{name} does not exist"
    tables = found(r"^\|.*\| test \|\n\|.*\n((?:\|.*\n)+)", text)
    for row in "".join(tables).splitlines():
        assert "::" in row.split("|")[-2], f"{page}: this row names no test: {row}"


def test_the_deployment_page_states_the_measured_cpu_time_of_an_act() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    ((low, high),) = found(r"([\d.]+) to ([\d.]+) ms of CPU time per discrete act with 32 callers", text)
    cells = json.loads((ROOT / "bench" / "results.json").read_text())["cells"]
    measured = [
        round(cell["medians"]["service"]["cpu_ms_per_step"], 1)
        for cell in cells
        if cell["workload"].startswith("choice") and cell["episodes"] == 32
    ]
    assert measured, "no discrete acts with 32 callers were measured"
    assert (min(measured), max(measured)) == (float(low), float(high))


def test_deployment_page_names_existing_files_and_targets() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    kubernetes, targets = ROOT / "deploy" / "kubernetes", (ROOT / "Makefile").read_text()
    rows = set(found(r"^\| `([\w/-]+)` \|", text))
    overlays = {f"overlays/{path.name}" for path in kubernetes.glob("overlays/*")}
    components = {path.name for path in kubernetes.glob("components/*")}
    assert rows == overlays | components - {"single"}  # `single` is part of two overlays
    for path in found(r"`((?:deploy|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for target in found(r"(?:`|^)make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", targets, re.MULTILINE), target
    compose = (ROOT / "docker-compose.yml").read_text()
    for name in found(r"EPISODIC_([A-Z]+(?:_[A-Z]+)*)", text):
        assert name.lower() in Settings.model_fields or f"${{EPISODIC_{name}:-" in compose, name
    for file in found(r"secrets/(\w+)", text):
        assert file in compose, file
