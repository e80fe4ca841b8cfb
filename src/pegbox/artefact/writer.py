"""Writing an artefact: parts are saved one by one into a temporary folder, which then takes its place whole.

    with ArtefactWriter("runs/a/artefact", source) as writer:
        writer.add_tuner(tuner, model)
        writer.add_tokenizer(tokenizer)

If the block raises, or the disk fills up, or the process dies, what stood there before still stands.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from torch import nn

from pegbox.artefact.card import CardInfo, write_card
from pegbox.artefact.manifest import MANIFEST, Manifest, Part, PartKind, Root, check_base, read, record_files
from pegbox.artefact.manifest import artefact_folder as find_folder
from pegbox.errors import BadInput
from pegbox.models import Source
from pegbox.parts.component import Component
from pegbox.parts.files import staged_folder, write_json
from pegbox.prepare.base import Preparation
from pegbox.tuners.base import Tuner

__all__ = ["ArtefactWriter", "root_of", "stop_ids_of"]

Save = Callable[[Path], Mapping[str, Any] | None]


def root_of(
    source: Source, *, task: str = "causal-lm", precision: str = "fp32", model_kwargs: Mapping[str, Any] | None = None
) -> Root:
    """The root of an artefact made on `source`."""
    return Root(**source.describe(), task=task, precision=precision, model_kwargs=dict(model_kwargs or {}))


def stop_ids_of(tokenizer: Any, model: nn.Module | None = None) -> list[int]:
    """The ids that end an answer: the tokenizer's end of sequence first, then the model's generation settings'."""
    found: list[int] = []
    settings = getattr(model, "generation_config", None)
    for ids in (getattr(tokenizer, "eos_token_id", None), getattr(settings, "eos_token_id", None)):
        for value in ids if isinstance(ids, list | tuple) else [ids]:
            if value is not None and int(value) not in found:
                found.append(int(value))
    return found


class ArtefactWriter:
    """Collects parts and swaps the finished artefact in when the `with` block ends well.

    Args:
        folder: where the artefact will stand; one that stands there is replaced at the end.
        root: the base (`root_of`), or a `Source` for a plain causal one.
        start: an artefact this one continues from: its parts are copied first. Must have the same root.
        replace_last: leave out the start's last part, because the new one is its continuation.

    Raises:
        WrongBase: `start` has another root. RunFailed: the disk is full. BadInput: the folder can't be written, or a
        part left a file that is neither tensors nor JSON nor text.
    """

    def __init__(
        self,
        folder: str | Path,
        root: Root | Source,
        start: str | Path | None = None,
        *,
        replace_last: bool = False,
    ):
        self.folder = Path(folder).absolute()
        self.root = root if isinstance(root, Root) else root_of(root)
        self._start, self._replace_last = start, replace_last
        self._stack = ExitStack()
        self._manifest = Manifest(root=self.root)
        self._card: CardInfo | None = None

    def __enter__(self) -> ArtefactWriter:
        self._place = self._stack.enter_context(staged_folder(self.folder))
        try:
            if self._start is not None:
                self._inherit(Path(self._start))
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as late:
                self._stack.__exit__(type(late), late, late.__traceback__)
                raise
        self._stack.__exit__(kind, error, trace)

    def add(
        self,
        kind: PartKind,
        save: Save,
        *,
        axis: str | None = None,
        component: Component | None = None,
        additive: bool = False,
        name: str | None = None,
    ) -> Part:
        """Save one part: `save(empty folder)` writes its files and returns JSON for its entry.

        Args:
            axis, component: who reads it again, e.g. "tuner" and the tuner. None for data, json and modules parts.
            additive: see `Part`.
            name: the part's folder; by default its kind, numbered from the second on.
        """
        if kind not in get_args(PartKind):
            raise BadInput(f"Unknown part kind '{kind}'. Known: {', '.join(get_args(PartKind))}.")
        path = name or self._free_name(kind)
        place = self._place / path
        place.mkdir(parents=True)
        meta = save(place)
        part = Part(
            kind=kind,
            path=path,
            parent=self._manifest.state,
            additive=additive,
            axis=axis,
            component=component.model_dump(mode="json") if component is not None else {},
            meta=dict(meta or {}),
            files=record_files(place),
        )
        self._append(part)
        return part

    def add_tuner(self, tuner: Tuner, model: nn.Module, *, additive: bool = False, name: str | None = None) -> Part:
        """The tuner's update, in its own layout (PEFT's, for adapters)."""
        kind: Any = type(tuner).part_kind
        return self.add(
            kind, lambda f: tuner.save(model, f), axis="tuner", component=tuner, additive=additive, name=name
        )

    def add_preparation(self, preparation: Preparation, record: dict[str, Any]) -> Part:
        """What `preparation.apply` returned, to be replayed from the original base."""
        kind: PartKind = "packed" if type(preparation).packs_base else "prep"
        return self.add(kind, lambda f: preparation.save(record, f), axis="prepare", component=preparation)

    def add_recorded(self, preparation: Preparation, folder: Path) -> Part:
        """A preparation whose record was written to `folder` before."""
        kind: PartKind = "packed" if type(preparation).packs_base else "prep"
        copied = lambda place: shutil.copytree(folder, place, dirs_exist_ok=True) and None  # noqa: E731
        return self.add(kind, copied, axis="prepare", component=preparation)

    def add_step(self, step: Any, state: Any) -> Part | None:
        """What a step leaves (`Step.leaves`), e.g. a trajectory; None if it leaves nothing."""
        if step.leaves is None:
            return None
        return self.add(step.leaves, lambda f: step.save(state, f), axis="optim", component=step)

    def add_tokenizer(self, tokenizer: Any, *, stop_ids: Iterable[int] | None = None) -> None:
        """The tokenizer with its chat template, and the ids that end an answer."""
        place = self._place / "tokenizer"
        tokenizer.save_pretrained(str(place))
        ids = list(stop_ids) if stop_ids is not None else stop_ids_of(tokenizer)
        files = {f"tokenizer/{name}": record for name, record in record_files(place).items()}
        self._change(tokenizer="tokenizer", stop_ids=ids, files={**self._manifest.files, **files})

    def add_card(self, card: CardInfo) -> None:
        """What the README says beside the loading lines; without it there is a short one."""
        self._card = card

    def _inherit(self, start: Path) -> None:
        folder, before = find_folder(start), read(start)
        check_base(before, self.root.fingerprint, "This run's base")
        for part in before.parts[:-1] if self._replace_last else before.parts:
            shutil.copytree(folder / part.path, self._place / part.path)
            self._append(part)

    def _finish(self) -> None:
        from pegbox.artefact.libraries import versions

        card = self._card or CardInfo()
        self._change(info={"versions": versions(), **card.record()})
        write_card(self._place, self._manifest, card)
        write_json(self._place / MANIFEST, self._manifest.model_dump(mode="json"))

    def _free_name(self, kind: str) -> str:
        taken = {part.path for part in self._manifest.parts}
        names = [kind, *(f"{kind}-{n}" for n in range(2, len(taken) + 3))]
        return next(name for name in names if name not in taken)

    def _append(self, part: Part) -> None:
        self._change(parts=[*self._manifest.parts, part])

    def _change(self, **fields: Any) -> None:
        self._manifest = self._manifest.model_copy(update=fields)
