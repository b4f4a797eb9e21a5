"""What every test shares: where the repository lies, and reports that go to a temporary folder."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded values beside the checkout; tests that need it are skipped where it is absent."""
    path = ROOT.parent / "shared"
    if not (path / "golden").is_dir(): pytest.skip("needs the recorded values in ../shared/golden, which are not on this machine")
    return path


@pytest.fixture(scope="session", autouse=True)
def reports_elsewhere(tmp_path_factory):
    """Notebooks run by tests leave the committed reports alone."""
    before = os.environ.get("EMOCA_NB_REPORTS")
    os.environ["EMOCA_NB_REPORTS"] = str(tmp_path_factory.mktemp("reports"))
    yield
    if before is None: del os.environ["EMOCA_NB_REPORTS"]
    else: os.environ["EMOCA_NB_REPORTS"] = before
