"""A name on a command line: of a file, a folder, or of anything else that is no free text."""

from __future__ import annotations

import unicodedata


def fault_of(name: str) -> str | None:
    """Return why a name is refused, with what to do; None if nothing is wrong.

    Nobody calls a folder so on purpose: an unset variable, a list that was cut in the wrong place, or a line that was
    read with its end leaves such a name, and it would be made, or looked for, somewhere else than it says.
    """
    if not name:
        return "its value is empty (an unset variable?); give one, or leave the flag out"
    if not name.strip():
        return "its value is blank (an unset variable?); give one, or leave the flag out"
    if any(unicodedata.category(sign) == "Cc" for sign in name):
        return f"{name!r} holds the end of a line or another control character; leave that out, or rename what has it"
    if name != name.strip():
        return f"{name!r} begins or ends with a blank; leave that out, or rename what has it"
    return None
