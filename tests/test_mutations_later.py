"""The later half of the notebooks, in a file of their own: the workers share the tests file by file."""

from __future__ import annotations

import pytest
from test_mutations import FIRST, NOTEBOOKS, check
from test_mutations import studies as studies

LATER = [path for path in NOTEBOOKS if path not in FIRST]


@pytest.mark.parametrize("path", LATER, ids=lambda path: path.stem)
def test_every_fault_turns_it_red(path, studies, record_property):
    check(path, studies, record_property)
