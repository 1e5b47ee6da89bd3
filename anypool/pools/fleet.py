"""The fleet file: every pool a team holds, the model they serve, and the endpoint in front of them, as TOML.

    [fleet]
    name = "dual"

    [model]
    id = "smollm2-135m-instruct"

    [[pool]]
    name = "here"
    chip = "cpu"
    launcher = "local"

    [pool.engine]
    max_num_seqs = 16

Nothing in the file is ignored: an unknown key, a wrong type or a value out of range is an error that says
what to write instead.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anypool.chips import UnknownChipError, load_chip
from anypool.pools.tables import FleetError, Table, line_numbers, suggestion

LAUNCHERS = ("local", "external")
LAUNCHERS_NOT_YET = ("ray", "kubernetes", "skypilot")
ROLES = ("serve", "train", "multimodal", "agents", "backup")
DTYPES = ("float32", "bfloat16")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TOPOLOGY = re.compile(r"[1-9][0-9]*(x[1-9][0-9]*){0,2}")


@dataclass(frozen=True)
class ModelSpec:
    """Which model the fleet serves. `id` is anything `anypool.models.resolve` takes."""

    id: str
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """What clients call it: the id, or the last part of a path."""
        path = Path(self.id)
        if path.suffix == ".gguf":
            return path.stem
        return path.name if self.id.startswith((".", "/", "~")) else self.id


@dataclass(frozen=True)
class GatewaySettings:
    """The endpoint in front of all pools.

    heartbeat_limit_seconds: how long a worker may give no sign of life before it counts as stalled.
    recovery_seconds: how long a stream without any pool waits for one to come back.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    heartbeat_limit_seconds: float = 5.0
    recovery_seconds: float = 30.0


@dataclass(frozen=True)
class EngineSettings:
    """What a worker's engine is told; None leaves the choice to the worker. Names are the worker's flags."""

    max_num_seqs: int | None = None
    token_budget: int | None = None
    max_model_len: int | None = None
    kv_cache_gib: float | None = None
    max_waiting: int | None = None
    threads: int | None = None

    def flags(self) -> list[str]:
        """As command line arguments of `anypool worker`."""
        arguments: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                arguments += [f"--{field.name.replace('_', '-')}", f"{value}"]
        return arguments


@dataclass(frozen=True)
class PoolSpec:
    """One pool: chips of one kind in one place under one launcher.

    endpoint, api_key_env, model: of an `external` pool; its address without `/v1`, the environment variable
    that holds its key, and the name under which it serves the fleet's model ("" = ask it).
    max_concurrency: how many streams the gateway sends it at most; None = as many as it takes.
    """

    name: str
    chip: str
    topology: str = "1"
    provider: str = ""
    region: str = ""
    launcher: str = "local"
    roles: tuple[str, ...] = ("serve",)
    endpoint: str = ""
    api_key_env: str = ""
    model: str = ""
    max_concurrency: int | None = None
    engine: EngineSettings = EngineSettings()

    @property
    def serves(self) -> bool:
        """Whether `anypool up` uses this pool: all do but those that only train."""
        return self.roles != ("train",)


@dataclass(frozen=True)
class Fleet:
    """A whole fleet file, validated."""

    name: str
    model: ModelSpec
    gateway: GatewaySettings
    pools: tuple[PoolSpec, ...]

    @property
    def serving_pools(self) -> tuple[PoolSpec, ...]:
        """The pools that `anypool up` starts or joins."""
        return tuple(pool for pool in self.pools if pool.serves)

    def only(self, names: Sequence[str] | None) -> Fleet:
        """The fleet with no other pools than these; None leaves all. Raises FleetError for a name it does not have."""
        if not names:
            return self
        known = [pool.name for pool in self.serving_pools]
        for name in names:
            if name not in known:
                raise FleetError(f"fleet {self.name!r} serves from no pool {name!r}{suggestion(name, known)}")
        return replace(self, pools=tuple(pool for pool in self.serving_pools if pool.name in names))


