"""A hook of MkDocs: links from a page to files of the repository outside of docs/.

On GitHub they lead to the file. The site does not have it: there they become the file's path, which is a link where
`repo_url` is set in mkdocs.yml. That each file exists is what tests/test_docs.py tests.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]*)\)")
_BRANCH = "main"


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """The page's text with such links replaced; MkDocs calls it for each page."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def replaced(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2].partition("#")[0]))
        if path.startswith("docs/"):
            return link[0]
        if config.repo_url:
            return f"[{link[1]}]({config.repo_url.rstrip('/')}/blob/{_BRANCH}/{path})"
        return f"`{path}`" if link[1] in (path, f"`{path}`") else f"{link[1]} (`{path}`)"

    return _LINK.sub(replaced, markdown)
