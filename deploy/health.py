"""The health check of the images: exits with 0 if the service in this container is ready. Ignores http_proxy."""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("EPISODIC_PORT", "8000")), timeout=4)
connection.request("GET", "/readyz")
sys.exit(connection.getresponse().status != 200)
