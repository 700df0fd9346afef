"""The store's tables, and how its database is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, event
from sqlalchemy.exc import SQLAlchemyError

VERSION = 1  # of the tables
BUSY_SECONDS = 30  # that a writer waits for another one
LOCK = 0x5D17  # of Postgres, held while tables are made

_METADATA = sa.MetaData()
_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")

STORE = sa.Table(  # one row, which submitting locks where the database has no lock for all of it
    "store",
    _METADATA,
    Column("id", sa.Integer, primary_key=True),
    Column("version", sa.Integer, nullable=False),
)
JOBS = sa.Table(
    "jobs",
    _METADATA,
    Column("seq", _NUMBER, primary_key=True),  # the order
    Column("id", sa.String(64), nullable=False, unique=True),
    Column("kind", sa.String(16), nullable=False),
    Column("model", sa.String(256), nullable=False),
    Column("plan", sa.String(256), nullable=False),
    Column("spec", sa.Text, nullable=False),
    Column("status", sa.String(16), nullable=False),
    Column("cancel", sa.Boolean, nullable=False, default=False),
    Column("created_at", sa.Float, nullable=False),
    Column("started_at", sa.Float),
    Column("completed_at", sa.Float),
    Column("expires_at", sa.Float),
    Column("worker", sa.String(64)),
    Column("attempt", sa.Integer, nullable=False, default=0),
    Column("crashes", sa.Integer, nullable=False, default=0),
    Column("progress", sa.Integer, nullable=False, default=0),
    Column("detail", sa.JSON, nullable=False, default=dict),
    Column("result", sa.JSON),
    Column("error", sa.JSON),
    Column("bytes", _NUMBER, nullable=False, default=0),
    Column("idempotency_key", sa.String(256), unique=True),
    Column("fingerprint", sa.String(64)),
    sa.Index("jobs_by_status", "status", "seq"),
    sqlite_autoincrement=True,  # a number is never given twice
)
WORKERS = sa.Table(
    "workers",
    _METADATA,
    Column("id", sa.String(64), primary_key=True),
    Column("model", sa.String(256), nullable=False),
    Column("device", sa.String(64), nullable=False),
    Column("host", sa.String(256), nullable=False),
    Column("pid", sa.Integer, nullable=False),
    Column("started", sa.Float, nullable=False),
    Column("beat", sa.Float, nullable=False),
    Column("state", sa.String(16), nullable=False),
)
TROUBLES = sa.Table(  # came later than the others; a store without it gets it as it is opened
    "troubles",
    _METADATA,
    Column("worker", sa.String(64), primary_key=True),
    Column("host", sa.String(256), nullable=False),
    Column("model", sa.String(256), nullable=False),
    Column("device", sa.String(64), nullable=False),
    Column("at", sa.Float, nullable=False),
    Column("message", sa.Text, nullable=False),
)


def database_url(store: str) -> str:
    """The URL of a store: itself, or that of the SQLite file in a folder of this name."""
    return store if "://" in store else f"sqlite:///{Path(store).absolute() / 'jobs.sqlite'}"


def open_database(url: str, *, durable: bool) -> sa.Engine:
    """Connect, and make the tables where there are none.

    Args:
        url: As SQLAlchemy has it.
        durable: Whether what was written is still there after a power cut, at a `fsync` for each
            transaction. Without, it is after the end of any process. Only SQLite is told.

    Raises:
        ValueError: If the database can't be opened, or has tables of another version.
    """
    try:
        engine = sa.create_engine(url, pool_pre_ping=True)  # as databases are started again too
        if engine.dialect.name == "sqlite":
            _prepare_sqlite(engine, durable)
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":  # or two that make the same tables fail
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            _METADATA.create_all(connection)
            found = connection.execute(sa.select(STORE.c.version)).scalar()
            if found is None:
                connection.execute(sa.insert(STORE).values(id=1, version=VERSION))
    except (SQLAlchemyError, ImportError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = sa.make_url(url).render_as_string(hide_password=True) if "://" in url else url
        raise ValueError(f"the store {where} can't be opened: {first}") from error
    if found not in (None, VERSION):
        raise ValueError(
            f"the store must have tables of version {VERSION}, got {found}: give another store"
        )
    return engine


def _prepare_sqlite(engine: sa.Engine, durable: bool) -> None:
    """Write-ahead log, and transactions that take the right to write as they begin.

    The driver's own transactions begin as readers, and fail where another one has written since.
    """

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Any) -> None:
        if connection.get_execution_options().get("reads"):
            connection.exec_driver_sql("BEGIN")
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
