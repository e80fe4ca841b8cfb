"""Which compositions can be right: one pure function over what the parts of a recipe declare.

Each rule is a small function that returns a reason, or None. A rule speaks of capabilities, never of a method's name.
All reasons are collected, so that a user sees every fault at once, before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pegbox.data.base import DataPolicy
from pegbox.errors import Unsupported
from pegbox.recipe import Recipe

__all__ = ["Facts", "check", "refusals"]


@dataclass(frozen=True)
class Facts:
    """What is known of the run before anything is loaded.

    quantized: the base's weights are stored packed. sharded: each process holds a part of each weight (FSDP).
    offloaded: weights are moved in for each forward. row_kinds: kinds of the training rows, empty if unknown.
    """

    quantized: bool = False
    sharded: bool = False
    offloaded: bool = False
    processes: int = 1
    accumulation: int = 1
    has_checker: bool = True
    row_kinds: frozenset[str] = frozenset()


Rule = Callable[[Recipe, Facts], str | None]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Enter a rule."""
    RULES.append(function)
    return function


def refusals(recipe: Recipe, facts: Facts = Facts()) -> list[str]:
    """Every reason why this recipe can't be right under these facts; empty if it can."""
    found = (rule(recipe, facts) for rule in RULES)
    return [reason for reason in found if reason]


def check(recipe: Recipe, facts: Facts = Facts()) -> None:
    """Raise `Unsupported` with every reason, or return."""
    reasons = refusals(recipe, facts)
    if reasons:
        name = recipe.title or "this recipe"
        raise Unsupported(f"{name} can't be run as composed:\n" + "\n".join(f"- {reason}" for reason in reasons))


def _quantized(recipe: Recipe, facts: Facts) -> bool:
    return facts.quantized or any(type(part).packs_base for part in recipe.prepare)


