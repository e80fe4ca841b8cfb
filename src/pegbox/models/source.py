"""Where a base model comes from: a hub id, a local folder, a GGUF file or an alias, resolved to files at hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pegbox.errors import BadInput, did_you_mean
from pegbox.models.fingerprint import checkpoint_files, fingerprint_gguf, fingerprint_safetensors
from pegbox.models.packages import aliases, fetch

__all__ = ["Source", "resolve"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]  # all of a model but its weights


@dataclass(frozen=True)
class Source:
    """A base model's files.

    Args:
        ref: what the user wrote; resolves to the same source again.
        kind: hub | folder | gguf.
        path: the folder with config and safetensors, or the GGUF file.
        alias: the alias's name, if `ref` is one.
        revision: the hub's commit.
    """

    ref: str
    kind: Literal["hub", "folder", "gguf"]
    path: Path
    alias: str | None = None
    revision: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of the checkpoint as stored: see `pegbox.models.fingerprint`."""
        if self.kind == "gguf":
            return fingerprint_gguf(self.path)
        return fingerprint_safetensors(_weights(self.path, self.ref))

    @property
    def licence(self) -> str | None:
        """What the source says its licence is: the alias's entry, or the model card's `license:` line."""
        if self.alias is not None:
            return aliases()[self.alias].licence
        card = self.path / "README.md"
        if self.kind == "gguf" or not card.exists():
            return None
        head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
        lines = [line for line in head.splitlines() if line.startswith("license:")]
        return lines[0].partition(":")[2].strip() if lines else None

    def describe(self) -> dict[str, Any]:
        """What a record needs to find this source again and to recognise it."""
        found = {"ref": self.ref, "kind": self.kind, "fingerprint": self.fingerprint, "licence": self.licence}
        extra = {"alias": self.alias, "revision": self.revision}
        return {**found, **{key: value for key, value in extra.items() if value is not None}}


def resolve(ref: str | Path | Source, *, revision: str | None = None, weights: bool = True) -> Source:
    """Find a model's files.

    Args:
        ref: an alias; a folder; a `.gguf` file (or a folder that holds just one); a hub id, "owner/name",
            "owner/name@revision", or "owner/name:file.gguf".
        revision: a hub branch, tag or commit.
        weights: False fetches configuration and tokenizer only (for planning).

    Raises:
        BadInput: nothing is there, it can't be reached, or its weights are pickles.
        Corrupt: what is there is damaged.
    """
    if isinstance(ref, Source):
        return ref
    text = str(ref)
    if text in aliases():
        return Source(text, "gguf", fetch(text), alias=text)
    path = Path(text).expanduser()
    if path.exists():
        return _local(text, path, weights=weights)
    if _looks_like_a_path(text):
        raise BadInput(f"No model at '{text}': no such file or folder.")
    return _hub(text, revision, weights=weights)


def _local(ref: str, path: Path, *, weights: bool) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInput(f"'{ref}' is a file, but not a .gguf one. Give a model's folder, a GGUF file or a hub id.")
        return Source(ref, "gguf", path)
    if not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return Source(ref, "gguf", ggufs[0])
        raise BadInput(f"'{ref}' holds no model: {_what_is_there(path, ggufs)}")
    if weights:
        _weights(path, ref)
    return Source(ref, "folder", path)


def _what_is_there(path: Path, ggufs: list[Path]) -> str:
    if ggufs:
        return "several GGUF files; name one: " + ", ".join(p.name for p in ggufs)
    if (path / "adapter_config.json").exists():
        return "it is a PEFT adapter. Give the base model here."
    if (path / "artefact.json").exists() or (path / "artefact").is_dir():
        return "it is a run. Give its base here, and load the run with pegbox.load."
    return "config.json is missing."


def _weights(folder: Path, ref: str) -> list[Path]:
    """The checkpoint's safetensors files; anything else is refused."""
    found = checkpoint_files(folder)
    if found:
        return found
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern) if p.name != "training_args.bin")
    if pickles:
        raise BadInput(
            f"'{ref}' has its weights in pickles ({', '.join(pickles[:3])}), which can run code when read. "
            "Convert it to safetensors first: load it once with transformers where you trust it, and save_pretrained."
        )
    raise BadInput(f"'{ref}' has no weights: neither model.safetensors nor model.safetensors.index.json is there.")


def _looks_like_a_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.count("/") > 1
        or (text.endswith(".gguf") and ":" not in text)
    )


def _hub(ref: str, revision: str | None, *, weights: bool) -> Source:
    repo, _, inner = ref.partition(":")
    repo, _, tag = repo.partition("@")
    revision = revision or tag or None
    if inner:
        if not inner.endswith(".gguf"):
            raise BadInput(f"'{ref}': a file named behind ':' must be a .gguf file.")
        path = _snapshot(ref, repo, revision, [inner]) / inner
        return Source(ref, "gguf", path, revision=_commit(path, inner))
    folder = _snapshot(ref, repo, revision, [*_SMALL_FILES, *(["*.safetensors"] if weights else [])])
    if weights:
        _weights(folder, ref)
    return Source(ref, "hub", folder, revision=folder.name)


def _commit(path: Path, inner: str) -> str:
    """The commit in a hub cache path, .../snapshots/<commit>/<inner>."""
    return path.parents[len(Path(inner).parts) - 1].name


def _snapshot(ref: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The hub's files in its own cache; what is there already serves without a network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise BadInput(
            f"'{ref}' is no model: not an alias, a path or a hub id.{did_you_mean(ref, aliases())}"
        ) from None
    except LocalEntryNotFoundError as error:
        raise BadInput(
            f"The hub can't be reached and '{ref}' is not in its local cache. Give a local folder or a GGUF file, or "
            f"an alias.{did_you_mean(ref, aliases())}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise BadInput(
            f"The hub has no model '{ref}' that you may read ({str(error).strip().splitlines()[0]})."
            f"{did_you_mean(ref, aliases())}"
        ) from error
