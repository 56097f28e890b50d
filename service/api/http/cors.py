"""What web pages of other sites may do, if EPISODIC_CORS_ORIGINS allows their origin (CORS)."""

from typing import Any

OPTIONS: dict[str, Any] = {
    "allow_methods": ["GET", "POST", "PUT", "DELETE"],
    "allow_headers": ["*"],
    "expose_headers": ["Location", "Retry-After", "X-Request-ID"],
}
"""Options of Starlette's CORSMiddleware. Pages send the API key in the header Authorization. The service uses no
cookies, so credentials need not be allowed."""
