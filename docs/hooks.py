"""Docstrings refer to each other as Sphinx does, :class:`Name`; on a page that is the name."""

import re

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]*)</code>")


def on_page_content(html: str, **_) -> str:
    return ROLE.sub(r"<code>\1</code>", html)
