"""The database's tables, and how a database is opened: SQLite's file or a PostgreSQL server."""

import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Dialect,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

BUSY_SECONDS = 10  # another process may be writing


class _Utc(TypeDecorator[datetime]):
    """SQLite keeps no time zone: what goes in and comes out is UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("home", String(32), nullable=False),
    Column("status", String(16), nullable=False),
    Column("wanted", String(8)),
    Column("model", String(63), nullable=False),
    Column("version", String(9), nullable=False),
    Column("name", String(63), nullable=False),
    Column("dataset", String(64), nullable=False),  # an id, or a built-in set's name
    Column("dataset_limit", Integer),
    Column("seed", BigInteger, nullable=False),
    Column("promote", String(16), nullable=False),
    Column("recipe", JSON(none_as_null=True), nullable=False),
    Column("metadata", JSON(none_as_null=True), nullable=False),
    Column("progress", JSON(none_as_null=True)),
    Column("result", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("created_at", _Utc, nullable=False),
    Column("started_at", _Utc),
    Column("finished_at", _Utc),
    Column("seconds", Float, nullable=False, default=0.0),
    Column("deaths", Integer, nullable=False, default=0),
    Column("died_at_step", Integer, nullable=False, default=-1),
    Column("cleared", Boolean, nullable=False, default=False),  # its checkpoint is gone
    Index("jobs_by_home", "home", "status"),
    Index("jobs_by_dataset", "dataset", "status"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("claimed_at", _Utc, nullable=False),
    Column("reply", JSON(none_as_null=True)),  # once there is one
)


ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(7233)"}  # by dialect


def open_database(url: str) -> Engine:
    """Connect, and make the tables where they aren't there. Raises SQLAlchemy's errors."""
    address = make_url(url)
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    engine = create_engine(address, pool_pre_ping=True, json_serializer=_as_json)
    if engine.dialect.name not in ALONE:
        raise ArgumentError(f"{engine.dialect.name} isn't supported; it can begin with sqlite:/// or postgresql://")
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
    try:
        with engine.begin() as connection:
            be_alone(connection)
            metadata.create_all(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def be_alone(connection: Connection) -> None:
    """At a transaction's start: until its end, no other that asked for this goes on."""
    connection.exec_driver_sql(ALONE[connection.dialect.name])


def _as_json(value: object) -> str:
    return json.dumps(_finite(value))


def _finite(value: object) -> object:
    """PostgreSQL's JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _set_up_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    connection.execute("PRAGMA journal_mode = WAL")  # readers don't wait for a writer
    connection.execute("PRAGMA synchronous = FULL")  # what was answered survives a power cut
