"""Owns the health check of an image: exit 0 if the service of this container is ready. No http_proxy comes between."""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("EPISODIC_PORT", "8000")), timeout=4)
connection.request("GET", "/readyz")
sys.exit(connection.getresponse().status != 200)
