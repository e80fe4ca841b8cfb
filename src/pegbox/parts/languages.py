"""Candidates against their tests, by language: what is compiled, how the tests are joined, where the sentinel goes.

    python   the candidate, then the tests, as two files in one module               always there
    cpp      one file, `g++ -std=c++17`; the tests hold main()                        where g++ is
    java     one file, `javac`; the tests hold a class with main(String[])            where javac and java are

The sentinel is printed where the tests' own main ends in the ordinary way: in C++ by the destructor of a local of main
(which exit() does not run), in Java by a main that calls the tests' one. So `exit(0)` anywhere is no success.
JUnit classes are not run: write their assertions into a main.
"""

from __future__ import annotations

import functools
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pegbox.errors import BadInput, Unsupported, did_you_mean
from pegbox.parts.sandbox import DEFAULT, Limits, Outcome, box, run, run_python

__all__ = ["LANGUAGES", "Job", "available", "check", "check_all", "fenced", "job_of", "language_named", "missing_tools"]


class Job(NamedTuple):
    """A candidate and the tests it is held against."""

    language: str
    code: str
    tests: str


_NAMES = {"python": ("python", "py", "python3"), "cpp": ("cpp", "c++", "cc", "cxx"), "java": ("java",)}
_TOOLS: dict[str, tuple[str, ...]] = {"python": (), "cpp": ("g++",), "java": ("javac", "java")}
LANGUAGES = tuple(_NAMES)


def language_named(name: str) -> str:
    """python, cpp or java, from any of their names. Raises `BadInput`."""
    for language, names in _NAMES.items():
        if name.lower() in names:
            return language
    raise BadInput(f"Unknown language '{name}'.{did_you_mean(name.lower(), [n for v in _NAMES.values() for n in v])}")


@functools.cache
def _tool(name: str) -> str | None:
    return shutil.which(name)


def missing_tools(language: str) -> list[str]:
    """Programs that a language needs and that are not installed."""
    return [tool for tool in _TOOLS[language_named(language)] if _tool(tool) is None]


def available() -> list[str]:
    """The languages that can be run here."""
    return [language for language in LANGUAGES if not missing_tools(language)]


def check(job: Job, limits: Limits = DEFAULT) -> Outcome:
    """Run one candidate against its tests. Raises `Unsupported` without the tool-chain, `BadInput` for bad tests."""
    language = language_named(job.language)
    missing = missing_tools(language)
    if missing:
        raise Unsupported(
            f"{language} candidates need {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed. Install the tool-chain, or leave {language} rows out (here: {', '.join(available())})."
        )
    if not job.tests.strip():
        raise BadInput("A candidate without tests can't be judged; give the row's `tests`.")
    with box() as folder:
        return _RUNNERS[language](job, folder, limits)


def check_all(jobs: Sequence[Job], limits: Limits = DEFAULT, workers: int = 2) -> list[Outcome]:
    """`check` of every job, in order; equal jobs run once."""
    distinct = list(dict.fromkeys(jobs))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = dict(zip(distinct, pool.map(lambda job: check(job, limits), distinct)))
    return [found[job] for job in jobs]


def job_of(row: Any, answer: str) -> Job:
    """An answer's code and the tests in the row's meta. Raises `BadInput` for a row without tests."""
    language, tests = language_named(str(row.meta.get("language", "python"))), row.meta.get("tests")
    if not tests:
        raise BadInput(f"Row {row.id} has no `tests`, so a repair of it can't be judged. Give the column.")
    return Job(language, fenced(answer, language), str(tests))


def fenced(text: str, language: str = "") -> str:
    """The first fenced block, of the language if one says so; a block that was cut off counts; else the whole text."""
    blocks = re.findall(r"```([\w+#-]*)[^\S\n]*\n(.*?)(?:\n?```|\Z)", text, flags=re.DOTALL)
    names = _NAMES.get(language, ()) if language else ()
    own = [code for name, code in blocks if name.lower() in names]
    plain = [code for name, code in blocks if not language or not name]
    found = own or plain or [code for _, code in blocks]
    return found[0].strip("\n") if found else text.strip("\n")


