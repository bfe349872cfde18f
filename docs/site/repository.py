"""Pages that are files of the repository: README and its like, and links that leave docs/.

A page whose source has the line ``<!-- README.md -->`` gets the text of that file there. Links
between files that are pages become links between pages; links to other files keep their text only.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<target>[^)\s]+)\)")


def page_of(file):
    """The path below docs/ of the page that shows a file of the repository, or None."""
    relative = file.relative_to(ROOT).as_posix()
    if relative in PAGES:
        return PAGES[relative]
    return relative.removeprefix("docs/") if relative.startswith("docs/") else None


def relinked(text, folder):
    """``text`` of a file in ``folder`` with links as they are among the pages."""

    def link(match):
        target, hash_sign, anchor = match["target"].partition("#")
        page = page_of((folder / target).resolve())
        if page is None:
            return f"`{match['text'].strip('`')}`" if "/" in match["text"] else match["text"]
        return f"{match['image']}[{match['text']}](/{page}{hash_sign}{anchor})"

    return LINK.sub(link, text)


def read(app, docname, source):
    text = relinked(source[0], Path(app.srcdir, docname).parent)

    def insert(match):
        return relinked((ROOT / match[1]).read_text(), ROOT)

    source[0] = re.sub(r"^<!-- ([\w.]+\.md) -->$", insert, text, flags=re.MULTILINE)


def setup(app):
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
