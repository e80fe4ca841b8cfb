"""What can't be seen in a model's shapes: the names that projections go by, and per architecture the rest.

`ROLES` and `GROUPS` hold the field's usual names and serve any model. `ENTRIES` holds what one architecture needs
beyond them, by `config.model_type`; third parties add theirs with `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["CATEGORY_OF", "ENTRIES", "GROUPS", "ROLES", "Entry", "register"]

# leaf module name -> role, inside an attention or an MLP
ROLES: dict[str, dict[str, str]] = {
    "attention": {
        **dict.fromkeys(["q_proj", "query", "q", "q_lin", "wq", "to_q", "q_a_proj", "q_b_proj"], "q"),
        **dict.fromkeys(["k_proj", "key", "k", "k_lin", "wk", "to_k"], "k"),
        **dict.fromkeys(["v_proj", "value", "v", "v_lin", "wv", "to_v"], "v"),
        **dict.fromkeys(["kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"], "kv"),
        **dict.fromkeys(["qkv_proj", "query_key_value", "c_attn", "qkv", "wqkv", "Wqkv", "W_pack", "in_proj"], "qkv"),
        **dict.fromkeys(["o_proj", "out_proj", "o", "out_lin", "wo", "c_proj", "to_out", "proj"], "o"),
    },
    "mlp": {
        **dict.fromkeys(["gate_proj", "wi_0", "w1"], "gate"),
        **dict.fromkeys(["up_proj", "wi_1", "wi", "w3", "fc1", "c_fc", "dense_h_to_4h", "lin1", "fc_in"], "up"),
        **dict.fromkeys(["down_proj", "wo", "w2", "fc2", "c_proj", "dense_4h_to_h", "lin2", "fc_out"], "down"),
        **dict.fromkeys(["gate_up_proj", "gate_up"], "gate_up"),
        **dict.fromkeys(["router", "gate", "wg", "shared_expert_gate", "classifier"], "router"),
    },
}

# a piece of an ancestor's name (lower case) -> category; the first match from the inside out wins
GROUPS: dict[str, str] = {
    "attn": "attention",
    "attention": "attention",
    "mlp": "mlp",
    "ffn": "mlp",
    "feed_forward": "mlp",
    "feedforward": "mlp",
    "densereludense": "mlp",
    "intermediate": "mlp",
    "experts": "mlp",
    "moe": "mlp",
    "mixer": "mixer",
    "mamba": "mixer",
    "ssm": "mixer",
}

CATEGORY_OF: dict[str, str] = {
    **{role: category for category, table in ROLES.items() for role in table.values()},
    "router": "router",
}


@dataclass(frozen=True)
class Entry:
    """One architecture's exceptions.

    Args:
        roles: regular expression over a module's path inside its block -> "category/role"; searched in order.
        fused: how the rows of a fused qkv lie: "stacked" (all q, all k, all v), or "grouped" (per KV head its query
            heads, then its key, then its value).
        stacks: dotted names of the block lists, where they can't be found by their look.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    fused: Literal["stacked", "grouped"] = "stacked"
    stacks: tuple[str, ...] = ()


_BERT = Entry(roles={r"^(crossattention|attention)\.output\.dense$": "attention/o", r"^output\.dense$": "mlp/down"})
_GROUPED = Entry(fused="grouped")

ENTRIES: dict[str, Entry] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "camembert": _BERT,
    "xlm-roberta": _BERT,
    "gpt_neox": _GROUPED,
    "bloom": _GROUPED,
    "falcon": _GROUPED,
    "deberta": Entry(roles={r"attention\.self\.in_proj$": "attention/qkv", **_BERT.roles}, fused="grouped"),
    "deberta-v2": _BERT,
}


def register(model_type: str, entry: Entry) -> None:
    """Enter or replace what is known of `config.model_type == model_type`."""
    ENTRIES[model_type] = entry
