"""How alembic reaches the database: on the connection, and in the transaction, that `registry.db.schema` opened."""

from alembic import context
from sqlalchemy import func, select

from registry.db.tables import Table

connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    # An upgrade that waits for a lock holds up everybody behind it: better to fail and to be started again.
    connection.execute(select(func.set_config("lock_timeout", "10s", True)))
    connection.execute(select(func.set_config("statement_timeout", "15min", True)))
context.configure(
    connection=connection,
    target_metadata=Table.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
