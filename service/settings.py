"""Owns the settings, and alone reads them: a TOML file, files of secrets, EPISODIC_* variables, the command line; the
later ones win."""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

_POLICIES = Path(__file__).parent / "packaged" / "policies"
_STORE_URL = re.compile(r"sqlite:///(?!:memory:$|file:).+|postgresql(\+asyncpg)?://[^/?#]+/[^/?#]+(\?.*)?", re.DOTALL)


class Quota(BaseModel):
    """What one tenant may have; None for no bound."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calls_per_s: float | None = Field(default=None, gt=0)
    concurrent_acts: int | None = Field(default=None, ge=1)
    active_episodes: int | None = Field(default=None, ge=1)


class Settings(BaseSettings):
    """Everything that can be set. `Settings()` reads the environment; keyword arguments win over it."""

    model_config = SettingsConfigDict(
        env_prefix="EPISODIC_",
        env_nested_delimiter="__",
        extra="forbid",
        toml_file=None,
        validate_default=True,
        hide_input_in_errors=True,  # a URL may hold a password
    )

    config: Path | None = Field(None, description="A TOML file with any of these settings.")
    secrets: Path | None = Field(
        None, description="A folder of files that give settings, such as `episodic_store` and `episodic_admin_key`."
    )
    host: str = Field("127.0.0.1", description="Address to serve on; any but loopback needs API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port to serve on; 0 takes a free one.")
    model: str = Field("toy-text", description="A packaged policy, a folder, or a Hugging Face model id.")
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Any option of vLLM's AsyncEngineArgs, e.g. EPISODIC_ENGINE__MAX_NUM_SEQS=64.",
    )
    openai: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of /v1, by vLLM's names, e.g. EPISODIC_OPENAI__TOOL_CALL_PARSER=hermes.",
    )
    media_hosts: list[str] = Field([], description="Hosts that /v1 may fetch media from; none: data URLs alone.")
    data: Path = Field(Path("data"), description="Folder for what is kept.")
    store: str | None = Field(
        None,
        description="`sqlite:///FILE`, or `postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE` for several replicas; "
        "unset, a SQLite file under `data`.",
    )
    admin_key: SecretStr | None = Field(
        None, description="A key from `episodic keys new` that every start makes known: tenant `default`, all scopes."
    )
    make_key: bool = Field(
        False,
        description="Make such a key, and print it once, where an address but loopback is served and there is none.",
    )
    adapters: Path | None = Field(
        None, description="Folder that LoRA adapters may be loaded from (PUT /policy/NAME); unset, adapters are off."
    )
    profiles: Path | None = Field(None, description="Folder of profiles (TOML files) besides the packaged ones.")
    max_live_episodes: int = Field(2048, ge=1, description="Episodes held in memory; the rest rest in the store.")
    max_steps: int | None = Field(None, ge=1, description="Steps after which an episode ends, where it names none.")
    idle_ttl_s: float | None = Field(None, gt=0, description="Seconds without an act that end an episode, likewise.")
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest request body.")
    receive_limit_s: float = Field(
        30.0,
        gt=0,
        description="Seconds a request's head may take to arrive, its body likewise, and an answer to be read.",
    )
    docs: bool = Field(True, description="Serve /docs, /redoc and /openapi.json.")
    max_tokens: int | None = Field(None, ge=1, description="Completion limit where a call names none.")
    constraint_limit_s: float = Field(5.0, gt=0, description="Seconds a schema or pattern may take to compile.")
    max_running_acts: int | None = Field(
        None, ge=1, description="Acts in the engine at once; unset, as many as it batches (max_num_seqs)."
    )
    max_queued_acts: int | None = Field(
        None,
        ge=0,
        description="Acts that wait for the engine; more get 429. Unset, a quarter of those that run.",
    )
    quota: Quota = Field(
        Quota(),
        description="Of each tenant: calls_per_s, concurrent_acts, active_episodes; EPISODIC_QUOTA__CALLS_PER_S=50.",
    )
    tenants: dict[str, Quota] = Field(
        default_factory=dict, description="Quotas of single tenants in place of that: [tenants.NAME] in the file."
    )
    engine_canary_s: float = Field(
        30.0,
        gt=0,
        description="Seconds without any output, and without an answer to a probe, after which an engine hangs.",
    )
    engine_backoff_s: float = Field(
        1.0, ge=0, description="Seconds before an engine that died is loaded again; doubles with each failure."
    )
    engine_max_failures: int = Field(
        3, ge=1, description="Engine failures within the window below that end the process."
    )
    engine_failure_window_s: float = Field(600.0, gt=0, description="Seconds that an engine failure counts for.")
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        description="Seconds after SIGTERM in which it is unready and still takes acts, for a proxy to see that.",
    )
    drain_s: float = Field(30.0, ge=0, description="Seconds that acts in flight get after that.")
    log_format: Literal["console", "json"] = Field("console", description="How log lines are written.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")

    @field_validator("engine", "openai", mode="before")
    @classmethod
    def _read_engine_options(cls, value: Any) -> Any:
        """Values from the environment and the command line are text; numbers, booleans and JSON are read as such."""
        if not isinstance(value, dict):
            return value
        return {name.lower(): _json_or_text(item) for name, item in cast("dict[str, Any]", value).items()}

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
        return self.tenants.get(tenant, self.quota)

    @property
    def episode_defaults(self) -> dict[str, Any]:
        """Fields of POST /episode where a call names none."""
        named = {"max_steps": self.max_steps, "idle_ttl_s": self.idle_ttl_s}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def store_url(self) -> str:
        return self.store or f"sqlite:///{self.data / 'episodic.db'}"

    @property
    def model_path(self) -> str:
        """What the engine loads: a packaged policy's folder, or `model` as it stands."""
        packaged = _POLICIES / self.model
        return str(packaged) if "/" not in self.model and packaged.is_dir() else self.model

    @classmethod
    def markdown(cls) -> str:
        """The settings as a Markdown table."""
        rows = ["| variable | default | what it sets |", "|---|---|---|"]
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = "" if default in (None, {}, [], Quota()) else f"`{default}`"
            rows.append(f"| `EPISODIC_{name.upper()}` | {shown} | {field.description} |")
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
        """Command line (as keyword arguments), environment, folder of secrets, file. The first two name the others; the
        file may name the folder."""
        sources = [init_settings, env_settings]
        given = {**env_settings(), **init_settings()}
        if path := given.get("config"):
            if not Path(path).is_file():
                raise FileNotFoundError(f"there is no file {path}")  # the source below would pass over it in silence
            file = TomlConfigSettingsSource(settings_cls, Path(path))
            sources, given = [*sources, file], {**file(), **given}
        if folder := given.get("secrets"):
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"there is no folder {folder}")  # likewise
            sources.insert(2, SecretsSettingsSource(settings_cls, folder))
        return tuple(sources)


def client_key() -> str | None:
    """EPISODIC_API_KEY: the key of commands that call a service. No option gives it, because everyone on the machine
    can read the arguments of a process."""
    return os.environ.get("EPISODIC_API_KEY") or None


def holds_password(url: str) -> bool:
    """Whether a store's URL names a password, in whichever place it may stand."""
    user_and_place = url.partition("://")[2].rpartition("@")[0]
    return ":" in user_and_place or "password=" in url.lower()


def _json_or_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return {"true": True, "false": False}.get(value.lower(), value)
