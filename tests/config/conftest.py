import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from example_pipeline import PIPELINE, STAGES, USER_CODE


@pytest.fixture(scope="module", autouse=True)
def installed_stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package that offers stages, as `pip install` would leave it."""
    site = tmp_path_factory.mktemp("site")
    names = {"train": "Train", "distill": "Distill", "prune": "Prune", "quantize": "Quantize", "export": "Export"}
    info = site / "acme_stages-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-stages\nVersion: 1.0\n")
    entries = "".join(f"{name} = acme_stages:{attribute}\n" for name, attribute in names.items())
    (info / "entry_points.txt").write_text(f"[compressor.stages]\n{entries}")
    (site / "acme_stages.py").write_text(STAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield
    sys.modules.pop("acme_stages", None)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "digits.py").write_text(USER_CODE)
    (tmp_path / "data").mkdir()
    (tmp_path / "student.pt").touch()
    (tmp_path / "p.yaml").write_text(PIPELINE)
    return tmp_path
