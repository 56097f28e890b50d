"""Makes a Kubernetes Job from the service's Deployment. The Job runs one command with the service's configuration.

    kubectl get deployment episodic -o json | python3 deploy/one_off.py episodic migrate | kubectl create -f -

Reads the Deployment from stdin and prints the Job, both as JSON. The Job's pod has the image, the Secret, the volumes
and the outgoing network access of a replica. The Service sends no calls to it.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

NAME = "episodic-one-off"
OF_SERVING = ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "ports")


def job(deployment: dict[str, Any], command: list[str]) -> dict[str, Any]:
    """Returns a Job that runs `command` in a pod like those of `deployment`."""
    labels = {**deployment["metadata"]["labels"], "app.kubernetes.io/component": "one-off"}
    pod = copy.deepcopy(deployment["spec"]["template"]["spec"])
    pod["restartPolicy"] = "Never"
    pod.pop("topologySpreadConstraints", None)
    for container in pod["containers"]:
        container["command"] = command
        for name in OF_SERVING:
            container.pop(name, None)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": NAME, "namespace": deployment["metadata"]["namespace"], "labels": labels},
        "spec": {"backoffLimit": 0, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


if __name__ == "__main__":
    json.dump(job(json.load(sys.stdin), sys.argv[1:]), sys.stdout)
