"""Settings: CLI flag > AGENTMEM_* environment > --config file (TOML) > default.

Each setting, with its unit and its default, is written once, here.
"""

import os
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from .errors import StartupError, program

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(value: Any) -> Any:
    """Turn "512M", "8 GiB", "1.5g" or a number of bytes into bytes.

    Units are binary, G as well as GiB. pydantic's ByteSize takes 8G for 8 * 10^9, and reads "1,5G"
    as one byte, since it looks at the beginning only.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower().removesuffix("ib").removesuffix("b").strip()
    unit = text[-1:] if text[-1:].isalpha() else ""
    try:
        return int(float(text.removesuffix(unit)) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(
            f"{value!r} is not a size; write bytes, or a number with K, M, G or T, such as 8G"
        ) from None


def parse_share(value: Any) -> Any:
    """Turn "60%" into 0.6, and anything else into what `parse_bytes` makes of it."""
    if not isinstance(value, str) or not value.strip().endswith("%"):
        return parse_bytes(value)
    try:
        share = float(value.strip().removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{value!r} is not a share; write 1% to 100%, or a size such as 8G")
    return share


def resolve(size: int | float, whole: int) -> int:
    """Return the bytes of a setting that is a size, or, as a float up to 1, a share of `whole`."""
    return int(size * whole) if isinstance(size, float) and size <= 1 else int(size)


def _split_commas(value: Any) -> Any:
    """Turn "a,b" into two, and ["a,b"], which a flag gives, as well."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return value
    names = ",".join(parts).split(",")
    return [name.strip() for name in names if name.strip()]


def _multiple_of_32(value: int) -> int:
    if value % 32:
        raise ValueError(f"must be a multiple of 32, is {value}")
    return value


@dataclass(frozen=True)
class Unit:
    """What a setting's value is, or is counted in: help shows it in the value's place."""

    name: str


_Text = Annotated[str, Unit("TEXT")]
_Number = Annotated[int, Unit("N")]
_Tokens = Annotated[int, Unit("TOKENS")]
_Ratio = Annotated[float, Unit("RATIO")]
_Seconds = Annotated[float, Unit("SECONDS")]
_Hours = Annotated[float, Unit("HOURS")]
_Bytes = Annotated[int, BeforeValidator(parse_bytes), Unit("SIZE")]
_BytesOrShare = Annotated[int | float, BeforeValidator(parse_share), Unit("SIZE|PERCENT")]


