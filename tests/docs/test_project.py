"""The project about itself: evidence collected, cards and golden numbers present, no broken promise in the docs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pegbox.recipe import catalogue

ROOT = Path(__file__).parents[2]
PLAIN = {"lora", "full", "qlora", "dft", "dpo", "grpo", "wise-ft"}  # not systems of their own, or told in another card
SYSTEMS = [name for name in catalogue() if name not in PLAIN]


def test_evidence_is_collected():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/collect-evidence"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_a_card_and_golden_numbers(name):
    assert (ROOT / "docs" / "cards" / f"{name}.md").is_file()
    assert list((ROOT / "tests" / "golden" / "data" / name).iterdir())


def test_commands_in_the_docs_exist():
    from pegbox.cli.main import COMMANDS

    known = {*COMMANDS, "generate"}
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S)
        for command in re.findall(r"^pegbox ([a-z]+)", "\n".join(blocks), flags=re.M):
            assert command in known, f"{path.name}: pegbox {command}"


def test_links_between_pages_resolve():
    for path in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+\.md)", path.read_text(encoding="utf-8")):
            made = {"systems.md", "evidence.md", "api.md", "decisions.md"}
            assert target.split("/")[-1] in made or (path.parent / target).resolve().is_file(), f"{path.name}: {target}"
