"""Everything the database can be asked and told, within one transaction.

Takes and returns the frozen values of `registry.manifest`. Authors and times are passed in. Sessions come from `registry.db.schema`; what
is changed is kept when the caller's transaction ends well.
"""

from __future__ import annotations

from typing import final

from sqlalchemy.orm import Session

from registry.db.audit import Events
from registry.db.bases import Bases
from registry.db.blobs import Blobs
from registry.db.checkpoints import Checkpoints
from registry.db.condemned import Condemned
from registry.db.jobs import Jobs
from registry.db.leases import Leases
from registry.db.merged import MergedModels
from registry.db.needs import Needs
from registry.db.overview import Overview
from registry.db.policies import Policies
from registry.db.recipes import Recipes
from registry.db.replies import Replies
from registry.db.repositories import Repositories
from registry.db.shipments import Shipments
from registry.db.sign_ins import SignIns
from registry.db.signatures import Signatures
from registry.db.tokens import Tokens
from registry.db.vitals import Vitals
from registry.db.webhooks import Webhooks


@final
class Catalog:
    """The catalog, by subject."""

    def __init__(self, session: Session) -> None:
        self.checkpoints = Checkpoints(session)
        self.overview = Overview(session)
        self.bases = Bases(session)
        self.merged = MergedModels(session)
        self.recipes = Recipes(session)
        self.repositories = Repositories(session)
        self.shipments = Shipments(session)
        self.blobs = Blobs(session)
        self.needs = Needs(session)
        self.condemned = Condemned(session)
        self.vitals = Vitals(session)
        self.events = Events(session)
        self.jobs = Jobs(session)
        self.webhooks = Webhooks(session)
        self.signatures = Signatures(session)
        self.policies = Policies(session)
        self.tokens = Tokens(session)
        self.sign_ins = SignIns(session)
        self.leases = Leases(session)
        self.replies = Replies(session)
