"""The cache in which known data sets lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_cache_of_somebody_else_is_named_and_not_the_storage(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pipelines.data.known import KNOWN\n"
        "from pipelines.errors import FigmentError\n"
        "os.setuid(65534)\n"
        "try: KNOWN['mnist'].missing(Path(sys.argv[1]))\n"
        "except FigmentError as error: print(error)\n"
    )
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets").chmod(0o700)
    tmp_path.chmod(0o755)
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "mnist cannot be read (Permission denied): set FIGMENT_CACHE" in said
