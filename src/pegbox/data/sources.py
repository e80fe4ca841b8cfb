"""Where records come from: files, folders, hub data sets, and the built-in task.

A source is a path or name with options; reading it yields (record, place) pairs, so that every later complaint can name
file and line. JSON Lines, JSON arrays, CSV, TSV, Parquet and plain text, each also behind gzip; a folder is all of its
data files in sorted order; `org/name` that is no local path is a hub data set, read through `datasets`.

What this file does not know: formats and rows.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pegbox.errors import BadInput
from pegbox.parts.component import explain

__all__ = ["BUILTIN", "SUFFIXES", "Record", "Source", "as_source", "read_records"]

Record = tuple[Any, str]  # (what was written, "file, line n")

BUILTIN = ("network", "repair")  # tasks that make their own rows
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Source(BaseModel):
    """One source of rows.

    Args:
        path: a file, a folder, a hub name, or a built-in task ("network", "repair").
        weight: share of this source in the mix; sources without weights are simply joined.
        format: a name of `formats.FORMATS`, or "auto". map: canonical name -> column.
        split, config: of a hub set; for a built-in task `split` is train, validation or test.
        limit: at most so many rows, from the beginning. For a built-in task: how many.
        task: the task's name for rows that don't say one.
        seed: for a built-in task. families: a subset of its families (of "repair": its mutation operators).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    weight: Annotated[float, Field(gt=0)] | None = None
    format: str = "auto"
    map: dict[str, str] = Field(default_factory=dict)
    split: str | None = None
    config: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    task: str = ""
    seed: int = 0
    families: tuple[str, ...] = ()

    @property
    def builtin(self) -> bool:
        return self.path in BUILTIN


def as_source(value: Any) -> Source:
    """A `Source` from a path, a mapping, or one already. "network:test:300" is split and count."""
    if isinstance(value, Source):
        return value
    if isinstance(value, str | Path):
        value = {"path": str(value)}
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        value = {**value, **_from_text(value["path"])}
    try:
        return Source.model_validate(value)
    except ValidationError as error:
        raise explain(error, Source, "data") from None


def _from_text(text: str) -> dict[str, Any]:
    name, *options = text.split(":")
    if name not in BUILTIN:
        return {"path": text}
    if len(options) > 2 or (len(options) == 2 and not options[1].isdigit()):
        raise BadInput(f"'{text}': expected {name}, {name}:SPLIT or {name}:SPLIT:COUNT, e.g. {name}:test:300.")
    return {"path": name} | dict(zip(("split", "limit"), options))


