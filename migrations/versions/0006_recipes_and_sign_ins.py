"""Recipes that are kept without being carried out, and who has signed in to the pages.

Phase: expand.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def _text(length: int | None = None) -> Any:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    """Create the tables; nothing that was there changes."""
    op.create_table(
        "recipes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", _text(64), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("note", _text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("author", _text(), nullable=False),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_recipes_digest_length")),
        sa.CheckConstraint("length(note) <= 20000", name=op.f("ck_recipes_note_length")),
        sa.CheckConstraint("length(author) <= 400", name=op.f("ck_recipes_author_length")),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name=op.f("fk_recipes_base_id_bases"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recipes")),
        sa.UniqueConstraint("digest", name=op.f("uq_recipes_digest")),
    )
    op.create_index(op.f("ix_recipes_base_id"), "recipes", ["base_id"])
    op.create_table(
        "recipe_inputs",
        sa.Column("recipe_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.CheckConstraint("position >= 0", name=op.f("ck_recipe_inputs_position_not_negative")),
        sa.ForeignKeyConstraint(
            ["recipe_id"], ["recipes.id"], name=op.f("fk_recipe_inputs_recipe_id_recipes"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name=op.f("fk_recipe_inputs_checkpoint_id_checkpoints"),
            ondelete="RESTRICT",
        ),
        sa.PrimaryKeyConstraint("recipe_id", "position", name=op.f("pk_recipe_inputs")),
    )
    op.create_index(op.f("ix_recipe_inputs_checkpoint_id"), "recipe_inputs", ["checkpoint_id"])
    op.create_table(
        "sign_ins",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("secret_sha256", _text(64), nullable=False),
        sa.Column("token_id", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(secret_sha256) = 64", name=op.f("ck_sign_ins_secret_sha256_length")),
        sa.ForeignKeyConstraint(
            ["token_id"], ["tokens.id"], name=op.f("fk_sign_ins_token_id_tokens"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sign_ins")),
        sa.UniqueConstraint("secret_sha256", name=op.f("uq_sign_ins_secret_sha256")),
    )
    op.create_index(op.f("ix_sign_ins_expires_at"), "sign_ins", ["expires_at"])


def downgrade() -> None:
    """Drop them."""
    for table in ("sign_ins", "recipe_inputs", "recipes"):
        op.drop_table(table)
