"""The registry over HTTP: a thin shell. A route parses, sees whether one may, calls one verb of the registry, and answers what it gives.

app          puts it together and runs it
boundary     what surrounds every request: its id, logs and figures, which hosts and origins, how many at once
answering    one request: who asks, arguments, the verb, the answer with its tag; keys that make a write happen once
authority    tokens, and who asks without one
scope        the registry as somebody may see and change it
routing      the table of routes
problems     errors as answers
schemas      JSON schemas of the domain's values; openapi: the document; reference: the page
checkpoints, bases, work, shipping, uploads, keeping       the routes, by subject; bodies: what they take and answer
"""

from registry.server.app import create_app

__all__ = ["create_app"]