def read_records(source: Source) -> Iterator[Record]:
    """The records of a file, folder or hub set, each with its place. Raises `BadInput`."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _from_disk(path, source)
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if _HUB_NAME.fullmatch(source.path) and _suffix(path) not in SUFFIXES:
        return _read_hub(source)
    raise BadInput(
        f"Data '{source.path}' not found: no such file or folder. Give a file ({', '.join(SUFFIXES)}, also with .gz), "
        "a folder of such files, a hub name such as org/name, or 'network' or 'repair'."
    )


def _read_folder(folder: Path) -> Iterator[Record]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and _suffix(f) in SUFFIXES and f.name[0] not in "._"]
    files = [f for f in files if f.name.lower() not in ("readme.md", "license.txt")]
    if not files:
        raise BadInput(f"Folder {folder} holds no data files. Expected any of: {', '.join(SUFFIXES)} (also .gz).")
    for file in files:
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[Record]:
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise BadInput(f"{path}: unknown kind of data file. Known: {', '.join(SUFFIXES)} (also with .gz).")
    return reader(path)


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _text_of(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInput(f"{path}, line {line}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise BadInput(f"{path}: broken gzip file ({error}). Copy or download it again.") from None


def _lines_of(path: Path) -> Iterator[str]:
    """Lines one at a time, so that a large file is never held whole."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}, line {number}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise BadInput(f"{path}: broken gzip file ({error}). Copy or download it again.") from None


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), f"{path}, line {number}"
        except json.JSONDecodeError as error:
            raise BadInput(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}). Expected one JSON object "
                'per line, e.g. {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", '
                '"content": "4"}]}'
            ) from None


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON array; or one object that holds a single array; or JSON Lines under the name .json."""
    text = _text_of(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip()[:1]
        if first == "{" and error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        raise BadInput(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). Expected an array of "
            'objects, e.g. [{"prompt": "2+2=", "completion": "4"}]'
        ) from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
        whole_row = any(name in value for name in ("messages", "conversations", "conversation"))
        value = value[lists[0]] if len(lists) == 1 and not whole_row else [value]
    if not isinstance(value, list):
        raise BadInput(
            f'{path}: expected a JSON array of objects, e.g. [{{"text": "..."}}], got {type(value).__name__}.'
        )
    yield from zip(value, _places(path, text, len(value)))


def _places(path: Path, text: str, count: int) -> Iterator[str]:
    """Item numbers, with the line where an item begins when the items stand at the top level."""
    decoder, position, line, counted = json.JSONDecoder(), text.find("[") + 1, 1, 0
    top = text.lstrip().startswith("[")
    for number in range(1, count + 1):
        if not top:
            yield f"{path}, item {number}"
            continue
        while text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        yield f"{path}, line {line} (item {number})"
        _, position = decoder.raw_decode(text, position)


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(_text_of(path), newline=""), delimiter=delimiter, strict=True)
    try:
        head = next(reader, None)
        if not head:
            raise BadInput(f"{path}: empty. Expected a first line of column names, e.g. prompt{delimiter}completion")
        if len(set(head)) < len(head):
            raise BadInput(f"{path}, line 1: a column name appears twice: {head}. Rename one.")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(head):
                raise BadInput(
                    f"{path}, line {line}: {len(cells)} cells, but the first line names {len(head)} columns. Quote "
                    f'cells that hold {delimiter!r} or line breaks, e.g. "a{delimiter} b".'
                )
            if cells:
                yield {k: v if v != "" else None for k, v in zip(head, cells)}, f"{path}, line {line}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(
            f'{path}, line {reader.line_num}: not valid CSV ({error}). Quote cells as in "a ""b"" c".'
        ) from None


def _read_tsv(path: Path) -> Iterator[Record]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        raw: Any = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        number = 0
        with pq.ParquetFile(raw) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{path}, row {number}"
    except (pa.ArrowException, gzip.BadGzipFile, EOFError, OSError) as error:
        raise BadInput(f"{path}: not a readable Parquet file ({error}). Copy or write it again.") from None


def _read_text(path: Path) -> Iterator[Record]:
    """One document per file."""
    text = _text_of(path)
    if text.strip():
        yield {"text": text}, f"{path}"


def _from_disk(path: Path, source: Source) -> Iterator[Record]:
    import datasets

    return _dataset_rows(datasets.load_from_disk(str(path)), source)


def _read_hub(source: Source) -> Iterator[Record]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.config, split=source.split or "train")
    except Exception as error:  # the hub's, the network's and the library's own, of many classes
        raise BadInput(
            f"Data set '{source.path}' could not be loaded: {error}. It is no local file either; check the name, "
            "`split` and `config`, and the connection."
        ) from error
    return _dataset_rows(loaded, source)


def _dataset_rows(loaded: Any, source: Source) -> Iterator[Record]:
    if hasattr(loaded, "keys"):  # a dict of splits
        split = source.split or "train"
        if split not in loaded:
            raise BadInput(f"{source.path} has no split '{split}'. Known: {', '.join(loaded)}.")
        loaded = loaded[split]
    for number, record in enumerate(loaded, start=1):
        yield _named_label(record, loaded), f"{source.path}, row {number}"


def _named_label(record: dict[str, Any], loaded: Any) -> dict[str, Any]:
    """Class numbers as their names, where the set knows them (-1 marks an unlabelled row and stays)."""
    feature = loaded.features.get("label") if loaded.features else None
    value = record.get("label")
    if feature is not None and hasattr(feature, "int2str") and isinstance(value, int) and value >= 0:
        return {**record, "label": feature.int2str(value)}
    return record


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
