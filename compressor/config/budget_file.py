"""A budget file: YAML → `Budget`; all problems at once, each with its file, line and column."""

from pathlib import Path

from compressor.config.validation import all_problems, read_mapping, validate
from compressor.errors import ConfigError
from compressor.verdicts.budget import Budget


def load_budget(path: Path) -> Budget:
    """Read the budget file `path`. Raises ConfigError with every problem found, in the order of the file."""
    root, problems = read_mapping(path)
    budget, faults = validate(Budget, root)
    if budget is None or problems:
        raise ConfigError(all_problems(problems, faults))
    return budget
