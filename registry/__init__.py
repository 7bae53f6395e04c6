"""The registry of adapter checkpoints as a library.

    import registry

    with registry.connect() as ckpt:
        best = ckpt.resolve("support-bot@best:eval_loss")
        ckpt.ship(best, "production", note="beats v11 on the hard set")

Importing this is light: the database, the store and torch are loaded when something needs them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from registry.errors import RegistryError
from registry.settings import Settings

if TYPE_CHECKING:
    from registry.service import Registry

__all__ = ["RegistryError", "Settings", "connect"]


def connect(settings: Settings | None = None) -> Registry:
    """Open the registry that the settings name; those of the environment when None.

    Nothing is created or read before the first call of a method.

    Raises:
        InvalidSetting: the settings file or a variable cannot be used.
    """
    from registry.service import Registry  # noqa: PLC0415 - keeps `import registry` and `ckpt --help` light

    return Registry(settings or Settings.from_environment(os.environ))
