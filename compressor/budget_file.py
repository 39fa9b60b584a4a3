"""A budget file: YAML → `Budget`; all problems at once, each with its file, line and column."""

from pathlib import Path

from compressor.errors import ConfigError
from compressor.report.budget import Budget
from compressor.validation import read_mapping, validate


def load_budget(path: Path) -> Budget:
    """Read the budget file `path`. Raises ConfigError with every problem found, in the order of the file."""
    root, problems = read_mapping(path)
    budget, faults = validate(Budget, root)
    if budget is None or problems:
        raise ConfigError(sorted([*problems, *faults], key=lambda problem: (problem.line or 0, problem.column or 0)))
    return budget
