"""First tables.

Phase: expand.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table, those that others refer to first."""
    _create_adapters()
    _create_bases()
    _create_blobs()
    _create_events()
    _create_base_blobs()
    _create_checkpoints()
    _create_merged()
    _create_aliases()
    _create_checkpoint_blobs()
    _create_merged_blobs()
    _create_merged_inputs()
    _create_merged_locations()
    _create_metrics()
    _create_notes()
    _create_shipments()
    _create_tags()


def _create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("namespace", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("last_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("last_version >= 0", name=op.f("ck_adapters_last_version_not_negative")),
        sa.CheckConstraint("length(name) <= 96", name=op.f("ck_adapters_name_length")),
        sa.CheckConstraint("length(namespace) <= 96", name=op.f("ck_adapters_namespace_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("namespace", "name", name=op.f("uq_adapters_namespace_name")),
    )


def _create_bases() -> None:
    op.create_table(
        "bases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("in_store", sa.Boolean(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("weights", sa.String(length=64), nullable=False),
        sa.Column("architecture", sa.String(length=64), nullable=False),
        sa.Column("arch_version", sa.String(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.CheckConstraint("format IN ('safetensors', 'litgpt')", name=op.f("ck_bases_format_known")),
        sa.CheckConstraint("length(arch_version) <= 400", name=op.f("ck_bases_arch_version_length")),
        sa.CheckConstraint("length(architecture) = 64", name=op.f("ck_bases_architecture_length")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_bases_author_length")),
        sa.CheckConstraint("length(name) <= 400", name=op.f("ck_bases_name_length")),
        sa.CheckConstraint("length(url) <= 4096", name=op.f("ck_bases_url_length")),
        sa.CheckConstraint("length(weights) = 64", name=op.f("ck_bases_weights_length")),
        sa.CheckConstraint("parameters >= 0", name=op.f("ck_bases_parameters_not_negative")),
        sa.CheckConstraint("size_bytes >= 0", name=op.f("ck_bases_size_bytes_not_negative")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bases")),
        sa.UniqueConstraint("name", name=op.f("uq_bases_name")),
        sa.UniqueConstraint("weights", name=op.f("uq_bases_weights")),
    )


def _create_blobs() -> None:
    op.create_table(
        "blobs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_blobs_digest_length")),
        sa.CheckConstraint("length(sha256) IN (0, 64)", name=op.f("ck_blobs_sha256_length")),
        sa.CheckConstraint("size_bytes >= 0", name=op.f("ck_blobs_size_bytes_not_negative")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_blobs")),
        sa.UniqueConstraint("digest", name=op.f("uq_blobs_digest")),
    )


def _create_events() -> None:
    op.create_table(
        "events",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("previous_hash", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.CheckConstraint("length(action) <= 96", name=op.f("ck_events_action_length")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_events_author_length")),
        sa.CheckConstraint("length(hash) = 64", name=op.f("ck_events_hash_length")),
        sa.CheckConstraint("length(previous_hash) = 64", name=op.f("ck_events_previous_hash_length")),
        sa.CheckConstraint("length(subject) <= 4096", name=op.f("ck_events_subject_length")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_events")),
        sa.UniqueConstraint("hash", name=op.f("uq_events_hash")),
        sa.UniqueConstraint("previous_hash", name=op.f("uq_events_previous_hash")),
    )


def _create_base_blobs() -> None:
    op.create_table(
        "base_blobs",
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("blob_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["base_id"], ["bases.id"], name=op.f("fk_base_blobs_base_id_bases"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["blob_id"], ["blobs.id"], name=op.f("fk_base_blobs_blob_id_blobs"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("base_id", "blob_id", name=op.f("pk_base_blobs")),
    )
    op.create_index(op.f("ix_base_blobs_blob_id"), "base_blobs", ["blob_id"], unique=False)


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("arch_version", sa.String(), nullable=False),
        sa.Column("run", sa.String(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.CheckConstraint("length(arch_version) <= 400", name=op.f("ck_checkpoints_arch_version_length")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_checkpoints_author_length")),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_checkpoints_digest_length")),
        sa.CheckConstraint("length(run) <= 400", name=op.f("ck_checkpoints_run_length")),
        sa.CheckConstraint("length(source) <= 4096", name=op.f("ck_checkpoints_source_length")),
        sa.CheckConstraint("step >= 0", name=op.f("ck_checkpoints_step_not_negative")),
        sa.CheckConstraint("version >= 1", name=op.f("ck_checkpoints_version_from_one")),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_checkpoints_adapter_id_adapters"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["base_id"], ["bases.id"], name=op.f("fk_checkpoints_base_id_bases"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("adapter_id", "digest", name=op.f("uq_checkpoints_adapter_id_digest")),
        sa.UniqueConstraint("adapter_id", "version", name=op.f("uq_checkpoints_adapter_id_version")),
    )
    op.create_index(op.f("ix_checkpoints_adapter_id_step"), "checkpoints", ["adapter_id", "step"], unique=False)
    op.create_index(op.f("ix_checkpoints_base_id"), "checkpoints", ["base_id"], unique=False)
    op.create_index(op.f("ix_checkpoints_digest"), "checkpoints", ["digest"], unique=False)


def _create_merged() -> None:
    op.create_table(
        "merged",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("recipe_digest", sa.String(length=64), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("note", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_merged_author_length")),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_merged_digest_length")),
        sa.CheckConstraint("length(note) <= 20000", name=op.f("ck_merged_note_length")),
        sa.CheckConstraint("length(recipe_digest) = 64", name=op.f("ck_merged_recipe_digest_length")),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name=op.f("fk_merged_base_id_bases"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_merged")),
        sa.UniqueConstraint("recipe_digest", name=op.f("uq_merged_recipe_digest")),
    )
    op.create_index(op.f("ix_merged_base_id"), "merged", ["base_id"], unique=False)
    op.create_index(op.f("ix_merged_digest"), "merged", ["digest"], unique=False)


def _create_aliases() -> None:
    op.create_table(
        "aliases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.CheckConstraint("length(name) <= 96", name=op.f("ck_aliases_name_length")),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_aliases_adapter_id_adapters"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name=op.f("fk_aliases_checkpoint_id_checkpoints"),
            ondelete="RESTRICT",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aliases")),
        sa.UniqueConstraint("adapter_id", "name", name=op.f("uq_aliases_adapter_id_name")),
    )
    op.create_index(op.f("ix_aliases_checkpoint_id"), "aliases", ["checkpoint_id"], unique=False)


def _create_checkpoint_blobs() -> None:
    op.create_table(
        "checkpoint_blobs",
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("blob_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["blob_id"], ["blobs.id"], name=op.f("fk_checkpoint_blobs_blob_id_blobs"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name=op.f("fk_checkpoint_blobs_checkpoint_id_checkpoints"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "blob_id", name=op.f("pk_checkpoint_blobs")),
    )
    op.create_index(op.f("ix_checkpoint_blobs_blob_id"), "checkpoint_blobs", ["blob_id"], unique=False)


def _create_merged_blobs() -> None:
    op.create_table(
        "merged_blobs",
        sa.Column("merged_id", sa.Integer(), nullable=False),
        sa.Column("blob_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["blob_id"], ["blobs.id"], name=op.f("fk_merged_blobs_blob_id_blobs"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["merged_id"], ["merged.id"], name=op.f("fk_merged_blobs_merged_id_merged"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("merged_id", "blob_id", name=op.f("pk_merged_blobs")),
    )
    op.create_index(op.f("ix_merged_blobs_blob_id"), "merged_blobs", ["blob_id"], unique=False)


def _create_merged_inputs() -> None:
    op.create_table(
        "merged_inputs",
        sa.Column("merged_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.CheckConstraint("position >= 0", name=op.f("ck_merged_inputs_position_not_negative")),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name=op.f("fk_merged_inputs_checkpoint_id_checkpoints"),
            ondelete="RESTRICT",
        ),
        sa.ForeignKeyConstraint(
            ["merged_id"], ["merged.id"], name=op.f("fk_merged_inputs_merged_id_merged"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("merged_id", "position", name=op.f("pk_merged_inputs")),
    )
    op.create_index(op.f("ix_merged_inputs_checkpoint_id"), "merged_inputs", ["checkpoint_id"], unique=False)


def _create_merged_locations() -> None:
    op.create_table(
        "merged_locations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("merged_id", sa.Integer(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.CheckConstraint("length(url) <= 4096", name=op.f("ck_merged_locations_url_length")),
        sa.ForeignKeyConstraint(
            ["merged_id"], ["merged.id"], name=op.f("fk_merged_locations_merged_id_merged"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_merged_locations")),
        sa.UniqueConstraint("merged_id", "url", name=op.f("uq_merged_locations_merged_id_url")),
    )


def _create_metrics() -> None:
    op.create_table(
        "metrics",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("split", sa.String(), nullable=False),
        sa.Column("direction", sa.String(), nullable=True),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.CheckConstraint("direction IN ('lower', 'higher')", name=op.f("ck_metrics_direction_known")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_metrics_author_length")),
        sa.CheckConstraint("length(name) <= 400", name=op.f("ck_metrics_name_length")),
        sa.CheckConstraint("length(split) <= 400", name=op.f("ck_metrics_split_length")),
        sa.CheckConstraint("step >= 0", name=op.f("ck_metrics_step_not_negative")),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_metrics_checkpoint_id_checkpoints"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_metrics")),
    )
    op.create_index(op.f("ix_metrics_checkpoint_id"), "metrics", ["checkpoint_id"], unique=False)


def _create_notes() -> None:
    op.create_table(
        "notes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_notes_author_length")),
        sa.CheckConstraint("length(text) <= 20000", name=op.f("ck_notes_text_length")),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_notes_checkpoint_id_checkpoints"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notes")),
    )
    op.create_index(op.f("ix_notes_checkpoint_id"), "notes", ["checkpoint_id"], unique=False)


def _create_shipments() -> None:
    op.create_table(
        "shipments",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("environment", sa.String(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("merged_id", sa.Integer(), nullable=True),
        sa.Column("note", sa.String(), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.Column("shipped_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("restores", sa.Integer(), nullable=True),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_shipments_author_length")),
        sa.CheckConstraint("length(environment) <= 96", name=op.f("ck_shipments_environment_length")),
        sa.CheckConstraint("length(note) <= 20000", name=op.f("ck_shipments_note_length")),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name=op.f("fk_shipments_checkpoint_id_checkpoints"),
            ondelete="RESTRICT",
        ),
        sa.ForeignKeyConstraint(
            ["merged_id"], ["merged.id"], name=op.f("fk_shipments_merged_id_merged"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["restores"], ["shipments.id"], name=op.f("fk_shipments_restores_shipments"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shipments")),
    )
    op.create_index(op.f("ix_shipments_checkpoint_id"), "shipments", ["checkpoint_id"], unique=False)
    op.create_index(op.f("ix_shipments_environment"), "shipments", ["environment"], unique=False)
    op.create_index(op.f("ix_shipments_merged_id"), "shipments", ["merged_id"], unique=False)


def _create_tags() -> None:
    op.create_table(
        "tags",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.CheckConstraint("length(key) <= 96", name=op.f("ck_tags_key_length")),
        sa.CheckConstraint("length(value) <= 20000", name=op.f("ck_tags_value_length")),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_tags_checkpoint_id_checkpoints"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tags")),
        sa.UniqueConstraint("checkpoint_id", "key", name=op.f("uq_tags_checkpoint_id_key")),
    )


def downgrade() -> None:
    """Drop every table, those that refer to others first."""
    for table in (
        "tags",
        "shipments",
        "notes",
        "metrics",
        "merged_locations",
        "merged_inputs",
        "merged_blobs",
        "checkpoint_blobs",
        "aliases",
        "merged",
        "checkpoints",
        "base_blobs",
        "events",
        "blobs",
        "bases",
        "adapters",
    ):
        op.drop_table(table)
