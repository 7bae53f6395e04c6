"""The endpoint for clients of the Hugging Face Hub: `HF_ENDPOINT=http://host:port`, and they find the registry's repositories.

routing    the table of what is answered, and the route object that looks things up in it
answers    what clients are told, as they read it
reading    repositories, their files and their histories
sending    uploads, which register ─ commits (as they stream in), pushing (what becomes of them), tickets (for large files)
browsing   what a browser is shown at a repository's address
"""

from registry.server.hub.reading import hub as _reading
from registry.server.hub.sending import hub as _sending

RULES = (*_reading, *_sending)
