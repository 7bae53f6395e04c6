"""The registry of adapter checkpoints as a library.

    import registry

    with registry.connect() as ckpt:
        best = ckpt.resolve("support-bot@best:eval_loss")
        ckpt.ship(best, "production", note="beats v11 on the hard set")

Importing this is light: the database, the store and torch are loaded when something needs them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from registry.errors import RegistryError
from registry.settings import Settings

if TYPE_CHECKING:
    from registry.service import Registry

__all__ = ["RegistryError", "Settings", "connect"]


def connect(settings: Settings | None = None) -> Registry:
    """Open the registry that the settings name; those of the environment when None.

    Nothing is created or read before the first call of a method.

    Where they name a server, it is that one's, with the same verbs.

    Raises:
        InvalidSetting: the settings file or a variable cannot be used.
    """
    settings = settings or Settings.from_environment(os.environ)
    if settings.server:
        from registry.client import RemoteRegistry  # noqa: PLC0415 - keeps `import registry` and `ckpt --help` light

        # One test compares both classes, verb by verb; a third list of them would have to be compared as well.
        return cast("Registry", RemoteRegistry(settings))
    from registry.service import Registry  # noqa: PLC0415 - as above

    return Registry(settings)
