"""The registry inside other programs: they load these modules, nothing here does."""
