"""Which teacher teaches which data set: names found in prefixes, and everything that is not one to one refused."""

from __future__ import annotations

import re

import pytest

from megatron_fdd.plan.routing import routes

PREFIXES = ["data/code/train", "data/maths/train", "data/code/valid"]


def test_a_name_is_a_part_of_a_prefix_between_slashes() -> None:
    assert routes(["code", "maths"], PREFIXES) == {
        "code": ("data/code/train", "data/code/valid"),
        "maths": ("data/maths/train",),
    }
    assert routes(["a", "text_document"], ["/x/a", "s3://y/text_document"]) == {
        "a": ("/x/a",),
        "text_document": ("s3://y/text_document",),
    }
    assert routes(["code/train", "maths", "code/valid"], PREFIXES)["code/train"] == ("data/code/train",)


def test_a_whole_prefix_is_meant_before_a_part() -> None:
    assert routes(["data/code", "code"], ["data/code", "other/code"]) == {
        "data/code": ("data/code",),
        "code": ("other/code",),
    }


REFUSED = {
    "no teacher for the data set data/maths/train": ["code"],
    "no teacher for the data set data/code/train": ["cod", "maths"],
    "several teachers for the data set data/code/train, code and data": ["code", "data"],
    "no data set is called poems": ["code", "maths", "poems"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_every_data_set_has_one_teacher_and_every_name_a_data_set(message: str) -> None:
    names = REFUSED[message]
    with pytest.raises(ValueError, match=re.escape(f"--fdd-teacher-store: {message}")) as caught:
        routes(names, PREFIXES)
    told = f"the data sets are {', '.join(PREFIXES)}; the names are {', '.join(names)}"
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
