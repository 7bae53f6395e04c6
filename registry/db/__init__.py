"""The database: the only place that knows SQL.

`schema` opens it, keeps it up to date and bounds transactions; `catalog` asks and records, in the values of `registry.manifest`; `audit`
keeps the chain of events. `tables` is private to this package.
"""