def load_fleet(path: str | Path | None = None) -> Fleet:
    """Reads and validates a fleet file; None gives the default fleet, two pools on this machine.

    Raises FleetError, naming the line, the field, the value and the fix.
    """
    if path is None:
        text = resources.files("anypool.pools").joinpath("default_fleet.toml").read_text(encoding="utf-8")
        return parse_fleet(text, file="default_fleet.toml")
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FleetError(f"{path}: there is no such fleet file{_beside(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"{path}: cannot be read as a fleet file: {error}") from None
    return parse_fleet(text, file=str(path), folder=path.parent)


def parse_fleet(text: str, *, file: str = "fleet", folder: Path | None = None) -> Fleet:
    """The Fleet that `text` describes. `file` is named in errors; `folder` is where `./model` paths start."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FleetError(f"{file}: not valid TOML: {error}") from None
    lines = line_numbers(text)

    def table(name: str, keys: tuple[str, ...], not_yet: tuple[str, ...] = ()) -> Table:
        return Table(
            data.get(name, {}),
            file=file,
            path=name,
            title=f"[{name}]",
            lines=lines,
            keys=keys,
            not_yet=not_yet,
        )

    Table(data, file=file, path="", title="", lines=lines, keys=("fleet", "model", "gateway", "pool"))
    fleet = table("fleet", ("name",), not_yet=("state", "store"))
    pools = data.get("pool", [])
    if isinstance(pools, dict):
        raise FleetError(f"{file}:{lines.get('pool', 1)}: [pool] must be [[pool]]: there is one such table a pool")
    if not isinstance(pools, list) or not pools:
        raise FleetError(f"{file}: no pool: add at least one [[pool]] table with name and chip")
    specs = tuple(_pool(pool, file, index, lines) for index, pool in enumerate(pools))
    for index, spec in enumerate(specs):
        if spec.name in {earlier.name for earlier in specs[:index]}:
            line = lines.get(f"pool[{index}].name", lines.get(f"pool[{index}]"))
            raise FleetError(f"{file}:{line}: two pools are named {spec.name!r}: give each pool its own name")
    if not any(spec.serves for spec in specs):
        raise FleetError(f'{file}: no pool serves: add "serve" to the roles of at least one [[pool]]')
    return Fleet(
        name=fleet.text("name", "fleet", example="dual"),
        model=_model(table("model", ("id", "dtype")), folder),
        gateway=_gateway(table("gateway", tuple(field.name for field in fields(GatewaySettings)))),
        pools=specs,
    )


def api_key(spec: PoolSpec, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key of an external pool, read from the variable it names. Raises FleetError if that is not set."""
    if not spec.api_key_env:
        return None
    if not environment.get(spec.api_key_env):
        raise FleetError(
            f"[[pool]] {spec.name!r}: api_key_env names {spec.api_key_env}, which is not set: "
            f"export {spec.api_key_env}=... or remove api_key_env"
        )
    return environment[spec.api_key_env]


def jax_platform(chip: str) -> str | None:
    """The JAX platform that drives a chip ("h100" -> "cuda"), or None where there is none.

    A local worker is told the platform, so that a missing driver is an error and not a quiet fall back to the CPU.
    Raises UnknownChipError.
    """
    return load_chip(chip).jax_platform


def _chip(table: Table) -> str:
    """A chip's own name, from any of its names."""
    name = table.text("chip", required=True, example="cpu")
    try:
        return load_chip(name).name
    except UnknownChipError as error:
        raise table.error("chip", f"chip = {name!r}: {error}") from None


def _model(table: Table, folder: Path | None) -> ModelSpec:
    model = table.text("id", required=True, example="smollm2-135m-instruct")
    # A path that starts with a dot is meant relative to the file it is written in.
    if folder is not None and model.startswith(("./", "../")):
        model = str((folder / model).resolve())
    return ModelSpec(id=model, dtype=table.choice("dtype", DTYPES, "float32"))


def _gateway(table: Table) -> GatewaySettings:
    default = GatewaySettings()
    port = table.integer("port", default.port, low=0, high=65535, example=8000)
    heartbeat = table.number("heartbeat_limit_seconds", default.heartbeat_limit_seconds, above=0, example=5)
    recovery = table.number("recovery_seconds", default.recovery_seconds, above=0, example=30)
    assert port is not None and heartbeat is not None and recovery is not None
    host = table.text("host", default.host, example=default.host)
    return GatewaySettings(host=host, port=port, heartbeat_limit_seconds=heartbeat, recovery_seconds=recovery)


def _pool(data: Any, file: str, index: int, lines: dict[str, int]) -> PoolSpec:
    named = data.get("name") if isinstance(data, dict) else None
    title = f"[[pool]] {named!r}:" if isinstance(named, str) else f"[[pool]] number {index + 1}:"
    path = f"pool[{index}]"
    keys = tuple(field.name for field in fields(PoolSpec))
    not_yet = ("usd_per_chip_hour", "watts_per_chip", "min_tier")
    table = Table(data, file=file, path=path, title=title, lines=lines, keys=keys, not_yet=not_yet)
    name = table.text("name", required=True, example="cpu-a")
    if not _NAME.fullmatch(name):
        raise table.error("name", f"name = {name!r}: use letters, digits, dots, dashes and underscores only")
    launcher = _launcher(table)
    spec = PoolSpec(
        name=name,
        chip=_chip(table),
        topology=table.text("topology", "1", example="1"),
        provider=table.text("provider", example="google"),
        region=table.text("region", example="us-east5"),
        launcher=launcher,
        roles=table.choices("roles", ROLES, ("serve",)),
        endpoint=_endpoint(table, launcher),
        api_key_env=_environment_name(table, launcher),
        model=table.text("model", example="org/name"),
        max_concurrency=table.integer("max_concurrency", None, low=1, example=64),
        engine=_engine(data.get("engine", {}), table),
    )
    if not _TOPOLOGY.fullmatch(spec.topology):
        raise table.error("topology", f'topology = {spec.topology!r}: write it like "8", "4x4" or "4x4x8"')
    _check_launcher(spec, table)
    return spec


def _launcher(table: Table) -> str:
    launcher = table.text("launcher", "local", example="local")
    if launcher in LAUNCHERS_NOT_YET:
        raise table.error(
            "launcher",
            f"launcher = {launcher!r} is not supported yet: start the worker there yourself and "
            f'join it with launcher = "external" and endpoint = "http://..."',
        )
    if launcher not in LAUNCHERS:
        raise table.error("launcher", f"launcher = {launcher!r} is unknown{suggestion(launcher, LAUNCHERS)}")
    return launcher


def _check_launcher(spec: PoolSpec, table: Table) -> None:
    """What goes with one launcher and not with the other."""
    if spec.launcher == "external":
        if spec.engine != EngineSettings():
            raise table.error("engine", "[pool.engine] is for local pools: an external engine has its own flags")
        return
    if spec.model:
        raise table.error("model", "model is for external pools: a local pool serves the fleet's [model] id")
    if jax_platform(spec.chip) is None:
        fix = 'JAX does not run on it: join what serves there with launcher = "external" and endpoint = "http://..."'
        raise table.error("chip", f"chip = {spec.chip!r}: {fix}")
    if set(spec.topology.split("x")) != {"1"}:
        raise table.error("topology", f'topology = {spec.topology!r}: a local pool runs on one chip so far, use "1"')


def _endpoint(table: Table, launcher: str) -> str:
    if launcher != "external":
        if "endpoint" in table.data:
            raise table.error("endpoint", 'endpoint is for external pools: add launcher = "external" or remove it')
        return ""
    value = table.text("endpoint", required=True, example="http://10.0.0.7:8000")
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise table.error("endpoint", f'endpoint = {value!r}: must be an address such as "http://10.0.0.7:8000"')
    if parts.username or parts.password:
        raise table.error("endpoint", "endpoint holds a password: put it into a variable named by api_key_env")
    # Both spellings are in use: with /v1 as SDKs want their base_url, and without.
    return value.rstrip("/").removesuffix("/v1").rstrip("/")


def _environment_name(table: Table, launcher: str) -> str:
    if launcher != "external" and "api_key_env" in table.data:
        raise table.error("api_key_env", "api_key_env is for external pools: remove it")
    value = table.text("api_key_env", example="UPSTREAM_API_KEY")
    if value and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        # The value itself is not repeated: it may be the key.
        raise table.error(
            "api_key_env",
            'api_key_env must be the name of an environment variable, such as "UPSTREAM_API_KEY"',
        )
    return value


def _engine(data: Any, pool: Table) -> EngineSettings:
    keys = tuple(field.name for field in fields(EngineSettings))
    title = pool.title.replace("[[pool]]", "[pool.engine] of pool")
    path = f"{pool.path}.engine"
    table = Table(data, file=pool.file, path=path, title=title, lines=pool.lines, keys=keys)
    return EngineSettings(
        max_num_seqs=table.integer("max_num_seqs", None, low=1, example=32),
        token_budget=table.integer("token_budget", None, low=16, example=512),
        max_model_len=table.integer("max_model_len", None, low=16, example=2048),
        kv_cache_gib=table.number("kv_cache_gib", None, above=0, example=1),
        max_waiting=table.integer("max_waiting", None, low=0, example=256),
        threads=table.integer("threads", None, low=1, example=2),
    )


def _beside(path: Path) -> str:
    """The fleet files that stand where one was looked for, as a hint."""
    found = sorted(entry.name for entry in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    if not found:
        return ""
    return suggestion(path.name, found)
