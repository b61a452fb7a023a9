"""Which test files share a process of `pytest -n`: those that use the same server, so that each server starts once.

The controller of xdist sees names of tests alone, so a file's group is read from its text. (`--dist loadgroup` and its
marks do not work with pytest 9.2: it looks for the groups in an attribute that tests no longer have.)
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {  # the longest first: what starts late ends late
    "ray_cluster": r"\bray_cluster[:,)\"]",
    "stack": r"\(stack[,)]",
    "mlflow_server": r"\bmlflow_server[:,)]|\bfrom asking import",
    "pair": r"\bpair: Pair\b",
}


@cache
def group_of(file: str) -> str:
    """`tests/jobs/test_x.py` -> the first of GROUPS that it uses, else the file itself."""
    if not (ROOT / file).is_file():  # under another --rootdir
        return file
    text = (ROOT / file).read_text()
    return next((group for group, use in GROUPS.items() if re.search(use, text)), file)


def order_of(file: str) -> int:
    group = group_of(file)
    return list(GROUPS).index(group) if group in GROUPS else len(GROUPS)


class ByServer(LoadScopeScheduling):  # type: ignore[misc]
    def __init__(self, config: Any, log: Any) -> None:
        config.option.loadscopereorder = False  # by the number of tests, which says little about their time
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0])