@rule
def zeroth_order_needs_a_value(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.optim.needs_value and not recipe.objective.has_value:
        return (
            f"optim '{recipe.optim.kind}' works on the loss's value, and objective '{recipe.objective.kind}' has none "
            "(its value is constant; only its gradient means something). Choose an optimizer with gradients, "
            "or an objective with a value."
        )
    if recipe.optim.needs_value and not recipe.objective.fixed_value:
        return (
            f"optim '{recipe.optim.kind}' compares the loss at several points, and objective '{recipe.objective.kind}' "
            "as configured weighs its parts anew at each of them. Choose an optimizer with gradients, or fixed weights."
        )
    return None


@rule
def floating_base(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.tuner.needs_floating_base and _quantized(recipe, facts):
        return (
            f"tuner '{recipe.tuner.kind}' trains the base's own weights, and these are quantized. Use an adapter "
            "(e.g. lora, or sparse with execution: bypass), or a floating base (precision: fp32 or bf16)."
        )
    return None


@rule
def resident_and_unsharded(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.tuner.needs_unsharded_base and facts.sharded:
        return (
            f"tuner '{recipe.tuner.kind}' writes into whole weights, and the base is sharded over processes. "
            "Use execution: scatter or bypass, or DDP instead of FSDP."
        )
    if recipe.tuner.needs_resident_base and facts.offloaded:
        return f"tuner '{recipe.tuner.kind}' needs weights that stay in memory, and the base is offloaded."
    return None


@rule
def causality(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.task.causal and recipe.objective.needs_causal_model and not recipe.tuner.keeps_causality:
        return (
            f"tuner '{recipe.tuner.kind}' lets a position see later ones, so a causal model's loss would be "
            "meaningless. Use it with task: classification, or another tuner."
        )
    return None


@rule
def selection_fits_tuner(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.select is None:
        return None
    if "tuner" in recipe.select.produces and "tuner" not in recipe.tuner.takes:
        return (
            f"select '{recipe.select.kind}' gives some matrices a tuner of their own, and tuner '{recipe.tuner.kind}' "
            "holds trained weights or one adapter for all. Use tuner: sparse."
        )
    common = recipe.select.produces & recipe.tuner.takes
    if not common:
        takes = ", ".join(sorted(recipe.tuner.takes)) or "no selection"
        return (
            f"select '{recipe.select.kind}' chooses {', '.join(sorted(recipe.select.produces))}, and tuner "
            f"'{recipe.tuner.kind}' takes {takes}."
        )
    return None


@rule
def selection_fits_storage(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.select is None:
        return None
    if recipe.select.produces <= {"whole"} and _quantized(recipe, facts):
        return f"select '{recipe.select.kind}' chooses whole tensors to train, and packed ones can't train themselves."
    if recipe.select.needs_floating_base and _quantized(recipe, facts):
        return (
            f"select '{recipe.select.kind}' as configured reads gradients of the weights, and these are quantized. "
            "Load the base in fp32 or bf16, or choose by something that a dequantized copy has (e.g. magnitude)."
        )
    if recipe.select.picks_vectors and not recipe.tuner.holds_vectors:
        return (
            f"select '{recipe.select.kind}' picks norms and biases too, and tuner '{recipe.tuner.kind}' as configured "
            "holds matrices only; use execution: in_place or scatter, or narrow the selection."
        )
    return None


@rule
def factors_are_taken_up(recipe: Recipe, facts: Facts) -> str | None:
    leaving = [part.kind for part in recipe.prepare if type(part).leaves_factors]
    if leaving and not type(recipe.tuner).takes_factors:
        return (
            f"prepare '{leaving[0]}' takes a part out of the weights for an adapter to start from, and tuner "
            f"'{recipe.tuner.kind}' takes none up; use tuner: lora on the same modules."
        )
    return None


@rule
def updates_are_taken_up(recipe: Recipe, facts: Facts) -> str | None:
    carrying = [part.kind for part in recipe.prepare if part.carries_update]
    if carrying and not type(recipe.tuner).takes_up:
        return (
            f"prepare '{carrying[0]}' carries over what an earlier stage learnt, and tuner '{recipe.tuner.kind}' takes "
            "none up; use tuner: lowrank_sparse, or prune without `of`."
        )
    return None


@rule
def moving_selection(recipe: Recipe, facts: Facts) -> str | None:
    schedule = getattr(recipe.select, "schedule", None)
    if recipe.select is None or schedule is None or not schedule.moves:
        return None
    if type(recipe.select).moves == "never":
        return f"select '{recipe.select.kind}' never moves, so select.schedule.every has no meaning; leave it out."
    if recipe.select.moves not in recipe.tuner.moves:
        able = " or ".join(sorted(recipe.tuner.moves)) or "nothing"
        return (
            f"select '{recipe.select.kind}' moves {recipe.select.moves} during training, and tuner "
            f"'{recipe.tuner.kind}' can move {able}; leave out select.schedule, or use another tuner."
        )
    if recipe.select.moves == "slots" and not recipe.optim.needs_backward:
        return (
            f"optim '{recipe.optim.kind}' stores its run as directions over fixed entries, so the selection can't "
            "move during it; leave out select.schedule."
        )
    return None


@rule
def state_that_moves_go_by(recipe: Recipe, facts: Facts) -> str | None:
    schedule = getattr(recipe.select, "schedule", None)
    if recipe.select is None or schedule is None or not schedule.moves:
        return None
    missing = recipe.select.needs_state - recipe.optim.keeps
    if missing:
        return (
            f"select '{recipe.select.kind}' moves by the optimizer's {' and '.join(sorted(missing))}, which optim "
            f"'{recipe.optim.kind}' does not keep; use "
            + " or ".join(_KEEPERS[name] for name in sorted(missing))
            + ", or another growth rule."
        )
    return None


_KEEPERS = {"moments": "optim: {kind: aged_adamw} (or adamw)", "rows_columns": "optim: {kind: sm3}"}


@rule
def backward_is_there_to_save(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.select is None or not type(recipe.select).budgets_backward:
        return None
    if not recipe.optim.needs_backward:
        return (
            f"select '{recipe.select.kind}' spends a budget of back-propagation, and optim '{recipe.optim.kind}' has "
            "none. Choose an optimizer with gradients, or another selection."
        )
    if not type(recipe.objective).has_value:
        return (
            f"select '{recipe.select.kind}' weighs tensors by the loss on calibration batches, and the loss of "
            f"objective '{recipe.objective.kind}' exists inside its trainer only."
        )
    return None


@rule
def episodes_are_given(recipe: Recipe, facts: Facts) -> str | None:
    given = type(recipe.protocol).gives_episodes or any(type(policy).gives_episodes for policy in recipe.data)
    if type(recipe.optim).needs_episodes and not given:
        return (
            f"optim '{recipe.optim.kind}' learns from episodes; nothing makes any. Use protocol: {{kind: meta}}, or "
            "the data policy 'episodes'."
        )
    return None


@rule
def parameters_can_be_exchanged(recipe: Recipe, facts: Facts) -> str | None:
    held = type(recipe.tuner).takes & {"entries", "units"}
    if type(recipe.optim).exchanges_parameters and held:
        return (
            f"optim '{recipe.optim.kind}' puts other tensors in parameters' places, and tuner '{recipe.tuner.kind}' "
            f"writes what it trains into the base ({', '.join(sorted(held))}). Use a low-rank adapter, or full."
        )
    if recipe.optim.second_order and _quantized(recipe, facts):
        return (
            f"optim '{recipe.optim.kind}' of order 2 differentiates twice, and packed weights can't. Use order: 1, or "
            "load the base in fp32 or bf16."
        )
    return None


@rule
def priors_are_held(recipe: Recipe, facts: Facts) -> str | None:
    terms = [t.kind for t in getattr(recipe.objective, "terms", ()) if getattr(type(t), "needs_prior", False)]
    if terms and not type(recipe.tuner).has_prior:
        return (
            f"term '{terms[0]}' compares distributions over weights, and tuner '{recipe.tuner.kind}' has none; use "
            "tuner: {kind: bayesian_lora}."
        )
    if terms and not type(recipe.optim).needs_episodes:
        return (
            f"term '{terms[0]}' needs a prior to compare with, and optim '{recipe.optim.kind}' holds none; use optim: "
            "{kind: episodic} with protocol: {kind: meta}."
        )
    return None


@rule
def host_suits_task(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.protocol.trains and recipe.objective.host not in recipe.task.hosts:
        return (
            f"objective '{recipe.objective.kind}' is trained as '{recipe.objective.host}', which task "
            f"'{recipe.task.kind}' can't host (it hosts {', '.join(sorted(recipe.task.hosts))})."
        )
    return None


@rule
def rows_suit_host(recipe: Recipe, facts: Facts) -> str | None:
    if not facts.row_kinds:
        return None
    preference = facts.row_kinds == {"preference"}
    if recipe.objective.host == "preference" and not preference:
        return f"objective '{recipe.objective.kind}' needs rows with a chosen and a rejected answer."
    if recipe.objective.host != "preference" and preference:
        return (
            f"these rows hold chosen and rejected answers, which objective '{recipe.objective.kind}' has no use for. "
            "Choose objective: {kind: dpo}, or map the chosen answer to a completion with --map."
        )
    if recipe.objective.host == "policy" and not facts.has_checker:
        return f"objective '{recipe.objective.kind}' needs rows whose answers a checker can verify."
    return None


@rule
def policies_need_rows(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.data and recipe.objective.host in {"preference", "policy"}:
        kinds = ", ".join(policy.kind for policy in recipe.data)
        return f"data policies ({kinds}) act on supervised batches; objective '{recipe.objective.kind}' has none."
    return None


@rule
def weights_moved_by_data(recipe: Recipe, facts: Facts) -> str | None:
    moving = [policy.kind for policy in recipe.data if type(policy).moves_weights]
    if not moving:
        return None
    if recipe.prepare:
        return (
            f"data policy '{moving[0]}' puts differences onto the base they were made on, and prepare "
            f"'{recipe.prepare[0].kind}' rewrites it first; leave one of them out."
        )
    if _quantized(recipe, facts) or facts.sharded or facts.offloaded:
        return (
            f"data policy '{moving[0]}' adds differences to the base's weights, which must be whole, floating and in "
            "memory here (precision: fp32 or bf16, DDP instead of FSDP)."
        )
    pulls = [term.kind for term in getattr(recipe.objective, "terms", ()) if type(term).on_weights]
    if pulls and type(recipe.tuner).part_kind == "delta":
        return (
            f"term '{pulls[0]}' would see the differences that data policy '{moving[0]}' puts onto the weights it "
            "holds. Use tuner: sparse, whose trained values are apart from them, or leave the term out."
        )
    return None


@rule
def views_are_made(recipe: Recipe, facts: Facts) -> str | None:
    made = frozenset[str]().union(*(policy.view_names for policy in recipe.data))
    missing = sorted(set(recipe.objective.view_names) - made)
    if missing:
        return (
            f"objective '{recipe.objective.kind}' reads the view{'s' if len(missing) > 1 else ''} {', '.join(missing)} "
            "of each row, which no data policy makes. Add data: [{kind: views, templates: {NAME: TEXT}}], or leave the "
            "view out of the objective."
        )
    if not recipe.objective.view_names:
        return None
    for policy in recipe.data:
        kind = type(policy)
        acts = kind.on_batch is not DataPolicy.on_batch and not kind.acts_on_views
        if acts or not kind.keeps_views:
            how = "lays rows out anew and loses their views" if not kind.keeps_views else "acts on rows, not on views"
            return (
                f"data policy '{policy.kind}' {how}, and objective '{recipe.objective.kind}' reads views. Leave one of "
                "them out (rows.packing packs views too)."
            )
    return None


@rule
def row_losses_are_told(recipe: Recipe, facts: Facts) -> str | None:
    needing = [policy.kind for policy in recipe.data if type(policy).needs_row_losses]
    if needing and not recipe.optim.needs_backward:
        return (
            f"data policy '{needing[0]}' learns from each row's loss, and optim '{recipe.optim.kind}' works on the "
            "whole step's value alone. Choose an optimizer with gradients."
        )
    return None


@rule
def preparations(recipe: Recipe, facts: Facts) -> str | None:
    packed = facts.quantized
    for part in recipe.prepare:
        if part.needs_floating_base and packed:
            return (
                f"prepare '{part.kind}' needs floating weights, and the base is quantized before it. "
                "Put it before the quantization, or load the base in fp32 or bf16."
            )
        packed = packed or part.packs_base
    return None


@rule
def analyses_are_run(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.analyze and not type(recipe.protocol).analyzes:
        return (
            f"protocol '{recipe.protocol.kind}' runs no analyses; leave `analyze:` out, and look at the finished run "
            "with a recipe of protocol: posthoc."
        )
    causal = [part.kind for part in recipe.analyze if type(part).needs_causal_model]
    if causal and not recipe.task.causal:
        return f"analyze '{causal[0]}' works on causal language models; task '{recipe.task.kind}' has none."
    return _weights_for_analyses(recipe, facts)


def _weights_for_analyses(recipe: Recipe, facts: Facts) -> str | None:
    moving = [part.kind for part in recipe.analyze if type(part).needs_weights]
    if moving and _quantized(recipe, facts):
        return f"analyze '{moving[0]}' moves weights from the base to the tuned model, and the base's are quantized."
    if moving and recipe.protocol.trains and type(recipe.tuner).merge == "no":
        return f"analyze '{moving[0]}' needs tuned weights, and tuner '{recipe.tuner.kind}' can't be merged into any."
    return None


@rule
def answers_are_decoded(recipe: Recipe, facts: Facts) -> str | None:
    if recipe.decode is None:
        return None
    kind = recipe.decode.kind
    if not type(recipe.protocol).decodes:
        return (
            f"protocol '{recipe.protocol.kind}' measures models as they are; leave `decode:` out, and use it on the "
            f"finished run (pegbox generate, pegbox evaluate --decode {kind})."
        )
    if not recipe.task.causal:
        return f"decode '{kind}' draws text; task '{recipe.task.kind}' gives none."
    if type(recipe.decode).needs_tuned and not recipe.protocol.trains and not recipe.weights and not recipe.models:
        return f"decode '{kind}' works on a tuned model; name one by role (models: {{tuned: runs/a}})."
    missing = [role for role in recipe.decode.roles() if role not in recipe.models]
    if missing:
        return f"decode '{kind}' uses the model '{missing[0]}'; name it (models: {{{missing[0]}: ...}})."
    return None
