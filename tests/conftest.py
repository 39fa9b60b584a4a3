import gc
import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from sklearn.datasets import load_digits

from compressor import Samples, Task
from processes import run_python

settings.register_profile("beside other work", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beside other work")


def pytest_configure() -> None:
    """Keep pytest's log handlers off torch's trace: findings/pytest_turns_torch_traces_on.sh shows what it would cost.

    Pytest adds its log handlers to each logger that does not propagate. With one on "torch.__trace", torch dumps each
    step of an export as JSON, and the export takes twice as long.
    """
    logging.getLogger("torch.__trace").propagate = True


def pytest_collection_finish() -> None:
    """Let no search for garbage go through what was imported: exports make so much that each would search often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def outside_of_github_actions() -> Iterator[None]:
    """What the tests run must not write into the summary of the step that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GITHUB_ACTIONS", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def candidates_that_are_timed_briefly() -> Iterator[None]:
    """Let stages time a candidate for a moment: beside other work they would take seconds for each, as users want."""
    with pytest.MonkeyPatch.context() as patch:
        for room in ("pruning.goals", "quantization.fallback", "quantization.speed"):
            patch.setattr(f"compressor.{room}.TIMING_SECONDS", 0.2)
        yield


@pytest.fixture(scope="session", autouse=True)
def fresh_processes_of_check_stage_that_are_forked() -> Iterator[None]:
    """Fork them; in a process that a test starts, `check_stage` starts an interpreter as it does for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.testing._run_python", run_python)
        yield


@pytest.fixture(scope="session")
def digits_task() -> Task:
    """Scikit-learn's real digits, (N, 1, 8, 8), in a fixed order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)[order]
    targets = torch.from_numpy(digits.target).long()[order]
    return Task(
        train=Samples((images[540:],), targets[540:]),
        validation=Samples((images[360:540],), targets[360:540]),
        test=Samples((images[:360],), targets[:360]),
        calibration=Samples((images[540:796],), targets[540:796]),
        example_inputs=(images[:2],),
        labels=tuple("0123456789"),
    )
