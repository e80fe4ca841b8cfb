"""Loading a base model and its tokenizer, in a precision and on a device, without running foreign code unasked."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from pegbox.errors import BadInput, Corrupt, DoesNotFit, MissingExtra, did_you_mean
from pegbox.models.gguf import unpacked
from pegbox.models.source import Source, resolve
from pegbox.parts.files import read_json

__all__ = [
    "HEAD_SEED",
    "TASK_CLASSES",
    "Loaded",
    "Precision",
    "load",
    "load_meta",
    "load_tokenizer",
    "pick_device",
    "unpacked_folder",
]

Precision = Literal["auto", "fp32", "bf16", "nf4"]
HEAD_SEED = 0  # a new classification head is the same on every load, so that an update of it fits again

TASK_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}


class Loaded(NamedTuple):
    """A model and its tokenizer. `model.pegbox_source` is where the model came from."""

    model: nn.Module
    tokenizer: Any


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device meant: `auto` is the first GPU, or the CPU. Raises `BadInput` for one that isn't there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device '{device}' is not usable here ({str(error).splitlines()[0]}).") from error
    return chosen


def load(
    ref: str | Path | Source,
    *,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    task: str = "causal-lm",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a bare base model, in evaluation mode, and its tokenizer.

    Args:
        ref: what `resolve` takes, or a resolved source.
        precision: fp32, bf16, nf4 (4-bit by bitsandbytes, double quantization), or auto: fp32 on a CPU, else bf16.
        task: a key of `TASK_CLASSES`.
        attn_implementation: eager, sdpa, flash_attention_2, ...; None leaves it to transformers.
        trust_remote_code: run Python code that comes with the model.
        model_kwargs: further arguments of `from_pretrained` (number of labels, a preparation's quantization).

    Raises:
        BadInput: see `resolve`; an unknown task or device; remote code without leave; an extra that is missing.
        Corrupt: the checkpoint is damaged or incomplete.
        DoesNotFit: out of memory.
    """
    source = resolve(ref, revision=revision)
    device = pick_device(device)
    arguments = {**_precision(precision, device), **(model_kwargs or {})}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if "quantization_config" in arguments:
        arguments.setdefault("device_map", {"": device})
    folder = unpacked_folder(source)
    _check_code(source, folder, trust_remote_code)
    with _explained(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(HEAD_SEED)
        cls = _task_class(task)
        model, report = cls.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, output_loading_info=True, **arguments
        )
        if "device_map" not in arguments:
            model = model.to(device)
    _check_complete(source, task, report)
    _label(model, source)
    return Loaded(model.eval(), load_tokenizer(source, trust_remote_code=trust_remote_code))


def load_meta(
    ref: str | Path | Source,
    *,
    task: str = "causal-lm",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The same architecture on the meta device: shapes and counts, no memory. Float32."""
    from transformers import AutoConfig

    source = resolve(ref, weights=False)
    folder = unpacked_folder(source)
    _check_code(source, folder, trust_remote_code)
    with _explained(source):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **(model_kwargs or {}))
        arguments = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with torch.device("meta"):
            model = _task_class(task).from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code, **arguments
            )
    model.tie_weights()
    _label(model, source)
    return model.eval()


def load_tokenizer(ref: str | Path | Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that comes with a model; None if the source has none."""
    from transformers import AutoTokenizer

    source = resolve(ref, weights=False)
    folder = unpacked_folder(source)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    with _explained(source):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def unpacked_folder(source: Source) -> Path:
    """The folder with config and safetensors: the source's own, or a GGUF file's unpacked copy."""
    return unpacked(source.path) if source.kind == "gguf" else source.path


def _precision(precision: str, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a precision."""
    wide = torch.float32 if device.type == "cpu" else torch.bfloat16
    match precision:
        case "auto":
            return {"dtype": wide}
        case "fp32":
            return {"dtype": torch.float32}
        case "bf16":
            return {"dtype": torch.bfloat16}
        case "nf4":
            return {"dtype": wide, "quantization_config": _nf4(wide)}
    raise BadInput(f"Unknown precision '{precision}'.{did_you_mean(precision, ('auto', 'fp32', 'bf16', 'nf4'))}")


def _nf4(compute: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quant", "precision nf4")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _task_class(task: str) -> Any:
    import transformers

    if task not in TASK_CLASSES:
        raise BadInput(f"Unknown task class '{task}'.{did_you_mean(task, TASK_CLASSES)}")
    return getattr(transformers, TASK_CLASSES[task])


def _check_code(source: Source, folder: Path, trusted: bool) -> None:
    """Refuse a model that only its own code can build, unless the user said so."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if trusted or kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise BadInput(
            f"'{source.ref}' (model type '{kind}') needs Python code that comes with it, and running that is off. "
            "Read the code, then allow it with trust_remote_code=True."
        )
    raise BadInput(f"'{source.ref}' has model type '{kind}', which this version of transformers does not know.")


def _check_complete(source: Source, task: str, report: Mapping[str, Any]) -> None:
    """A base with tensors missing would get random ones in silence; only a new classification head may be new."""
    missing = sorted(report["missing_keys"])
    if task == "sequence-classification":
        missing = [name for name in missing if not name.startswith(("score.", "classifier.", "pre_classifier."))]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise Corrupt(f"'{source.ref}' lacks {len(missing)} of its model's tensors: {shown}.")


def _label(model: nn.Module, source: Source) -> None:
    """Let the model say where it came from; PEFT writes this name into what it saves."""
    config: Any = model.config
    config._name_or_path = source.ref
    model.pegbox_source = source  # type: ignore[assignment]


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn what loading raises into errors with the source's name."""
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(f"'{source.ref}' does not fit the device's memory. Try precision nf4 or bf16.") from error
    except SafetensorError as error:
        raise Corrupt(f"'{source.ref}' has a damaged safetensors file ({error}). Copy or download it again.") from error
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise BadInput(f"'{source.ref}' can't be loaded: {error}") from error
