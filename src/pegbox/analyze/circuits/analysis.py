"""The circuit of a task as an analysis: found in the base, judged, and followed into the tuned model.

What the page answers: which heads do the task in the base; whether the same heads do it in the tuned model; what each
group carries; and how much of the gain moves over with the tuned model's activations. Prakash et al., arXiv:2402.14811.
It runs the functions of this package one after another and knows no mathematics of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from pegbox.analyze.base import ANALYZE, Analysis, Subject
from pegbox.analyze.circuits import drawing
from pegbox.analyze.circuits.activations import accuracy
from pegbox.analyze.circuits.circuit import Ablation, Circuit, head_means
from pegbox.analyze.circuits.cross import MODES, cross_accuracy, gap_closed
from pegbox.analyze.circuits.cutting import knockout
from pegbox.analyze.circuits.desiderata import DESIDERATA, desideratum
from pegbox.analyze.circuits.discover import BOX_CASCADE, cascade, check_sizes
from pegbox.analyze.circuits.estimate import attribution, rank_correlation
from pegbox.analyze.circuits.heads import HeadView, check_alike
from pegbox.analyze.circuits.judging import completeness, minimality, random_circuits
from pegbox.analyze.circuits.masks import head_parts, learn_mask, patched_accuracy
from pegbox.analyze.circuits.material import Material, box_material, row_material
from pegbox.analyze.circuits.prompts import LAST, Prompts
from pegbox.analyze.circuits.pruning import prune
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.boxes import BoxTask
from pegbox.parts.context import seed_of
from pegbox.parts.files import write_json
from pegbox.parts.findings import Finding, Grid
from pegbox.parts.pairs import ModelPair

__all__ = ["Circuits"]

Count = Annotated[int, Field(ge=1)]


class MaskOptions(BaseModel):
    """Desiderata-based masking.

    Args:
        desiderata: which (see `desiderata.py`); none: no masks. samples: triples of each.
        lam: weight of heads taken from the source; not negative. lr, epochs, batch: of learning.
        legacy: draw triples as the official code does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    desiderata: list[str] = Field(default_factory=lambda: ["positional", "object", "label"])
    samples: Annotated[int, Field(ge=4)] = 2000
    lam: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    epochs: Count = 2
    batch: Count = 32
    legacy: bool = False


