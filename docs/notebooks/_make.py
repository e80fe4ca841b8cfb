"""Write the notebooks from their cells; `python docs/notebooks/_make.py`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent

SETUP = """\
import json, tempfile
from pathlib import Path

import pegbox
from pegbox.testing import tiny_llama, tiny_tokenizer

work = Path(tempfile.mkdtemp())
model = work / "model"          # put a hub id, a folder or "smollm2-135m-q4" here for a real model
tiny_llama(max_position_embeddings=1024).save_pretrained(model)
tiny_tokenizer().save_pretrained(model)
rows = work / "rows.jsonl"
rows.write_text("".join(
    json.dumps({"prompt": f"add {i} and 2", "completion": str(i + 2)}) + "\\n" for i in range(40)
))"""

NOTEBOOKS = {
    "first_run": [
        "# A first run\n\nThe same steps as on a real model, on one that is small enough to train in seconds: it "
        "learns nothing useful, and shows what there is.",
        (SETUP,),
        "## Train\n\nEverything is checked before a weight is loaded.",
        (
            'small = ["select.filter_rank=4", "evaluation.max_new_tokens=4"]\n'
            'out = work / "run"\n'
            'run = pegbox.train("lift", model=str(model), data=str(rows), out=out, steps=4, batch=4, overrides=small)\n'
            "run.status",
        ),
        "## What it gained, forgot and cost",
        (
            "for suite, measured in run.metrics.after.items():\n"
            "    for name, score in measured.scores.items():\n"
            "        before = run.metrics.before[suite].scores[name].value\n"
            '        print(f"{suite:10} {name:20} {before:8.3g} -> {score.value:8.3g}")\n'
            "run.metrics.cost",
        ),
        "## Load it again",
        ("tuned, tokenizer = pegbox.load(run.path)\ntype(tuned).__name__",),
        ('run.report(["html"])',),
    ],
    "own_method": [
        "# A method of your own\n\nA selector in ten lines, combined with what is there.",
        (SETUP,),
        (
            "from typing import Literal\n\n"
            "from pegbox.parts.allocation import Allocation, Whole\n"
            "from pegbox.select.base import SELECT, Selector\n\n\n"
            "@SELECT.register\n"
            "class LastBlocks(Selector):\n"
            '    """The whole tensors of the last `count` blocks."""\n\n'
            '    kind: Literal["last_blocks"] = "last_blocks"\n'
            "    count: int = 1\n"
            '    produces = frozenset({"whole"})\n'
            "    needs_weights = False\n\n"
            "    def select(self, anatomy, weights, stats, generator):\n"
            "        first = len(anatomy.blocks) - self.count\n"
            "        chosen = {n: Whole() for n in weights if (b := anatomy.block_of(n)) and b[1] >= first}\n"
            "        return Allocation(chosen)",
        ),
        "It is a kind like any other: an unknown option is refused, and so is a composition that can't be right.",
        (
            "recipe = {\n"
            '    "title": "The last block",\n'
            '    "select": {"kind": "last_blocks", "count": 1},\n'
            '    "tuner": {"kind": "full"},\n'
            '    "optim": {"kind": "adamw", "lr": 1e-3},\n'
            "}\n"
            'out = work / "run"\n'
            "run = pegbox.train(recipe, model=str(model), data=str(rows), out=out, steps=4, batch=4, suites=[])\n"
            "run.metrics.cost.trainable_parameters",
        ),
        (
            "try:\n"
            '    pegbox.load_recipe({**recipe, "select": {"kind": "last_blocks", "blocks": 2}})\n'
            "except pegbox.PegboxError as error:\n"
            "    print(error)",
        ),
    ],
}


def main() -> None:
    for name, cells in NOTEBOOKS.items():
        made = [new_code_cell(c[0]) if isinstance(c, tuple) else new_markdown_cell(c) for c in cells]
        for i, cell in enumerate(made):
            cell["id"] = f"{name}-{i}"
        notebook = new_notebook(cells=made, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
        nbformat.write(notebook, HERE / f"{name}.ipynb")


if __name__ == "__main__":
    main()
