"""Settings from a TOML file, secret files, the environment and the command line, and which of them wins."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from service.cli.main import app
from service.settings import Settings, SettingsRefused


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(folder: Path, text: str) -> str:
    path = folder / "settings.toml"
    path.write_text(text)
    return str(path)


def test_the_defaults():
    settings = Settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "toy-text")
    assert (settings.log_format, settings.engine) == ("console", {})
    assert settings.store_url == "sqlite:///data/episodic.db"


def test_the_environment_wins_over_the_file_and_arguments_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(
        tmp_path, 'port = 1\nhost = "::1"\nlog_level = "error"\n[engine]\nmax_num_seqs = 1\nseed = 1\nblock_size = 1'
    )
    monkeypatch.setenv("EPISODIC_CONFIG", path)
    monkeypatch.setenv("EPISODIC_PORT", "2")
    monkeypatch.setenv("EPISODIC_LOG_LEVEL", "debug")
    monkeypatch.setenv("EPISODIC_ENGINE__MAX_NUM_SEQS", "2")
    monkeypatch.setenv("EPISODIC_ENGINE__SEED", "2")
    settings = Settings(port=3, engine={"max_num_seqs": "3"})
    assert (settings.host, settings.log_level, settings.port) == ("::1", "debug", 3)
    assert settings.engine == {"block_size": 1, "seed": 2, "max_num_seqs": 3}


def test_the_file_may_be_named_on_the_command_line(tmp_path: Path):
    assert Settings(config=write(tmp_path, "port = 7")).port == 7  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0.5", 0.5),
        ("true", True),
        ("False", False),
        ("bfloat16", "bfloat16"),
        ('{"backend": "xgrammar"}', {"backend": "xgrammar"}),
        ("[1, 2]", [1, 2]),
        ("", ""),
    ],
)
def test_engine_options_are_read_as_what_they_look_like(monkeypatch: pytest.MonkeyPatch, text: str, value: Any):
    monkeypatch.setenv("EPISODIC_ENGINE__SOME_OPTION", text)
    assert Settings().engine == {"some_option": value}
    monkeypatch.delenv("EPISODIC_ENGINE__SOME_OPTION")
    assert Settings(engine={"some_option": text}).engine == {"some_option": value}


@pytest.mark.parametrize(
    "given",
    [{"prot": 1}, {"port": 70_000}, {"port": "many"}, {"log_format": "xml"}, {"max_live_episodes": 0}, {"drain_s": -1}],
)
def test_invalid_setting_is_refused(given: dict[str, Any]):
    with pytest.raises(ValidationError):
        Settings(**given)


@pytest.mark.parametrize(
    "store",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite+aiosqlite:///x",
        "mysql://me:secret@db/x",
        "postgresql+psycopg://me:secret@db/x",
        "postgresql+asyncpg://me:secret@db",
        "postgresql+asyncpg://me:secret@db/",
        "postgresql+asyncpg:///x",
    ],
)
def test_unsupported_store_url_is_refused_without_its_password(store: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPISODIC_STORE", store)
    result = serve()
    assert result.exit_code == 2
    assert "must be a SQLite file" in result.output
    assert "secret" not in result.output


@pytest.mark.parametrize(
    "store",
    ["sqlite:////var/x", "sqlite:///x y", "postgresql://me:secret@db/x", "postgresql+asyncpg://me@db:1/x?ssl=require"],
)
def test_a_file_or_a_postgresql_database_is_a_store(store: str):
    assert Settings(store=store).store_url == store


def test_a_misspelt_key_of_the_file_is_refused(tmp_path: Path):
    with pytest.raises(ValidationError, match="prot"):
        Settings(config=write(tmp_path, "prot = 1"))  # pyright: ignore[reportArgumentType]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SettingsRefused, match=r"missing\.toml"):
        Settings(config=tmp_path / "missing.toml")
    monkeypatch.setenv("EPISODIC_CONFIG", "missing.toml")
    with pytest.raises(SettingsRefused, match=r"missing\.toml"):
        Settings()


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A secrets folder as Kubernetes mounts it: each name is a symbolic link to a file in `..data`."""
    folder = tmp_path / "secrets"
    (folder / "..data").mkdir(parents=True)
    for name, text in {"episodic_store": "sqlite:///s.db\n", "episodic_port": "7", "postgres_password": "x"}.items():
        (folder / "..data" / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


def test_files_of_secrets_win_over_the_file_and_lose_to_the_environment_and_to_arguments(
    secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EPISODIC_SECRETS", str(secrets))
    monkeypatch.setenv("EPISODIC_CONFIG", write(tmp_path, 'port = 1\nstore = "sqlite:///f.db"\nhost = "::1"'))
    settings = Settings()
    assert (settings.store, settings.port, settings.host) == ("sqlite:///s.db", 7, "::1")
    monkeypatch.setenv("EPISODIC_STORE", "sqlite:///e.db")
    assert (Settings().store, Settings(port=9).port) == ("sqlite:///e.db", 9)


def test_the_file_may_name_the_folder_of_secrets(secrets: Path, tmp_path: Path):
    assert Settings(config=Path(write(tmp_path, f'secrets = "{secrets}"'))).port == 7


@pytest.mark.parametrize("command", [["serve"], ["migrate"], ["keys", "list"]])
def test_a_folder_of_secrets_that_is_not_there_is_refused(command: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPISODIC_SECRETS", "missing-folder")
    result = CliRunner().invoke(app, command)
    assert result.exit_code in (1, 2)
    assert "folder missing-folder not found" in result.output


def test_a_packaged_policy_is_named_by_its_name(tmp_path: Path):
    assert Path(Settings(model="toy-text").model_path, "config.json").is_file()
    for other in ("org/model", str(tmp_path), "../service", "no-such-policy"):
        assert Settings(model=other).model_path == other


def test_every_setting_is_described_in_the_table():
    table = Settings.markdown()
    for name, field in Settings.model_fields.items():
        assert f"`EPISODIC_{name.upper()}`" in table
        assert field.description
        assert field.description in table


# --- the command line


def serve(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", "127.0.0.1.example.com"])  # noqa: S104
def test_only_loopback_is_served(host: str):
    result = serve("--host", host)
    assert result.exit_code == 2
    assert "loopback" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "70000"),
        ("--log-format", "xml"),
        ("--engine", "max_num_seqs"),
        ("--config", "missing.toml"),
        ("--no-such-option",),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[str, ...]):
    result = serve(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_file_with_a_syntax_error_is_refused(tmp_path: Path):
    result = serve("--config", write(tmp_path, "port = = 1"))
    assert result.exit_code == 2
    assert "Error: EPISODIC_CONFIG: file" in result.output


@pytest.mark.parametrize("name", [name for name, field in Settings.model_fields.items() if field.default == []])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("https://a.example", ["https://a.example"]),
        (" https://a.example , https://b.example,", ["https://a.example", "https://b.example"]),
        ('["https://a.example", "https://b.example"]', ["https://a.example", "https://b.example"]),
        ("", []),
    ],
)
def test_a_list_has_commas_or_is_json(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: list[str]):
    monkeypatch.setenv(f"EPISODIC_{name.upper()}", text)
    assert getattr(Settings(), name) == value