@ANALYZE.register
class Circuits(Analysis):
    """The attention-head circuit of a task, in the base and in the tuned model.

    Args:
        task: "boxes" (its options as a block), or "rows": the run's rows with marked positions and a `counterfactual`
            each (see `templates.py`).
        find: "cascade" (boxes in sentences alone) | "prune": away from all heads at `positions`.
        positions: of pruning; default the task's vital ones. stop: share of accuracy that pruning leaves. at_once:
            heads of one round.
        sizes: of the cascade's groups, at most. minimal: keep the heads that minimality scores at least `threshold`,
            against `share` of their partners, on `minimal_samples` prompts.
        samples: of path patching. evaluation, means: prompts to measure on, and behind mean activations.
        draws: random circuits. halves: random halves of completeness.
        tuned_circuit: find the tuned model's own circuit too, and compare. estimate: compare attribution patching.
        masks: desiderata-based masking of each group in the base (boxes alone). cross: modes of cross-model patching.
        knockout: cut attention between vital positions from each block on (boxes in sentences alone).
        batch: prompts at a time. tokens: of one pass, at most.
    """

    kind: Literal["circuits"] = "circuits"
    task: BoxTask | Literal["rows"] = Field(default_factory=BoxTask)
    find: Literal["cascade", "prune"] = "cascade"
    positions: list[str] = Field(default_factory=list)
    stop: Annotated[float, Field(gt=0, le=1)] = 0.85
    at_once: Count = 1
    sizes: dict[str, Count] = Field(default_factory=dict)
    minimal: bool = True
    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.01
    minimal_samples: Count = 100
    samples: Count = 300
    evaluation: Count = 500
    means: Count = 500
    draws: Annotated[int, Field(ge=0)] = 10
    halves: Annotated[int, Field(ge=0)] = 20
    tuned_circuit: bool = True
    estimate: bool = False
    masks: MaskOptions = Field(default_factory=MaskOptions)
    cross: list[str] = Field(default_factory=lambda: ["output"])
    knockout: bool = False
    batch: Count = 32
    tokens: Annotated[int, Field(ge=1)] = 4096

    needs_causal_model: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2402.14811"

    # ---- what can be told from the options alone

    def model_post_init(self, _: Any) -> None:
        for name in self.masks.desiderata:
            if name not in DESIDERATA:
                raise BadInput(f"analyze 'circuits': unknown desideratum '{name}'.{did_you_mean(name, DESIDERATA)}")
        for mode in self.cross:
            if mode not in MODES:
                raise BadInput(f"analyze 'circuits': unknown mode '{mode}' of `cross`.{did_you_mean(mode, MODES)}")
        sentences = isinstance(self.task, BoxTask) and self.task.form == "sentence"
        if not sentences and (self.find == "cascade" or self.knockout):
            raise BadInput(
                "analyze 'circuits': the cascade and the knockout are about box sentences. Take find='prune' and "
                "knockout=false for other tasks."
            )
        if self.task == "rows" and "masks" in self.model_fields_set and self.masks.desiderata:
            raise BadInput(
                "analyze 'circuits': desiderata are drawn for boxes; rows have none. Set masks.desiderata=[]."
            )
        if self.find == "prune" and self.sizes:
            raise BadInput("analyze 'circuits': `sizes` are the cascade's; pruning has `stop`.")

    def run(self, subject: Subject) -> Finding:
        material = self._material(subject)
        pair = subject.pair()
        with _as_base(pair) as base:
            tuned = HeadView(pair.tuned)
            check_alike(base, tuned)
            if self.find == "cascade":
                check_sizes(base, BOX_CASCADE, self.sizes)
            whole = accuracy(base, _on(material.evaluation, base), batch=self.batch)
        finding = Finding(kind=self.kind, title="Circuit of the task, before and after tuning", notes=[_NOTE])
        finding.numbers["base_accuracy"] = whole
        finding.numbers["tuned_accuracy"] = accuracy(tuned, _on(material.evaluation, tuned), batch=self.batch)
        self._base(finding, subject, pair, material)
        return finding

    def _material(self, subject: Subject) -> Material:
        if isinstance(self.task, BoxTask):
            return box_material(
                self.task.worded(subject.tokenizer), _pad(subject.tokenizer), subject.seed, samples=self.samples,
                evaluation=self.evaluation, means=self.means,
            )  # fmt: skip
        return row_material(subject.tokenizer, subject.rows(), _pad(subject.tokenizer))

    # ---- the story

    def _base(self, finding: Finding, subject: Subject, pair: ModelPair, material: Material) -> None:
        with _as_base(pair) as view:
            circuit = self._find(finding, view, material, subject, "base")
            judged = self._judge(finding, view, circuit, material, subject)
            self._masks(finding, view, circuit, material, subject)
            if self.knockout:
                self._knockout(finding, view, material, subject)
        view = HeadView(pair.tuned)
        ablation = self._ablation(view, material)
        inside = ablation.circuits([circuit])[0].accuracy
        finding.numbers["base_circuit_in_tuned"] = inside
        rows: list[list[Any]] = [
            ["base", *judged],
            ["tuned", ablation.model.accuracy, inside, _share(inside, ablation)],
        ]
        finding.tables.append(
            Grid(title="The base's circuit", columns=["model", "accuracy", "circuit's", "faithfulness"], rows=rows)
        )
        shown = {"base": circuit}
        if self.tuned_circuit:
            shown["tuned"] = own = self._find(finding, view, material, subject, "tuned")
            if len(own):
                finding.numbers["overlap"] = own.overlap(circuit)
            finding.numbers["tuned_circuit_heads"] = float(len(own))
        finding.pictures.insert(0, drawing.diagram("circuits-diagram", "Heads of the circuit", shown))
        self._cross(finding, pair, circuit, material)

    def _ablation(self, view: HeadView, material: Material, count: int | None = None) -> Ablation:
        prompts = _on(material.evaluation, view)
        means = head_means(view, _on(material.means, view), self.batch)
        chosen = prompts if count is None else prompts.take(slice(0, count))
        return Ablation(view, chosen, means, batch=self.batch, tokens=self.tokens)

    def _find(self, finding: Finding, view: HeadView, material: Material, subject: Subject, which: str) -> Circuit:
        ablation = self._ablation(view, material, self.minimal_samples)
        if self.find == "prune":
            positions = self.positions or material.vital
            candidates = Circuit.whole(view, positions)
            if ablation.circuits([candidates])[0].accuracy == 0:
                finding.notes.append(
                    f"The {which} model answers nothing right with other tokens' heads at their means."
                )
                circuit = candidates
            else:
                circuit = prune(ablation, candidates, stop=self.stop, at_once=self.at_once).circuit
        else:
            circuit = self._cascade(finding, view, material, subject, which, ablation)
        circuit.save(subject.folder / f"circuit-{which}.json")
        finding.tables.append(drawing.circuit_table(f"Circuit of the {which} model", circuit))
        return circuit

    def _cascade(
        self, finding: Finding, view: HeadView, material: Material, subject: Subject, which: str, ablation: Ablation
    ) -> Circuit:
        clean, corrupt = _on(material.clean, view), _on(material.corrupt, view)
        found = cascade(view, clean, corrupt, sizes=self.sizes, tokens=self.tokens, batch=self.batch)
        drawing.save_scores(subject.folder / f"scores-{which}.csv", found.scores)
        for name, scores in found.scores.items():
            title = f"{name[0].upper()}{name[1:]}, {which}: change of the answer's probability"
            finding.pictures.append(drawing.heat_map(f"circuits-{which}-{name.replace(' ', '-')}", title, scores))
        if self.estimate and which == "base":
            guess = attribution(view, clean, corrupt, batch=self.batch)
            finding.numbers["attribution_rank_correlation"] = rank_correlation(guess, found.scores["value fetcher"])
        if not self.minimal or ablation.model.accuracy == 0:
            return found.circuit
        judged = minimality(ablation, found.circuit, share=self.share, threshold=self.threshold)
        if not len(judged.circuit):
            finding.notes.append(f"Minimality keeps no head of the {which} model, so all that were found are shown.")
            return found.circuit
        return judged.circuit

    def _judge(
        self, finding: Finding, view: HeadView, circuit: Circuit, material: Material, subject: Subject
    ) -> list[float | None]:
        ablation = self._ablation(view, material)
        inside = ablation.circuits([circuit])[0].accuracy
        finding.numbers |= {"circuit_heads": float(len(circuit)), "base_circuit_in_base": inside}
        share = _share(inside, ablation)
        if share is None:
            finding.notes.append(
                "The base answers none of the prompts right, so no share of its accuracy can be given: take fewer "
                "boxes, or a model that can do the task."
            )
        else:
            finding.numbers["faithfulness"] = share
        drawn = random_circuits(ablation, circuit, self.draws, _generator(subject, "random circuits"))
        if drawn:
            finding.numbers["random_circuit"] = sum(drawn) / len(drawn)
        named = {name for name, group in circuit.groups.items() if group.heads}
        if self.halves and len(circuit) > 1:
            kept = Circuit({name: circuit.groups[name] for name in named})
            gaps = completeness(ablation, kept, draws=self.halves, generator=_generator(subject, "halves"))
            finding.tables.append(drawing.gap_table(gaps))
        return [ablation.model.accuracy, inside, share]

    def _masks(self, finding: Finding, view: HeadView, circuit: Circuit, material: Material, subject: Subject) -> None:
        if material.boxes is None or not self.masks.desiderata:
            return
        options, rows, masks = self.masks, [], {}
        for name in options.desiderata:
            triples = desideratum(
                material.boxes, name, options.samples, subject.seed, _pad(subject.tokenizer), options.legacy
            )
            moved = type(triples)(_on(triples.base, view), _on(triples.source, view))
            for group_name, group in circuit.groups.items():
                if not group.heads or group.position not in moved.base.positions:
                    continue
                parts = head_parts(view, [(group.position, head) for head in group.heads])
                found = learn_mask(
                    view, parts, moved, lam=options.lam, lr=options.lr, epochs=options.epochs, batch=options.batch,
                    generator=_generator(subject, "mask", name, group_name),
                )  # fmt: skip
                everything = patched_accuracy(view, parts, moved, batch=options.batch)
                rows.append([group_name, name, len(parts), len(found.chosen), found.test, everything])
                masks[f"{group_name}/{name}"] = {
                    "heads": [list(head) for head in group.heads], "mask": found.raw.tolist(), "test": found.test,
                }  # fmt: skip
        columns = ["group", "desideratum", "heads", "chosen", "accuracy, chosen", "accuracy, all"]
        finding.tables.append(Grid(title="What each group carries", columns=columns, rows=rows))
        write_json(subject.folder / "masks.json", masks)

    def _cross(self, finding: Finding, pair: ModelPair, circuit: Circuit, material: Material) -> None:
        if not self.cross:
            return
        with _as_base(pair) as view:
            prompts = _on(material.evaluation, view)
        cases = {name: [(g.position, h) for h in g.heads] for name, g in circuit.groups.items() if g.heads}
        cases = {"all groups": circuit.members(), **(cases if len(cases) > 1 else {})}
        before, after = finding.numbers["base_accuracy"], finding.numbers["tuned_accuracy"]
        rows: list[list[Any]] = []
        for mode in self.cross:
            found = cross_accuracy(pair, prompts, cases, mode, self.batch)
            closed = {
                name: gap_closed(before, after, value) if before != after else None for name, value in found.items()
            }
            rows += [[mode, name, len(cases[name]), value, closed[name]] for name, value in found.items()]
            if mode == "output":
                finding.numbers["patched_accuracy"] = found["all groups"]
                if (share := closed["all groups"]) is not None:
                    finding.numbers["gap_closed"] = share
                bars = {"base": before, "tuned": after, **{f"from {name}": value for name, value in found.items()}}
                title = "Base with the tuned model's heads"
                finding.pictures.append(drawing.bars("circuits-cross", title, bars))
        columns = ["mode", "heads of", "heads", "accuracy", "gap closed"]
        finding.tables.append(Grid(title="The tuned model's activations in the base", columns=columns, rows=rows))

    def _knockout(self, finding: Finding, view: HeadView, material: Material, subject: Subject) -> None:
        prompts = _on(material.evaluation, view)
        curves = {
            f"{query} to {key}": knockout(view, prompts, query, key, batch=self.batch)
            for query, key in ((LAST, "object"), (LAST, "label"), ("label", "previous_label"))
        }
        drawn = _generator(subject, "knockout")
        curves["last to random"] = knockout(view, prompts, LAST, None, batch=self.batch, generator=drawn)
        finding.pictures.append(drawing.knockout_picture(curves))


_NOTE = (
    "A circuit is a set of heads at positions; its accuracy is measured with all other heads at their means. "
    "Faithfulness is that accuracy over the model's own."
)


@contextmanager
def _as_base(pair: ModelPair) -> Iterator[HeadView]:
    with pair.as_base() as model:
        yield HeadView(model)


def _on(prompts: Prompts, view: HeadView) -> Prompts:
    return prompts.to(next(view.model.parameters()).device)


def _share(inside: float, ablation: Ablation) -> float | None:
    return inside / ablation.model.accuracy if ablation.model.accuracy else None


def _generator(subject: Subject, *names: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(subject.seed, "circuits", *names))


def _pad(tokenizer: Any) -> int:
    found: Sequence[Any] = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    return next((int(value) for value in found if value is not None), 0)
