"""Program repair: rows from buggy and fixed code, bugs made by mutation, and a built-in task with tests.

rows.py reads columns and judges answers, mutation.py makes bugs, problems.py is the built-in set (`--data repair`).
"""

from pegbox.data.repair.mutation import OPERATORS, Mutant, mutants
from pegbox.data.repair.problems import SPLITS, problem, problems, rows
from pegbox.data.repair.rows import check, read_repair, repair_prompt

__all__ = [
    "OPERATORS",
    "SPLITS",
    "Mutant",
    "check",
    "mutants",
    "problem",
    "problems",
    "read_repair",
    "repair_prompt",
    "rows",
]
