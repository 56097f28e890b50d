"""Writes deploy/prometheus/rules.yml as a PrometheusRule object for the Prometheus operator (`make rules`)."""

from __future__ import annotations

import textwrap
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
RULES = DEPLOY / "prometheus" / "rules.yml"
OBJECT = DEPLOY / "kubernetes" / "components" / "monitoring" / "prometheus-rule.yaml"
HEAD = """\
# Generated from deploy/prometheus/rules.yml by `make rules`. Do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: episodic
spec:
"""


def prometheus_rule(rules: str) -> str:
    """Returns the YAML of the object. `rules` is the content of rules.yml."""
    return HEAD + textwrap.indent(rules, "  ")


if __name__ == "__main__":
    OBJECT.write_text(prometheus_rule(RULES.read_text(encoding="utf-8")), encoding="utf-8")
