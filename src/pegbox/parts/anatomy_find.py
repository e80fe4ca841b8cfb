"""How `Anatomy.of` finds out: unwrap, find the lists of blocks, then give every module its category and role.

A list of blocks is a `ModuleList` (or `Sequential`) whose children are alike and hold at least two matrices each; the
outermost one counts, unless each child holds such a list of its own with attention in it (Swin's stages). Inside a
block a matrix is told by its ancestors' names, then its own, then its shape.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pegbox.parts import anatomy as anatomy_
from pegbox.parts.anatomy_registry import CATEGORY_OF, ENTRIES, GROUPS, ROLES, Entry

__all__ = ["anatomy", "canonical", "linear_shape"]

_WRAPPER_PARTS = re.compile(
    r"(^|\.)(base_layer|original_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)"
)


# ---- unwrapping


def canonical(name: str, prefix: str = "") -> str:
    """Strip what PEFT, compile and FSDP put into names."""
    name = _WRAPPER_PARTS.sub("", name.removeprefix(prefix)).removeprefix(".")
    return name


def _unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """The bare model inside DDP, compile and PEFT wrappers, and the prefix of its names."""
    prefix = ""
    while True:
        inner = None
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = "module"
        elif hasattr(model, "_orig_mod"):
            inner = "_orig_mod"
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            bare = model.get_base_model()  # type: ignore[operator]
            inner = next(name for name, module in model.named_modules() if module is bare)
        if inner is None:
            return model, prefix
        model, prefix = model.get_submodule(inner), f"{prefix}{inner}."


def _is_tuner_layer(module: nn.Module) -> bool:
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # nothing is wrapped by PEFT if it was never imported
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _walk(root: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by actual name, adapters left out."""
    yield name, root
    kept: Mapping[str, nn.Module | None] = root._modules
    if _is_tuner_layer(root) and "base_layer" in root._modules:
        kept = {"base_layer": root._modules["base_layer"]}
    elif "original_module" in root._modules:
        kept = {"original_module": root._modules["original_module"]}
    for key, child in kept.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key)


# ---- modules


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module, also packed or transposed; None for any other."""
    if isinstance(module, nn.Linear) or type(module).__name__ in ("QuantLinear", "HQQLinear"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 2 and type(module).__name__ == "Conv1D":
        return int(weight.shape[1]), int(weight.shape[0])
    return None


def _kind(module: nn.Module) -> str:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if linear_shape(module) is not None:
        return "linear"
    if isinstance(module, nn.Embedding) or (
        isinstance(module, nn.Module) and "Embedding" in type(module).__name__ and set(own) == {"weight"}
    ):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if set(own) <= {"weight", "bias"} and "weight" in own and own["weight"].ndim == 1:
        return "norm"
    return "loose"


# ---- blocks


def _count_linears(module: nn.Module) -> int:
    return sum(linear_shape(m) is not None for _, m in _walk(module))


def _has_attention(module: nn.Module, skip: frozenset[int] = frozenset()) -> bool:
    """Whether a matrix below lies in something called attention, outside the modules in `skip`."""
    if id(module) in skip:
        return False
    for key, child in module._modules.items():
        if child is None or id(child) in skip:
            continue
        if ("attn" in key.lower() or "attention" in key.lower()) and _count_linears(child):
            return True
        if _has_attention(child, skip):
            return True
    return False


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
        return False
    children = list(module)
    shared = set.intersection(*(set(child._modules) for child in children))
    alike = len({type(child) for child in children}) == 1 or bool(shared)
    return alike and all(child._modules and _count_linears(child) >= 2 for child in children)


def _stacks(model: nn.Module, entry: Entry) -> dict[str, nn.Module]:
    if entry.stacks:
        return {name: model.get_submodule(name) for name in entry.stacks}
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if _is_stack(module) and not _holds_stages(module):
            found[name] = module
            return
        for key, child in module._modules.items():
            if child is not None:
                visit(f"{name}.{key}" if name else key, child)

    visit("", model)
    return found


def _holds_stages(module: nn.Module) -> bool:
    """Every child keeps its attention in a list of blocks of its own."""
    for child in module.children():
        inner = [
            m
            for m in child.modules()
            if _is_stack(m) and len({type(b) for b in m.children()}) == 1 and _has_attention(m)
        ]
        if not inner or _has_attention(child, frozenset(map(id, inner))):
            return False
    return True


# ---- categories


def _inside_block(path: str, module: nn.Module, kind: str, width: int, entry: Entry) -> tuple[str, str, str]:
    """(category, role, group path inside the block) of a module by its path inside its block."""
    if kind == "norm":
        return "norm", "norm", ""
    for pattern, meaning in entry.roles.items():
        if re.search(pattern, path):
            category, _, role = meaning.partition("/")
            return category, role, _group(path, category)
    category = _category(path, module, width)
    if category in ("attention", "mlp"):
        role = ROLES[category].get(path.rsplit(".", 1)[-1], "")
        role = _not_router(path, role, module)
        role = role or _role_by_shape(category, linear_shape(module), width)
        category = CATEGORY_OF.get(role, category) if role == "router" else category
        return category, role, _group(path, category)
    return category, "", _group(path, category)


def _category(path: str, module: nn.Module, width: int) -> str:
    *ancestors, leaf = path.split(".")
    for part in reversed(ancestors):
        for sign, category in GROUPS.items():
            if sign in part.lower():
                return category
    for category, table in ROLES.items():
        if leaf in table:
            return category
    shape = linear_shape(module)
    return "mlp" if shape is not None and width in shape and shape[0] != shape[1] else "other"


def _not_router(path: str, role: str, module: nn.Module) -> str:
    """ "gate" is a router in a mixture of experts and a projection in a plain gated MLP."""
    shape = linear_shape(module)
    if role == "router" and path.endswith("gate") and shape is not None and shape[0] >= shape[1]:
        return "gate"
    return role


def _role_by_shape(category: str, shape: tuple[int, int] | None, width: int) -> str:
    if shape is None:
        return ""
    out, into = shape
    if category == "mlp":
        return "up" if out > into else "down" if out < into else ""
    if out > into and out != width:
        return "qkv"
    return "o" if out == width else ""


def _group(path: str, category: str) -> str:
    """The outermost ancestor that bears the category's name, or the direct parent."""
    ancestors = path.split(".")[:-1]
    for depth, part in enumerate(ancestors, start=1):
        if part.isdigit() and depth < len(ancestors):
            continue
        if category == "mlp" and part == "experts" and depth < len(ancestors):
            return ".".join(ancestors[: depth + 1])  # each expert is a group of its own
        if any(sign in part.lower() and found == category for sign, found in GROUPS.items()):
            if "experts" in ancestors[depth:]:
                continue
            return ".".join(ancestors[:depth])
    return ".".join(ancestors)


