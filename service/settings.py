"""The settings, and where they are read from: a TOML file, secret files, EPISODIC_* variables and the command line.

Each source overrides the ones before it. Other modules receive a `Settings` and do not read the environment.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

_POLICIES = Path(__file__).parent / "packaged" / "policies"
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_STORE_URL = re.compile(r"sqlite:///(?!:memory:$|file:).+|postgresql(\+asyncpg)?://[^/?#]+/[^/?#]+(\?.*)?", re.DOTALL)


def _listed(value: Any) -> Any:
    """Parses a list that arrives as text, from the environment or a secret file."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [item for part in value.split(",") if (item := part.strip())]
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"it begins as a JSON list, but is not valid JSON: {error}") from error


_Texts = Annotated[list[str], NoDecode, BeforeValidator(_listed)]
"""A list of texts: `a,b` or `["a", "b"]`."""


class SettingsRefused(ValueError):
    """A source of settings cannot be read. The message names the setting."""


class Quota(BaseModel):
    """The limits of one tenant. None means unlimited."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calls_per_s: float | None = Field(default=None, gt=0)
    concurrent_acts: int | None = Field(default=None, ge=1)
    active_episodes: int | None = Field(default=None, ge=1)


class Settings(BaseSettings):
    """All settings of the service. `Settings()` reads the environment; keyword arguments override it."""

    model_config = SettingsConfigDict(
        env_prefix="EPISODIC_",
        env_nested_delimiter="__",
        extra="forbid",
        toml_file=None,
        validate_default=True,
        hide_input_in_errors=True,  # the input may be a URL with a password
    )

    config: Path | None = Field(None, description="Path of a TOML file with any of these settings.")
    secrets: Path | None = Field(
        None,
        description="Folder of secret files. Each file is named after a setting (`episodic_store`, "
        "`episodic_admin_key`) and contains its value.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on. Addresses other than loopback need API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0 picks a free port.")
    model: str = Field(
        "toy-text",
        description="Model to serve: a packaged policy, a model that `episodic models fetch` fetched, a folder or a "
        "Hugging Face id.",
    )
    model_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.:-]{1,128}$",
        description="Name of the model for callers. Default: the last part of EPISODIC_MODEL. Callers may also use the "
        "default name and EPISODIC_MODEL itself, so that episodes go on when this setting changes.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of vLLM's AsyncEngineArgs, for example EPISODIC_ENGINE__MAX_NUM_SEQS=64. Encoder-decoder "
        "models have others: docs/encoder-decoder.md.",
    )
    openai: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of /v1 under vLLM's names, for example EPISODIC_OPENAI__TOOL_CALL_PARSER=hermes.",
    )
    media_hosts: _Texts = Field(
        [],
        description="Hosts from which /v1 may download media, separated by commas. If the list is empty, /v1 accepts "
        "only data URLs.",
    )
    data: Path = Field(
        Path("data"), description="Folder for the service's files: SQLite store, copies of adapters, fetched models."
    )
    store: str | None = Field(
        None,
        description="URL of the store: `sqlite:///FILE`, or `postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE` for "
        "several replicas. Default: a SQLite file under `data`.",
    )
    admin_key: SecretStr | None = Field(
        None,
        description="API key made with `episodic keys new`. At each start the service adds it to the store if it is "
        "missing, for tenant `default` with all scopes.",
    )
    make_key: bool = Field(
        False,
        description="If the service listens on an address other than loopback and the store has no API key: create "
        "one for tenant `default` with all scopes, and print it once.",
    )
    adapters: Path | None = Field(
        None,
        description="Folder from which LoRA adapters may be loaded (PUT /policy/NAME). Unset: adapters are disabled.",
    )
    max_adapter_bytes: int = Field(
        1 << 30, ge=1024, description="Maximum size of an adapter that is uploaded (PUT /policy/NAME), in bytes."
    )
    default_policy: str | None = Field(
        None,
        min_length=1,
        max_length=160,
        description="Policy of new episodes that name none: a name from GET /policy, or a version, NAME@DIGEST. "
        "PUT /policy-default takes precedence. Default: the base model.",
    )
    profiles: Path | None = Field(None, description="Folder with further profiles (TOML files).")
    max_live_episodes: int = Field(
        2048,
        ge=1,
        description="Maximum number of episodes cached in memory. Others are loaded from the store on demand.",
    )
    max_steps: int | None = Field(
        None, ge=1, description="Default maximum number of steps, for episodes that set none. Unset: no limit."
    )
    idle_ttl_s: float | None = Field(
        None,
        gt=0,
        description="Default idle timeout in seconds, for episodes that set none: an episode ends after this time "
        "without an act. Unset: no timeout.",
    )
    retention_s: float | None = Field(
        None,
        gt=0,
        description="Seconds after its end at which an episode is deleted. Unset: episodes stay until they are deleted "
        "by a call.",
    )
    tombstone_retention_s: float = Field(
        7 * 24 * 3600.0,
        gt=0,
        description="Seconds for which the id of a deleted episode gets 410, if EPISODIC_RETENTION_S is set. After "
        "that the id can be used again, unless a fork still reads steps of the episode.",
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Maximum size of a request body, in bytes.")
    receive_limit_s: float = Field(
        30.0,
        gt=0,
        description="Timeout in seconds, separately for receiving the head of a request, for receiving its body, and "
        "for a client that does not read the response.",
    )
    docs: bool = Field(True, description="Whether to serve /docs and /openapi.json.")
    cors_origins: _Texts = Field(
        [],
        description="Origins of web pages that may call the service from a browser (CORS), separated by commas, for "
        "example `https://app.example`. `*` allows every origin, if the service has API keys. Empty: no other site.",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Default maximum number of tokens of a completion, for episodes that set none."
    )
    constraint_limit_s: float = Field(
        5.0, gt=0, description="Timeout in seconds for compiling a JSON schema or a pattern of an action space."
    )
    max_running_acts: int | None = Field(
        None,
        ge=1,
        description="Number of slots in the engine. An act takes one slot for each request to the model that is in "
        "flight, so this limits concurrent requests. Default: the engine's batch size (max_num_seqs).",
    )
    max_queued_acts: int | None = Field(
        None,
        ge=0,
        description="Size of the act queue. When it is full, further acts get 429. Default: four times the slots, at "
        "least 1024.",
    )
    quota: Quota = Field(
        Quota(),
        description="Limits of each tenant: calls_per_s, concurrent_acts, active_episodes. Example: "
        "EPISODIC_QUOTA__CALLS_PER_S=50.",
    )
    tenants: dict[str, Quota] = Field(
        default_factory=dict,
        description="Limits of single tenants, in place of EPISODIC_QUOTA: [tenants.NAME] in the TOML file.",
    )
    engine_canary_s: float = Field(
        30.0,
        gt=0,
        description="Hang timeout in seconds. An engine that produces no output and answers no probe for this time is "
        "killed and loaded again.",
    )
    engine_backoff_s: float = Field(
        1.0,
        ge=0,
        description="Seconds before a failed engine is loaded again. The delay doubles with each further failure.",
    )
    engine_max_failures: int = Field(
        3,
        ge=1,
        description="Number of engine failures within EPISODIC_ENGINE_FAILURE_WINDOW_S after which the process exits.",
    )
    engine_failure_window_s: float = Field(
        600.0, gt=0, description="Window in seconds over which engine failures are counted."
    )
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        description="Minimum seconds after SIGTERM in which /readyz already fails but calls are still served, so "
        "that load balancers stop routing here. If calls still arrive then, they are served for up to half of "
        "EPISODIC_DRAIN_S longer. 0: no delay.",
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        description="Drain timeout in seconds, which starts after EPISODIC_DRAIN_DELAY_S. During this time "
        "in-flight acts may finish; new acts, episodes and forks are refused.",
    )
    log_format: Literal["console", "json"] = Field("console", description="Format of log lines: console or json.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of logged events: debug, info, warning or error."
    )

    @field_validator("engine", "openai", mode="before")
    @classmethod
    def _read_engine_options(cls, value: Any) -> Any:
        """Parses numbers, booleans and JSON. Values from the environment and the command line arrive as text."""
        if not isinstance(value, dict):
            return value
        return {name.lower(): _json_or_text(item) for name, item in cast("dict[str, Any]", value).items()}

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin. Write SCHEME://HOST or SCHEME://HOST:PORT, or *")
        return value

    @field_validator("store")
    @classmethod
    def _check_store(cls, value: str | None) -> str | None:
        if value is None or _STORE_URL.fullmatch(value):
            return value
        raise ValueError(
            "the store must be a SQLite file, sqlite:///FILE, or a PostgreSQL database, "
            "postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE"
        )

    def quota_of(self, tenant: str) -> Quota:
        """The tenant's own limits, or else those of every tenant."""
        return self.tenants.get(tenant, self.quota)

    @property
    def episode_defaults(self) -> dict[str, Any]:
        """Default values of fields of POST /episode."""
        named = {"max_steps": self.max_steps, "idle_ttl_s": self.idle_ttl_s}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def store_url(self) -> str:
        """The store's URL, by default that of a SQLite file in `data`."""
        return self.store or f"sqlite:///{self.data / 'episodic.db'}"

    @property
    def url(self) -> str:
        """The base URL of the service on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def model_path(self) -> str:
        """The model that the engine loads: the folder of a packaged policy or of a fetched model, or else `model`
        unchanged."""
        folders = (folder / self.model for folder in (_POLICIES, self.models) if "/" not in self.model)
        return next((str(folder) for folder in folders if (folder / "config.json").is_file()), self.model)

    @property
    def models(self) -> Path:
        """The folder of the models that `episodic models fetch` writes."""
        return self.data / "models"

    @property
    def served_name(self) -> str:
        """The name of the model for callers."""
        return self.model_name or self._default_name

    @property
    def model_aliases(self) -> tuple[str, ...]:
        """Further names of the model that callers may use. They may contain the path of its folder, so no answer shows
        them."""
        names = {self.model, self._default_name}
        if Path(self.model).is_dir():
            names.add(str(Path(self.model).resolve()))
        return tuple(sorted(names - {self.served_name}))

    @property
    def _default_name(self) -> str:
        name = policy_name(self.model)
        return Path(self.model).resolve().name or name if name in (".", "..") else name

    @classmethod
    def markdown(cls) -> str:
        """The settings as a Markdown table."""
        rows = ["| variable | default | what it sets |", "|---|---|---|"]
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True)
            default_text = "" if default in (None, {}, [], Quota()) else f"`{default}`"
            rows.append(f"| `EPISODIC_{name.upper()}` | {default_text} | {field.description} |")
        return "\n".join(rows)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Returns the sources, highest precedence first: keyword arguments (the command line), environment, secret
        files, TOML file.

        The path of the TOML file comes from the first two sources. The secrets folder may also be set in the file.
        Raises SettingsRefused.
        """
        sources = [init_settings, env_settings]
        given = {**env_settings(), **init_settings()}
        if path := given.get("config"):
            if not Path(path).is_file():
                # TomlConfigSettingsSource silently ignores a missing file.
                raise SettingsRefused(f"EPISODIC_CONFIG: file {path} not found")
            try:
                file = TomlConfigSettingsSource(settings_cls, Path(path))
            except (OSError, ValueError) as error:
                raise SettingsRefused(f"EPISODIC_CONFIG: file {path}: {error}") from error
            sources, given = [*sources, file], {**file(), **given}
        if folder := given.get("secrets"):
            if not Path(folder).is_dir():
                # SecretsSettingsSource only warns about a missing folder.
                raise SettingsRefused(f"EPISODIC_SECRETS: folder {folder} not found")
            sources.insert(2, SecretsSettingsSource(settings_cls, folder))
        return tuple(sources)


def given_names(settings: Settings) -> list[str]:
    """The names of all EPISODIC_* variables of the environment, and of the files of the secrets folder."""
    files = [path.name for path in settings.secrets.iterdir()] if settings.secrets else []
    return sorted({name for name in (*os.environ, *files) if name.upper().startswith("EPISODIC_")})


def policy_name(model: str) -> str:
    """Returns the name under which callers see a policy: the last part of a model's path or hub id.

    Older versions stored the whole path or id with each episode.
    """
    return model.rstrip("/").rpartition("/")[2] or model


def client_key() -> str | None:
    """The API key of commands that call a service, from EPISODIC_API_KEY.

    There is no option for it, because every user of the machine can read the arguments of a process.
    """
    return os.environ.get("EPISODIC_API_KEY") or None


def holds_password(url: str) -> bool:
    """Returns whether a store's URL contains a password, before the host or as a query parameter."""
    user_and_place = url.partition("://")[2].rpartition("@")[0]
    return ":" in user_and_place or "password=" in url.lower()


def _json_or_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return {"true": True, "false": False}.get(value.lower(), value)
