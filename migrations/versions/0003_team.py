"""For teams: tokens, jobs with their shards and logs, leases and condemned blobs, replies, webhooks and their deliveries, signatures.

Phase: expand.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the tables; nothing that was there changes."""
    op.create_table(
        "condemned",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("marked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("is_deleting", sa.Boolean(), nullable=False),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_condemned_digest_length")),
        sa.CheckConstraint("size_bytes >= 0", name=op.f("ck_condemned_size_bytes_not_negative")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_condemned")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("arguments", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("what", sa.String(), nullable=False),
        sa.Column("done_bytes", sa.BigInteger(), nullable=False),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("is_cancel_wanted", sa.Boolean(), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_jobs_state_known")
        ),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_jobs_attempts_not_negative")),
        sa.CheckConstraint("done_bytes >= 0", name=op.f("ck_jobs_done_bytes_not_negative")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_jobs_author_length")),
        sa.CheckConstraint("length(kind) <= 96", name=op.f("ck_jobs_kind_length")),
        sa.CheckConstraint("length(subject) <= 4096", name=op.f("ck_jobs_subject_length")),
        sa.CheckConstraint("length(what) <= 400", name=op.f("ck_jobs_what_length")),
        sa.CheckConstraint("total_bytes >= 0", name=op.f("ck_jobs_total_bytes_not_negative")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index(op.f("ix_jobs_state"), "jobs", ["state"], unique=False)
    op.create_table(
        "leases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_leases_digest_length")),
        sa.CheckConstraint("length(holder) <= 400", name=op.f("ck_leases_holder_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leases")),
        sa.UniqueConstraint("digest", "holder", name=op.f("uq_leases_digest_holder")),
    )
    op.create_index(op.f("ix_leases_expires_at"), "leases", ["expires_at"], unique=False)
    op.create_table(
        "replies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(holder) <= 400", name=op.f("ck_replies_holder_length")),
        sa.CheckConstraint("length(key) <= 400", name=op.f("ck_replies_key_length")),
        sa.CheckConstraint("length(request) = 64", name=op.f("ck_replies_request_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_replies")),
        sa.UniqueConstraint("holder", "key", name=op.f("uq_replies_holder_key")),
    )
    op.create_index(op.f("ix_replies_created_at"), "replies", ["created_at"], unique=False)
    op.create_table(
        "signatures",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("subject_digest", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("bundle", sa.JSON(), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.CheckConstraint("kind IN ('content', 'provenance')", name=op.f("ck_signatures_kind_known")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_signatures_author_length")),
        sa.CheckConstraint("length(key_sha256) = 64", name=op.f("ck_signatures_key_sha256_length")),
        sa.CheckConstraint("length(subject_digest) = 64", name=op.f("ck_signatures_subject_digest_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signatures")),
        sa.UniqueConstraint(
            "subject_digest", "kind", "key_sha256", name=op.f("uq_signatures_subject_digest_kind_key_sha256")
        ),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("namespaces", sa.JSON(), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("ending", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("role IN ('reader', 'writer', 'shipper', 'admin')", name=op.f("ck_tokens_role_known")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_tokens_author_length")),
        sa.CheckConstraint("length(name) <= 96", name=op.f("ck_tokens_name_length")),
        sa.CheckConstraint("length(secret_sha256) = 64", name=op.f("ck_tokens_secret_sha256_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("name", name=op.f("uq_tokens_name")),
        sa.UniqueConstraint("secret_sha256", name=op.f("uq_tokens_secret_sha256")),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("actions", sa.JSON(), nullable=False),
        sa.Column("secret", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_webhooks_author_length")),
        sa.CheckConstraint("length(secret) <= 400", name=op.f("ck_webhooks_secret_length")),
        sa.CheckConstraint("length(url) <= 4096", name=op.f("ck_webhooks_url_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("webhook_id", sa.Integer(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('queued', 'delivered', 'failed')", name=op.f("ck_deliveries_state_known")),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_deliveries_attempts_not_negative")),
        sa.CheckConstraint("length(action) <= 96", name=op.f("ck_deliveries_action_length")),
        sa.CheckConstraint("length(error) <= 20000", name=op.f("ck_deliveries_error_length")),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name=op.f("fk_deliveries_webhook_id_webhooks"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
    )
    op.create_index(op.f("ix_deliveries_webhook_id"), "deliveries", ["webhook_id"], unique=False)
    op.create_index(op.f("ix_deliveries_state"), "deliveries", ["state"], unique=False)
    op.create_table(
        "job_lines",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.CheckConstraint("length(text) <= 20000", name=op.f("ck_job_lines_text_length")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_lines_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_lines")),
    )
    op.create_index(op.f("ix_job_lines_job_id"), "job_lines", ["job_id"], unique=False)
    op.create_table(
        "shards",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column("done_bytes", sa.BigInteger(), nullable=False),
        sa.Column("entry", sa.JSON(), nullable=True),
        sa.Column("records", sa.JSON(), nullable=True),
        sa.CheckConstraint("state IN ('queued', 'running', 'finished')", name=op.f("ck_shards_state_known")),
        sa.CheckConstraint("attempt >= 0", name=op.f("ck_shards_attempt_not_negative")),
        sa.CheckConstraint("done_bytes >= 0", name=op.f("ck_shards_done_bytes_not_negative")),
        sa.CheckConstraint("length(path) <= 4096", name=op.f("ck_shards_path_length")),
        sa.CheckConstraint("length(worker) <= 400", name=op.f("ck_shards_worker_length")),
        sa.CheckConstraint("position >= 0", name=op.f("ck_shards_position_not_negative")),
        sa.CheckConstraint("size_bytes >= 0", name=op.f("ck_shards_size_bytes_not_negative")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_shards_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "position", name=op.f("pk_shards")),
    )


def downgrade() -> None:
    """Drop them."""
    for table in (
        "signatures",
        "deliveries",
        "webhooks",
        "replies",
        "job_lines",
        "shards",
        "jobs",
        "condemned",
        "leases",
        "tokens",
    ):
        op.drop_table(table)
