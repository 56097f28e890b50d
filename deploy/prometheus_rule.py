"""Owns `make rules`: the rules and alerts of deploy/prometheus as an object of the Prometheus operator."""

from __future__ import annotations

import textwrap
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
RULES = DEPLOY / "prometheus" / "rules.yml"
OBJECT = DEPLOY / "kubernetes" / "components" / "monitoring" / "prometheus-rule.yaml"
HEAD = """\
# Made from deploy/prometheus/rules.yml by `make rules`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: episodic
spec:
"""


def prometheus_rule(rules: str) -> str:
    return HEAD + textwrap.indent(rules, "  ")


if __name__ == "__main__":
    OBJECT.write_text(prometheus_rule(RULES.read_text(encoding="utf-8")), encoding="utf-8")
