"""Circuits: the attention heads that do a task, and what fine-tuning changed in them. Registers "circuits".

`heads`, `prompts`, `activations` read and write; `passes` runs many variants at once; `paths`, `discover`, `pruning`
find; `circuit`, `judging` measure; `masks` and `desiderata` tell what a group carries; `cross` moves activations
between models; `cutting` knocks attention out; `estimate` estimates path scores.
"""

from pegbox.analyze.circuits.activations import Cache, Patch, accuracy, capture, edited, last_logits
from pegbox.analyze.circuits.analysis import Circuits
from pegbox.analyze.circuits.circuit import Ablation, Circuit, Group, Means, head_means
from pegbox.analyze.circuits.cross import cross_accuracy, cross_logits, gap_closed
from pegbox.analyze.circuits.cutting import knockout
from pegbox.analyze.circuits.desiderata import DESIDERATA, desideratum
from pegbox.analyze.circuits.discover import BOX_CASCADE, Discovery, Stage, cascade
from pegbox.analyze.circuits.estimate import attribution, rank_correlation
from pegbox.analyze.circuits.heads import Head, HeadView, Site, lora_rank_sites, mlp_sites
from pegbox.analyze.circuits.judging import completeness, faithfulness, minimality, random_circuits
from pegbox.analyze.circuits.masks import Part, Triples, head_parts, learn_mask, patched_accuracy
from pegbox.analyze.circuits.paths import PathScores, path_patching
from pegbox.analyze.circuits.prompts import Prompts
from pegbox.analyze.circuits.pruning import Pruned, prune
from pegbox.analyze.circuits.templates import Marked, marked_prompts

__all__ = [
    "BOX_CASCADE", "DESIDERATA", "Ablation", "Cache", "Circuit", "Circuits", "Discovery", "Group", "Head", "HeadView",
    "Marked", "Means", "Part", "Patch", "PathScores", "Prompts", "Pruned", "Site", "Stage", "Triples", "accuracy",
    "attribution", "capture", "cascade", "completeness", "cross_accuracy", "cross_logits", "desideratum", "edited",
    "faithfulness", "gap_closed", "head_means", "head_parts", "knockout", "last_logits", "learn_mask",
    "lora_rank_sites", "marked_prompts", "minimality", "mlp_sites", "patched_accuracy", "path_patching", "prune",
    "random_circuits", "rank_correlation",
]  # fmt: skip
