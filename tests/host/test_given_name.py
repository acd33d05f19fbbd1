"""Names that nothing has, and names that look odd and are right."""

from __future__ import annotations

import pytest

from megatron_fdd.host.given_name import fault_of

WRONG = {
    "": r"its value is empty \(an unset variable\?\); give one, or leave the flag out",
    " ": r"its value is blank \(an unset variable\?\); give one",
    "\u3000\n": r"its value is blank",
    " runs/a": r"' runs/a' begins or ends with a blank; leave that out, or rename",
    "runs/a\u00a0": r".* begins or ends with a blank",
    "runs/a\n": r".* holds the end of a line or another control character; leave that out",
    "runs/a\nruns/b": r".* holds the end of a line",
    "runs/\x1b[31m": r".* holds the end of a line or another control character",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_nothing_has(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{WRONG[name]}"):
        raise ValueError(fault_of(name))


@pytest.mark.parametrize("name", ["runs/my data", "a=b", "r\u00fcns/\u65b0\u3000x", "\udcff", "-", "{}"])
def test_a_name_that_something_can_have(name: str) -> None:
    assert fault_of(name) is None
