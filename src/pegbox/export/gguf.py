"""A run as a GGUF file, through llama.cpp's own converter; the result must carry the template and the stop tokens."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput, Corrupt, RunFailed, did_you_mean
from pegbox.export.differences import compare_logits, logits_of, prompt_ids
from pegbox.export.merged import export_merged
from pegbox.export.tuned import plain_model
from pegbox.models import load, unpacked_model
from pegbox.parts.files import fsync_tree, read_json, write_json, writing

__all__ = ["OUT_TYPES", "export_gguf", "find_converter"]

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "PEGBOX_LLAMA_CPP"
OUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "q8_0": "q8_0"}


def find_converter() -> Path | None:
    """llama.cpp's converter: at PEGBOX_LLAMA_CPP (script or folder), on PATH, or beside llama.cpp's programs."""
    if given := os.environ.get(VARIABLE):
        path = Path(given).expanduser()
        path = path / SCRIPT if path.is_dir() else path
        return path if path.is_file() else None
    if found := shutil.which(SCRIPT):
        return Path(found)
    for program in ("llama-quantize", "llama-cli"):
        if found := shutil.which(program):
            for folder in list(Path(found).resolve().parents)[:4]:  # <llama.cpp>/build/bin/llama-cli
                if (folder / SCRIPT).is_file():
                    return folder / SCRIPT
    return None


def export_gguf(
    run: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    check: bool = True,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Merge, convert, and check that the file carries the chat template and the end-of-turn token.

    Args:
        out: the .gguf file. dtype: float32, bfloat16, float16 (default) or q8_0.

    Returns:
        file, bytes, type, what `export_merged` says about the merged model it was made from, and, checked, how far the
        file's logits are from that model's (unpacked by transformers, where it knows the architecture).

    Raises:
        BadInput: no converter, or an unknown dtype. RunFailed: the converter failed (its last lines are shown).
        Corrupt: the file lacks the template or the stop token, has another rotary base, or answers differently.
    """
    dtype = dtype or "float16"
    if dtype not in OUT_TYPES:
        raise BadInput(f"Unknown GGUF type '{dtype}'.{did_you_mean(dtype, OUT_TYPES)}")
    target = Path(out)
    if target.suffix != ".gguf":
        raise BadInput(f"'{out}' should end in .gguf.")
    converter = find_converter()
    if converter is None:
        raise BadInput(
            f"GGUF export needs llama.cpp's {SCRIPT}. Get llama.cpp's source and set {VARIABLE} to its folder "
            "(its gguf-py comes with it), or export --to merged and convert elsewhere."
        )
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as work:
            folder = Path(work) / "merged"
            wide = "float32" if dtype == "q8_0" else dtype
            report = export_merged(run, folder, base=base, dtype=wide, check=check, prompts=prompts, device=device)
            made = Path(work) / target.name
            _repeat_template(folder)
            _convert(converter, folder, made, OUT_TYPES[dtype])
            carried = _verify(made, folder)
            if check:
                carried |= _read_back(made, folder, OUT_TYPES[dtype], prompts)
            fsync_tree(Path(work))
            os.replace(made, target)
    kept = {key: value for key, value in report.items() if key not in ("folder", "bytes", "dtype")}
    return {"file": str(target), "bytes": target.stat().st_size, "type": OUT_TYPES[dtype], **carried, **kept}


def _repeat_template(folder: Path) -> None:
    """Also put the template where converters look that know nothing of chat_template.jinja."""
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.exists() and settings.exists():
        write_json(settings, {**read_json(settings), "chat_template": template.read_text(encoding="utf-8")})


def _convert(converter: Path, folder: Path, made: Path, kind: str) -> None:
    command = [sys.executable, str(converter), str(folder), "--outfile", str(made), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not made.is_file():
        tail = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        hint = " Install what it needs: llama.cpp's requirements.txt lists it." if "ModuleNotFound" in tail else ""
        raise RunFailed(f"{converter} failed:\n  {tail}{hint}")


def _verify(made: Path, folder: Path) -> dict[str, Any]:
    """What the file says about template and end of turn, against the tokenizer it was made from."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    reader = GGUFReader(str(made))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.chat_template and _field(reader, "tokenizer.chat_template") != tokenizer.chat_template:
        raise Corrupt(f"{made.name} does not carry the chat template; this converter can't be used for this model.")
    stop = _field(reader, "tokenizer.ggml.eos_token_id")
    if tokenizer.eos_token_id is not None and stop != tokenizer.eos_token_id:
        raise Corrupt(f"{made.name} ends answers at token {stop}, the model at {tokenizer.eos_token_id}.")
    theta = (read_json(folder / "config.json").get("rope_parameters") or {}).get("rope_theta")
    written = _field(reader, f"{_field(reader, 'general.architecture')}.rope.freq_base")
    if theta is not None and not math.isclose(written if written is not None else 1e4, theta, rel_tol=1e-6):
        raise Corrupt(
            f"{made.name} has rotary base {written}, the model {theta}: this converter is too old for the settings "
            "that transformers 5 writes. Take a newer llama.cpp."
        )
    return {"tensors": len(reader.tensors), "chat_template": bool(tokenizer.chat_template), "stop_token": stop}


def _read_back(made: Path, folder: Path, kind: str, prompts: Sequence[str] | None) -> dict[str, Any]:
    """The file unpacked by transformers against the merged model it was made from. Raises `Corrupt` if they differ."""
    merged, tokenizer = load(folder, device="cpu", precision="fp32")
    ids = prompt_ids(tokenizer, prompts, plain_model(merged).config.vocab_size)
    expected = logits_of(merged, ids)
    del merged
    try:
        model = unpacked_model(made)
    except Corrupt as error:  # transformers unpacks fewer architectures than llama.cpp converts
        return {"gguf_read_back": f"not possible: {error}"}
    found = compare_logits(expected, logits_of(model, ids))
    largest = max(float(logits.abs().max()) for logits in expected)
    if kind != "q8_0" and found["max_logit_difference"] > 0.01 * largest:
        raise Corrupt(
            f"{made.name} answers differently from the model it was made from (logits differ by "
            f"{found['max_logit_difference']:.3g}); this converter can't be used for this model."
        )
    return {f"gguf_{key}": value for key, value in found.items()}


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