# --- one runner per language ----------------------------------------------------------------------------------------


def _python(job: Job, folder: Path, limits: Limits) -> Outcome:
    files = [_written(folder / name, text) for name, text in (("candidate.py", job.code), ("tests.py", job.tests))]
    return run_python(files, folder, limits)


_CPP_MAIN = re.compile(r"\b(int|auto)\s+main\s*\([^)]*\)\s*(->\s*int\s*)?\{")
_GUARD = 'namespace pegbox_guard {{ struct Done {{ ~Done() {{ std::fputs("\\n{0}\\n", stdout); }} }}; }}\n'


def _cpp(job: Job, folder: Path, limits: Limits) -> Outcome:
    main = _CPP_MAIN.search(job.tests)
    if main is None:
        raise BadInput("The C++ tests have no `int main()`; write the assertions into one.")
    sentinel = secrets.token_hex(16)
    tests = f"{job.tests[: main.end()]} pegbox_guard::Done pegbox_done; {job.tests[main.end() :]}"
    source = f"{job.code}\n#include <cstdio>\n{_GUARD.format(sentinel)}{tests}\n"
    path, binary = _written(folder / "candidate.cpp", source), folder / "candidate"
    compiler = str(_tool("g++"))
    built = run([compiler, "-std=c++17", "-O1", "-w", str(path), "-o", str(binary)], folder, limits, compiling=True)
    path.unlink()  # the sentinel stands in it
    if not built.passed or not binary.is_file():
        return built.model_copy(update={"status": "not_compiled"})
    return run([str(binary)], folder, limits, sentinel=sentinel)


_JAVA_MAIN = re.compile(r"\bclass\s+(\w+)(?:(?!\bclass\s).)*?\bstatic\s+(?:final\s+)?void\s+main\s*\(", re.DOTALL)
_PUBLIC = re.compile(r"\bpublic\s+((?:final\s+|abstract\s+)*(?:class|interface|enum|record)\b)")
_IMPORT = re.compile(r"^[^\S\n]*import\s+[\w.*\s]+;[^\S\n]*$", re.MULTILINE)


def _java(job: Job, folder: Path, limits: Limits) -> Outcome:
    main = _JAVA_MAIN.search(job.tests)
    if main is None:
        raise BadInput("The Java tests have no class with `static void main(String[] args)`; write them into one.")
    sentinel = secrets.token_hex(16)
    wrapper = (
        "class PegboxRun { public static void main(String[] args) throws Throwable { "
        f'{main.group(1)}.main(args); System.out.println("\\n{sentinel}"); }} }}'
    )
    body = f"{job.code}\n{job.tests}"
    imports = "\n".join(dict.fromkeys(m.group().strip() for m in _IMPORT.finditer(body)))
    classes = _PUBLIC.sub(r"\1", _IMPORT.sub("", body))
    source = f"{imports}\n{classes}\n{wrapper}\n"
    path = _written(folder / "PegboxRun.java", source)
    heap = f"-Xmx{max(32, limits.memory >> 20)}m"
    built = run(
        [
            str(_tool("javac")),
            "-J-XX:-UsePerfData",
            "-J-XX:TieredStopAtLevel=1",
            "-nowarn",
            "-d",
            str(folder),
            str(path),
        ],
        folder,
        limits,
        compiling=True,
    )
    path.unlink()
    if not built.passed:
        return built.model_copy(update={"status": "not_compiled"})
    options = [heap, "-XX:-UsePerfData", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-ea"]
    argv = [str(_tool("java")), *options, "-cp", str(folder), "PegboxRun"]
    return run(argv, folder, limits, sentinel=sentinel, limit_memory=False)


_RUNNERS: dict[str, Callable[[Job, Path, Limits], Outcome]] = {"python": _python, "cpp": _cpp, "java": _java}


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