def _block_width(block: nn.Module) -> int:
    for _, module in _walk(block):
        if _kind(module) == "norm" and module._parameters:
            return int(next(iter(p for p in module._parameters.values() if p is not None)).shape[0])
    return 0


# ---- heads and fused matrices

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def _reading(names: tuple[str, ...], *places: Any) -> int | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _head_sizes(places: list[Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None, int | None]:
    """(heads, KV heads, head size), from shapes as far as they tell, from attributes otherwise."""
    heads, size = _reading(_HEADS, *places), _reading(_SIZES, *places)
    q = shapes["q"][0] if "q" in shapes else None
    if size is None and heads:
        inner = q or (shapes["o"][1] if "o" in shapes else None)
        size = inner // heads if inner else None
    if size and q and q % size == 0:
        heads = q // size
    if "k" in shapes and size:
        return heads, shapes["k"][0] // size, size
    if "qkv" in shapes and size and heads:
        return heads, max((shapes["qkv"][0] // size - heads) // 2, 1), size
    return heads, _reading(_KV_HEADS, *places) or heads, size


def _fused(layout: str, heads: int, kv_heads: int, size: int, out: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Output ranges of q, k, v in a fused matrix; empty where the sizes don't add up."""
    if (heads + 2 * kv_heads) * size != out or heads % kv_heads:
        return {}
    groups = kv_heads if layout == "grouped" else 1
    per_q, per_k = heads // groups * size, kv_heads // groups * size
    starts = [g * (per_q + 2 * per_k) for g in range(groups)]
    return {
        "q": tuple((s, s + per_q) for s in starts),
        "k": tuple((s + per_q, s + per_q + per_k) for s in starts),
        "v": tuple((s + per_q + per_k, s + per_q + 2 * per_k) for s in starts),
    }


def _slices(pieces: list[anatomy_.Piece], places: list[Any], entry: Entry) -> list[anatomy_.Piece]:
    """The same pieces, fused ones with their parts' ranges."""
    from dataclasses import replace

    done = []
    shapes = {p.role: p.shape for p in pieces}
    for piece in pieces:
        if piece.role == "qkv" and piece.kind == "linear":
            heads, kv, size = _head_sizes(places, shapes)
            if heads and kv and size:
                piece = replace(piece, slices=_fused(entry.fused, heads, kv, size, piece.shape[0]))
        elif piece.role == "gate_up" and piece.kind == "linear":
            half = piece.shape[0] // 2
            piece = replace(piece, slices={"gate": ((0, half),), "up": ((half, 2 * half),)})
        done.append(piece)
    return done


# ---- the whole


def anatomy(model: nn.Module) -> anatomy_.Anatomy:
    """See `Anatomy.of`."""
    bare, prefix = _unwrap(model)
    config = getattr(bare, "config", None)
    entry = ENTRIES.get(getattr(config, "model_type", ""), Entry())
    stacks = _stacks(bare, entry)
    modules = {canonical(name): (name, module) for name, module in _walk(bare)}
    pieces = _pieces(bare, modules, {canonical(n): s for n, s in stacks.items()}, entry, config)
    embedding, head = _ends(bare, modules)
    head = head or next((piece.module for piece in reversed(pieces) if piece.category == "head"), None)
    names = {piece.module for piece in pieces} | {p for piece in pieces for p in piece.parameters}
    actual = {
        canonical(inner): prefix + inner
        for name, module in modules.values()
        for inner in [name, *(f"{name}.{p}" if name else p for p in module._parameters)]
    }
    sizes = {canonical(name): len(stack) for name, stack in stacks.items()}  # type: ignore[arg-type]
    return anatomy_.Anatomy(
        pieces=tuple(pieces),
        stacks=sizes,
        blocks=tuple(_blocks(sizes, pieces, modules, config)),
        ties=_ties(modules),
        embedding=embedding,
        head=head,
        width=_width(pieces, embedding, config),
        prefix=prefix,
        wrapped={n: actual[n] for n in names if actual.get(n, prefix + n) != prefix + n},
    )


def _pieces(
    bare: nn.Module,
    modules: Mapping[str, tuple[str, nn.Module]],
    stacks: Mapping[str, nn.Module],
    entry: Entry,
    config: Any,
) -> list[anatomy_.Piece]:
    embedding, head = _ends(bare, modules)
    base = getattr(bare, "base_model", bare)
    body = next((name for name, (_, m) in modules.items() if m is base), "") if base is not bare else ""
    widths = {f"{s}.{i}": _block_width(b) for s, stack in stacks.items() for i, b in enumerate(stack.children())}
    pieces: list[anatomy_.Piece] = []
    seen: set[int] = set()
    passed = False  # whether the last block lies behind us
    for name, (_, module) in modules.items():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        block = _find_block(name, stacks)
        passed = passed or block is not None
        if not own or id(module) in seen:
            continue
        seen.add(id(module))
        kind = _kind(module)
        if block is not None:
            at = f"{block[0]}.{block[1]}"
            path = name.removeprefix(at + ".")
            category, role, group = _inside_block(path, module, kind, widths[at], entry)
            group = f"{at}.{group}" if group else at
        else:
            outside = bool(body) and not f"{name}.".startswith(body + ".")
            category, role = _outside(name, module, kind, outside, passed, embedding, head, bool(stacks))
            group = ""
        pieces += _make(name, module, own, kind, category, role, block, group)
    return _with_slices(pieces, modules, entry, config)


def _make(
    name: str, module: nn.Module, own: Mapping[str, Any], kind: Any, category: str, role: str, block: Any, group: str
) -> list[anatomy_.Piece]:
    """One piece for a module of a known kind, one per parameter otherwise."""
    path = f"{name}." if name else ""
    if kind == "loose":
        table = ROLES.get(category, {})
        return [
            anatomy_.Piece(
                name, kind, category, role or table.get(key, ""), (path + key,), tuple(p.shape), False, block, group
            )
            for key, p in own.items()
        ]
    keys = sorted(own, key=lambda key: key != "weight")
    shape = linear_shape(module) or tuple(own[keys[0]].shape)
    transposed = kind == "linear" and type(module).__name__ == "Conv1D"
    return [anatomy_.Piece(name, kind, category, role, tuple(path + k for k in keys), shape, transposed, block, group)]


def _find_block(name: str, stacks: Mapping[str, nn.Module]) -> tuple[str, int] | None:
    for stack in stacks:
        if name.startswith(stack + "."):
            return stack, int(name.removeprefix(stack + ".").split(".")[0])
    return None


def _outside(
    name: str,
    module: nn.Module,
    kind: str,
    beyond: bool,
    passed: bool,
    embedding: str | None,
    head: str | None,
    blocks: bool,
) -> tuple[str, str]:
    """(category, role) outside the blocks. `beyond`: outside the base model, so part of the head."""
    if name == head:
        return "head", "head"
    if beyond and not (kind == "embedding" and name == embedding):
        return "head", ""
    if kind == "norm":
        return "norm", "final_norm" if passed else "norm"
    if kind == "embedding" or name == embedding or "embed" in name.lower():
        return "embedding", "embedding" if name == embedding else ""
    if kind == "linear" and blocks and passed and "." not in name:
        return "head", "head"
    return "other", ""


def _ends(bare: nn.Module, modules: Mapping[str, tuple[str, nn.Module]]) -> tuple[str | None, str | None]:
    """Names of the input embedding and the output head."""
    return _asked(bare, "get_input_embeddings", modules), _asked(bare, "get_output_embeddings", modules)


def _asked(bare: nn.Module, method: str, modules: Mapping[str, tuple[str, nn.Module]]) -> str | None:
    try:
        found = getattr(bare, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    inner = found if found is None else next((m for _, m in _walk(found) if m._parameters), found)
    return next((name for name, (_, module) in modules.items() if module is inner and inner is not None), None)


def _with_slices(
    pieces: list[anatomy_.Piece], modules: Mapping[str, tuple[str, nn.Module]], entry: Entry, config: Any
) -> list[anatomy_.Piece]:
    groups: dict[str, list[anatomy_.Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.group, []).append(piece)
    done = {
        piece.parameters: piece
        for group, members in groups.items()
        if group
        for piece in _slices(members, _places(group, members, modules, config), entry)
    }
    return [done.get(piece.parameters, piece) for piece in pieces]


def _places(
    group: str, members: list[anatomy_.Piece], modules: Mapping[str, tuple[str, nn.Module]], config: Any
) -> list[Any]:
    """Where heads may be written: the modules between the group and its matrices, then the config."""
    names = dict.fromkeys([group, *(piece.module.rsplit(".", 1)[0] for piece in members)])
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [*(modules[name][1] for name in names if name in modules), inner, config]


def _blocks(
    sizes: Mapping[str, int], pieces: list[anatomy_.Piece], modules: Mapping[str, tuple[str, nn.Module]], config: Any
) -> Iterator[anatomy_.Block]:
    by_block: dict[tuple[str, int], list[anatomy_.Piece]] = {}
    for piece in pieces:
        if piece.block is not None:
            by_block.setdefault(piece.block, []).append(piece)
    for stack, size in sizes.items():
        for index in range(size):
            members = by_block.get((stack, index), [])
            yield anatomy_.Block(
                stack=stack,
                index=index,
                name=f"{stack}.{index}",
                attentions=tuple(_attentions(members, modules, config)),
                mlp=tuple(p for p in members if p.category == "mlp" and p.is_matrix),
                norms=tuple(p for p in members if p.kind == "norm"),
                pieces=tuple(members),
            )


def _attentions(
    members: list[anatomy_.Piece], modules: Mapping[str, tuple[str, nn.Module]], config: Any
) -> Iterator[anatomy_.Attention]:
    groups: dict[str, list[anatomy_.Piece]] = {}
    for piece in members:
        if piece.category == "attention" and piece.kind == "linear":
            groups.setdefault(piece.group, []).append(piece)
    for name, matrices in groups.items():
        shapes = {piece.role: piece.shape for piece in matrices if piece.role}
        heads, kv_heads, size = _head_sizes(_places(name, matrices, modules, config), shapes)
        yield anatomy_.Attention(
            name=name,
            matrices={piece.role: piece.module for piece in matrices if piece.role},
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            cross=any(sign in name.lower() for sign in ("cross", "encdec", "encoder_attn")),
        )


def _ties(modules: Mapping[str, tuple[str, nn.Module]]) -> dict[str, str]:
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, (_, module) in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{name}.{key}" if name else key
            known = first.setdefault(id(parameter), full)
            if known != full:
                ties[full] = known
    return ties


def _width(pieces: list[anatomy_.Piece], embedding: str | None, config: Any) -> int:
    for piece in pieces:
        if piece.module == embedding and piece.kind == "embedding":
            return piece.shape[-1]
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = _reading(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), inner)
    return found or next((piece.shape[0] for piece in pieces if piece.kind == "norm"), 0)
