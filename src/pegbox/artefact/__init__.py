"""What a run leaves: an ordered list of parts on a fingerprinted root; written whole, checked, and loaded again."""

from pegbox.artefact.card import CardInfo, DataEntry, render_card
from pegbox.artefact.libraries import versions
from pegbox.artefact.load import load_artefact, read_parts, register_reader, settle
from pegbox.artefact.manifest import Manifest, Part, Root, artefact_folder, check_base, read
from pegbox.artefact.pool import Pool, RoleModel
from pegbox.artefact.writer import ArtefactWriter, root_of, stop_ids_of

__all__ = [
    "ArtefactWriter",
    "CardInfo",
    "DataEntry",
    "Manifest",
    "Part",
    "Pool",
    "RoleModel",
    "Root",
    "artefact_folder",
    "check_base",
    "load_artefact",
    "read",
    "read_parts",
    "register_reader",
    "render_card",
    "root_of",
    "settle",
    "stop_ids_of",
    "versions",
]
