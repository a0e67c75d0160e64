"""Settings: CLI flag > AGENTMEM_* environment > --config file (TOML) > default. Each default is
written once, here.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from .errors import StartupError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(value: Any) -> Any:
    """ "512M", "8 GiB", "1.5g" or a number of bytes, to bytes (binary units)."""
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
    """ "60%" to 0.6; anything else as `parse_bytes`."""
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
    """Bytes of a setting that is a number of bytes, or, as a float up to 1, a share of `whole`."""
    return int(size * whole) if isinstance(size, float) and size <= 1 else int(size)


def _split_commas(value: Any) -> Any:
    """ "a,b" to two; so is ["a,b"], which a flag gives."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return value
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def _multiple_of_32(value: int) -> int:
    if value % 32:
        raise ValueError(f"must be a multiple of 32, is {value}")
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
BytesOrShare = Annotated[int | float, BeforeValidator(parse_share)]


class Settings(BaseSettings):
    """What `agentmem serve` can be told. Unknown names are refused."""

    model_config = SettingsConfigDict(env_prefix="AGENTMEM_", extra="forbid")

    model: str = Field("demo", description="'demo', a directory with an MLX model, or a hub name")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    home: Path = Field(Path("~/.agentmem"), description="directory that holds models and stores")
    allowed_hosts: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default=[],
        description="further Host header values to accept (default: the listening address and localhost)",
    )
    api_keys: Path | None = Field(
        None,
        description="TOML file that gives each namespace its key or keys "
        "(default: no key needed, all in the namespace 'default')",
    )

    kv_bits: Literal["4", "k5v3", "k5v4", "8", "16"] = Field(
        "4",
        description="bits of a sealed block: 4, 8, 16 (the model's own dtype), k5v3 (keys 5, values 3) or k5v4",
    )
    block_size: Annotated[int, AfterValidator(_multiple_of_32)] = Field(
        256, ge=32, le=2048, description="tokens a block"
    )
    state_interval: int | None = Field(
        None,
        ge=32,
        description="tokens between two kept states of a recurrent model, rounded up to blocks (default: where states "
        "take as many bytes as the rest, 4096 at most)",
    )
    sharing: Literal["namespace", "agent"] = Field(
        "namespace",
        description="who may share identical prefix blocks: agents of one namespace, or nobody",
    )
    attention: Literal["auto", "dequantized", "codes"] = Field(
        "auto",
        description="what attention of running sequences reads; auto: measured once per model and device",
    )
    prefill_chunk: int = Field(512, ge=16, le=8192, description="prompt tokens a forward pass")
    max_itl_ms: float | None = Field(
        None,
        gt=0,
        description="longest gap in an answer that others' prefill may cause (default: that of the first 128 tokens)",
    )
    max_running: int = Field(8, ge=1, le=256, description="sequences decoded at once")
    max_queue: int = Field(
        64, ge=1, le=10_000, description="requests waiting; one more is answered 429"
    )
    max_branches: int = Field(
        4,
        ge=1,
        le=64,
        description="branches kept of one agent; the least recently used goes, the longest last",
    )
    max_context: int | None = Field(
        None, ge=16, description="prompt and answer, in tokens (default: the model's)"
    )
    date_session: float = Field(
        24.0,
        ge=0,
        description="hours after an agent's last request in which its prompts keep the chat template's date; 0: none",
    )
    default_max_tokens: int = Field(
        2048, ge=1, description="answer tokens where a request names no limit"
    )
    reasoning_alias: bool = Field(
        False, description="reasoning text as `reasoning` too, not only as `reasoning_content`"
    )
    kv_budget: BytesOrShare = Field(
        0.6,
        gt=0,
        description="RAM for all caches: a size such as 8G, or a share of what the model leaves of the device's memory",
    )
    memory_limit: BytesOrShare = Field(
        0.9,
        gt=0,
        description="of the process: above it idle caches go, then new requests get 503; a size, or a share of RAM",
    )
    trace: Path | None = Field(
        None, description="file for a trace of every step and restore (Chrome trace events)"
    )
    tail_delay: float = Field(
        3.0,
        ge=0,
        description="seconds of rest after which an agent's tail is written, if write_amplification allows",
    )
    write_amplification: float = Field(
        1.25,
        ge=1,
        description="bytes written over bytes stored, of one conversation: above it tails wait for eviction or stop",
    )
    store_quota: BytesOrShare = Field(
        0.2,
        gt=0,
        description="disk for all stores: a size, or a share of the disk; the least recently used leaves",
    )
    store_min_free: BytesOrShare = Field(
        1 << 30, ge=0, description="what the store leaves free on its disk"
    )
    encrypt: bool = Field(
        False, description="encrypt what is stored: AES-256-GCM, with a key for each agent"
    )
    key_file: Path | None = Field(
        None,
        description="master key of --encrypt, 64 hex digits, made if need be (default: the macOS keychain)",
    )
    grace: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds that running answers get to finish at shutdown",
    )
    max_body: Bytes = Field(8 << 20, ge=1024, description="largest request body, such as 8M")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="log level")

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


def load_settings(flags: dict[str, Any], config: Path | None = None) -> Settings:
    """Merge the sources. Raises StartupError, in one line, that names the setting and what would be
    right.
    """
    from_env = {name for name in Settings.model_fields if f"AGENTMEM_{name.upper()}" in os.environ}
    values = {k: v for k, v in _read_toml(config).items() if k not in from_env} if config else {}
    values |= {k: v for k, v in flags.items() if v is not None}
    try:
        return Settings(**values)
    except ValidationError as e:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in e.errors())
        raise StartupError(f"settings: {problems}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise StartupError(f"--config {path}: {e}") from None