class Settings(BaseSettings):
    """What `agentmem serve` can be told. Unknown names are refused.

    A description is shown by --help and stands in the service's file: a sentence without its dot.
    """

    model_config = SettingsConfigDict(env_prefix="AGENTMEM_", extra="forbid")

    model: _Text = Field("demo", description="'demo', a directory with an MLX model, or a hub name")
    any_model: bool = Field(
        False, description="Answer requests for any model's name with the one that is served"
    )
    host: _Text = Field("127.0.0.1", description="Address to listen on")
    port: _Number = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one")
    home: Annotated[Path, Unit("DIR")] = Field(
        Path("~/.agentmem"), description="Directory that holds models and stores"
    )
    allowed_hosts: Annotated[
        list[str], NoDecode, BeforeValidator(_split_commas), Unit("HOST,...")
    ] = Field(
        default=[],
        description="Further Host header values to accept, beside the listening address and "
        "localhost",
    )
    cors: Annotated[list[str], NoDecode, BeforeValidator(_split_commas), Unit("ORIGIN,...")] = (
        Field(
            default=[],
            description="Origins of web pages that may use the server: http://localhost:3000",
        )
    )
    api_keys: Annotated[Path | None, Unit("FILE")] = Field(
        None,
        description="TOML file that gives each namespace its key or keys; without one no key is "
        "needed, and all are in the namespace 'default'",
    )

    insecure: bool = Field(
        False,
        description="Listen beyond this machine without api_keys: whoever reaches the port gets in",
    )
    requests_per_minute: Annotated[int | None, Unit("N")] = Field(
        None, ge=1, description="Requests (POST) of a key in a minute; by default any number"
    )
    tokens_per_minute: Annotated[int | None, Unit("TOKENS")] = Field(
        None,
        ge=1,
        description="Tokens that a key may have computed in a minute: of prompts, where they are "
        "not cached, and of answers; by default any number",
    )
    client_timeout: _Seconds = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a client may stop in the middle of a request, or take nothing of "
        "an answer",
    )

    kv_bits: Literal["4", "k5v3", "k5v4", "8", "16"] = Field(
        "4",
        description="Bits of a sealed block: 4, 8, 16 (the model's own dtype), k5v3 (keys 5, "
        "values 3) or k5v4",
    )
    block_size: Annotated[_Tokens, AfterValidator(_multiple_of_32)] = Field(
        256, ge=32, le=2048, description="Tokens of a block"
    )
    state_interval: Annotated[int | None, Unit("TOKENS")] = Field(
        None,
        ge=32,
        description="Tokens from one state of a recurrent model that is kept to the next, rounded "
        "up to blocks; by default so many that states take as many bytes as the rest, 4096 at most",
    )
    sharing: Literal["namespace", "agent"] = Field(
        "namespace",
        description="Who may share identical prefix blocks: agents of one namespace, or nobody",
    )
    attention: Literal["auto", "dequantized", "codes"] = Field(
        "auto",
        description="What attention of running sequences reads; auto: measured once per model and "
        "device",
    )
    prefill_chunk: _Tokens = Field(
        512, ge=16, le=8192, description="Prompt tokens of a forward pass"
    )
    max_itl_ms: Annotated[float | None, Unit("MILLISECONDS")] = Field(
        None,
        gt=0,
        description="Longest gap between two tokens of an answer that the prefill of other "
        "requests may cause; by default as long as the prefill of 128 tokens takes",
    )
    max_running: _Number = Field(8, ge=1, le=256, description="Sequences decoded at once")
    max_queue: _Number = Field(
        64, ge=1, le=10_000, description="Requests that may wait; one more is answered 429"
    )
    max_queue_time: _Seconds = Field(
        600.0,
        gt=0,
        description="Seconds that a request may wait in the queue; then it is answered 429",
    )
    max_branches: _Number = Field(
        4,
        ge=1,
        le=64,
        description="Branches kept of one agent; the least recently used goes first, the longest "
        "last",
    )
    max_context: Annotated[int | None, Unit("TOKENS")] = Field(
        None, ge=16, description="Tokens of prompt and answer; by default the model's"
    )
    date_session: _Hours = Field(
        24.0,
        ge=0,
        description="Hours after an agent's last request in which its prompts keep the chat "
        "template's date; 0: none",
    )
    default_max_tokens: _Tokens = Field(
        2048, ge=1, description="Tokens of an answer where a request names no limit"
    )
    generic_tools: bool = Field(
        True,
        description="Describe tools in the system's text to models whose template knows none",
    )
    model_sampling: bool = Field(
        True,
        description="Choose tokens by the model's generation_config.json where a request is silent",
    )
    reasoning_alias: bool = Field(
        False, description="Send reasoning as `reasoning` too, not only as `reasoning_content`"
    )
    kv_budget: _BytesOrShare = Field(
        0.6,
        gt=0,
        description="RAM for all caches: a size such as 8G, or a share of what the model leaves of "
        "the device's memory",
    )
    memory_limit: _BytesOrShare = Field(
        0.9,
        gt=0,
        description="RAM of the process, a size or a share of all: above it idle caches go, then "
        "new requests get 503",
    )
    trace: Annotated[Path | None, Unit("FILE")] = Field(
        None, description="File for a trace of every step and restore (Chrome trace events)"
    )
    tail_delay: _Seconds = Field(
        3.0,
        ge=0,
        description="Seconds of rest after which an agent's tail is written, if "
        "write_amplification allows",
    )
    write_amplification: _Ratio = Field(
        1.25,
        ge=1,
        description="Bytes written over bytes stored, of one conversation: above it tails wait for "
        "eviction or stop",
    )
    store_quota: _BytesOrShare = Field(
        0.2,
        gt=0,
        description="Disk for all stores: a size, or a share of the disk; the least recently used "
        "leaves",
    )
    store_min_free: _BytesOrShare = Field(
        1 << 30, ge=0, description="Space that the store leaves free on its disk"
    )
    encrypt: bool = Field(
        False, description="Encrypt what is stored: AES-256-GCM, with a key for each agent"
    )
    key_file: Annotated[Path | None, Unit("FILE")] = Field(
        None,
        description="Master key of --encrypt, 64 hex digits, made if need be; by default it is in "
        "the macOS keychain",
    )
    grace: _Seconds = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that running answers get to finish at shutdown",
    )
    max_body: _Bytes = Field(8 << 20, ge=1024, description="Largest request body, such as 8M")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level of what is logged"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    @property
    def home_dir(self) -> Path:
        return self.home.expanduser().resolve()

    @property
    def store_dir(self) -> Path:
        return self.home_dir / "store"


def default_text(name: str) -> str | None:
    """Return a setting's default as a user would write it; None: it has none, or its help says it.

    1073741824 is "1G" where the setting is a size, and 0.6 is "60%".
    """
    field = Settings.model_fields[name]
    if field.default in (None, []):
        return None
    if field.annotation == int | float and isinstance(field.default, float):
        return f"{field.default:.0%}"
    if any(isinstance(rule, BeforeValidator) for rule in field.metadata):
        return _size_text(field.default)
    return str(field.default)


def _size_text(nbytes: int) -> str:
    """Write bytes in the largest unit of which they are a whole number: 8388608 is "8M"."""
    fitting = [unit for unit, factor in _UNITS.items() if nbytes % factor == 0]
    unit = fitting[-1] if nbytes else ""
    return f"{nbytes // _UNITS[unit]}{unit.upper()}"


def load_settings(flags: dict[str, Any], config: Path | None = None) -> Settings:
    """Merge the sources.

    Raise StartupError, in one line, that names the setting, where it came from, and what would be
    right.
    """
    from_file = _read_toml(config) if config else {}
    from_env = {name for name in Settings.model_fields if _variable(name) in os.environ}
    from_flags = {name: value for name, value in flags.items() if value is not None}
    values = {name: value for name, value in from_file.items() if name not in from_env}
    try:
        return Settings(**values | from_flags)
    except ValidationError as e:
        origins = {name: f"{config}: {name} = {_plain(value)}" for name, value in values.items()}
        for name in from_env:
            origins[name] = f"{_variable(name)}={_plain(os.environ[_variable(name)])}"
        for name, value in from_flags.items():
            origins[name] = f"--{name.replace('_', '-')} {_plain(value)}"
        problems = [_problem(error, origins) for error in e.errors()]
        raise StartupError(f"settings: {'; '.join(problems)}") from None


def _problem(error: ErrorDetails, origins: dict[str, str]) -> str:
    """Write what is wrong with one setting. `origins`: each as its user wrote it, and where."""
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(name, Settings.model_fields, n=1)
        help_command = f"{program()} serve --help lists them all"
        advice = f"did you mean {near[0]}?" if near else help_command
        return f"there is no setting {name}: {advice} ({origins[name]})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message} ({origins[name]})"


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)


def _variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"AGENTMEM_{name.upper()}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise StartupError(f"--config {path}: {e}") from None
