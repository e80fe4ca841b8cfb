"""A recipe's decoder on live models: the run's own, and those that it names by role, each base loaded once.

Nothing of a decoder is weights: what it needs is in the recipe, and `decoding.json` repeats it for readers that know
no recipes.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from pegbox.decode.base import DECODE, DecodeContext, Decoder, Decoding
from pegbox.errors import BadInput
from pegbox.parts.adapters import adapter_off, is_adapted
from pegbox.recipe import Recipe, Role, catalogue, parse_yaml, read_recipe
from pegbox.runner.opening import Opened, open_artefact, precision_of
from pegbox.spec import RunSpec

__all__ = ["bound", "read_decoder", "record", "roles_from"]


def bound(spec: RunSpec, opened: Opened, artefact: Path | None = None) -> Decoding:
    """The recipe's decoder on `opened` (the run's model) and its roles.

    Args:
        artefact: where `opened` was tuned; None: it is the bare base. A decoder that works on a tuned model then takes
            the first model that the recipe names.
    """
    from pegbox.artefact.pool import Pool, stands_on_its_base

    decoder, roles = spec.recipe.decode, dict(spec.recipe.models)
    assert decoder is not None
    artefact = artefact if artefact is not None else opened.artefact
    if type(decoder).needs_tuned and artefact is None:
        opened = artefact_of_first(spec, roles)
        artefact = opened.artefact
    model: Any = opened.model
    reference: Any = nullcontext
    if artefact is not None:
        own = is_adapted(model) and stands_on_its_base(str(artefact))
        reference = partial(adapter_off, model) if own else None
    pool = Pool(
        {**roles, OWN: Role(of="base", adapter=False)},
        base_of(spec, artefact),
        policy=model,
        reference=reference,
        tokenizer=opened.tokenizer,
        device=spec.device,
        precision=precision_of(spec),  # type: ignore[arg-type]
        trust_remote_code=spec.trust_remote_code,
    )
    before = pool[OWN] if type(decoder).needs_tuned else None
    return decoder.bind(DecodeContext(model, opened.tokenizer, pool, before))


OWN = "(its own base)"


def artefact_of_first(spec: RunSpec, roles: dict[str, Role]) -> Opened:
    """The first model that the recipe names, which must be a run."""
    from pegbox.artefact import artefact_folder

    assert spec.recipe.decode is not None
    if not roles:
        raise BadInput(
            f"decode '{spec.recipe.decode.kind}' works on a tuned model. Give a run, or name one by role "
            "(models: {tuned: runs/a})."
        )
    name, role = next(iter(roles.items()))
    try:
        folder = artefact_folder(role.of)
    except BadInput as error:
        raise BadInput(f"models.{name}: {error}") from error
    return open_artefact(spec, folder)


def base_of(spec: RunSpec, artefact: Path | None) -> str:
    """What the run's model stands on: the recipe's base, or the root of a run given as the model."""
    if artefact is None:
        return spec.model
    from pegbox.artefact import read

    return read(artefact, verify=False).root.ref


def record(spec: RunSpec, source: Any) -> dict[str, Any]:
    """The content of `decoding.json`: the decoder's settings, the models it joins, and the base they stand on."""
    recipe = spec.recipe.plain()
    return {
        "version": 1,
        "decode": recipe["decode"],
        "models": recipe["models"],
        "base": {"ref": spec.model, "fingerprint": source.fingerprint},
    }


# ---- from the command line ------------------------------------------------------------------------------------------


def read_decoder(given: str | dict[str, Any] | Decoder | Recipe) -> tuple[Decoder, dict[str, Role]]:
    """A decoder and the roles that come with it, from what `--decode` takes.

    A recipe's name or YAML file with a `decode:` block, such a block in YAML (`{kind: emulated, top_p: 0.9}`), or the
    name of a kind. Raises `BadInput`.
    """
    if isinstance(given, Decoder):
        return given, {}
    if isinstance(given, Recipe):
        return _of_recipe(given, "the recipe")
    if isinstance(given, str):
        if given.endswith((".yaml", ".yml")) or given in catalogue():
            block = read_recipe(given)
            return _of_recipe(Recipe.of(block), given) if "kind" not in block else (DECODE.validate(block), {})
        given = parse_yaml(given, "--decode")
    return DECODE.validate(given), {}


def _of_recipe(recipe: Recipe, name: str) -> tuple[Decoder, dict[str, Role]]:
    if recipe.decode is None:
        raise BadInput(f"{name} has no `decode:` block. Give a recipe that has one, a block in YAML, or a kind.")
    return recipe.decode, dict(recipe.models)


def roles_from(pairs: list[str] | None) -> dict[str, Role]:
    """["tuned=runs/a"] -> roles. A plain model that scores text is given as "reward=classifier:REF"."""
    roles = {}
    for pair in pairs or ():
        name, equals, ref = pair.partition("=")
        if not equals or not name or not ref:
            raise BadInput(f"--role {pair}: write the role on the left and a run or model on the right: tuned=runs/a.")
        scorer = ref.startswith("classifier:")
        task = "sequence-classification" if scorer else "causal-lm"
        roles[name] = Role(of=ref.removeprefix("classifier:"), task=task)
    return roles
