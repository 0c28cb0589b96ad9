"""Near-duplicate code is found, and similar siblings are kept apart."""

from __future__ import annotations

import sys

import pytest

from helpers.packages import make_module
from jaxembed.curation.code_duplicates import NearDuplicateFilter
from jaxembed.errors import UserError


def test_near_duplicates_are_rejected_and_siblings_are_not() -> None:
    codes = NearDuplicateFilter()
    code = make_module(0, 1)
    assert codes.add(code)
    assert not codes.add(code)
    assert not codes.add(code.replace("def f0", "def g").replace("return x", "return y"))
    assert codes.add(make_module(1, 2))
    sibling = "def {}(self):\n    return self.tk.getint(self.tk.call('winfo', '{}', self._w))"
    assert codes.add(sibling.format("winfo_width", "width"))
    assert codes.add(sibling.format("winfo_height", "height"))


def test_without_rensa_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r"^rensa: .*not installed. Run pip install rensa\.$"):
        NearDuplicateFilter()
