"""Protocols: the stories a run can tell. Importing this package registers the built-in ones."""

from pegbox.protocols.meta import Meta
from pegbox.protocols.posthoc import Posthoc
from pegbox.protocols.sequence import Sequence
from pegbox.protocols.single import Single
from pegbox.protocols.staged import Staged

__all__ = ["Meta", "Posthoc", "Sequence", "Single", "Staged"]
