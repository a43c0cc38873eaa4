"""What MkDocs does besides: pages that are made, links that leave the site, and the markup of docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: Documents above docs/ that are pages of the site, too.
ABOVE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the methods page and the documents above docs/."""
    from tokenreduce.bench.gallery import read_kept
    from tokenreduce.cli.method_pages import method_pages, method_pictures
    from tokenreduce.cli.methods_page import methods_page

    files.append(File.generated(config, "methods.md", content=linked(methods_page())))
    kept = read_kept(ROOT / "docs" / "kept.json")
    pages = method_pages((ROOT / "docs" / "results.md").read_text(encoding="utf-8"), kept)
    for name, content in {**pages, **method_pictures(kept)}.items():
        files.append(File.generated(config, f"methods/{name}", content=content))
    for name, page in ABOVE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=moved(text, "", page)))
    return files


def linked(page: str) -> str:
    """The methods page, whose tables lead to the page of each method."""
    return re.sub(r"^(\| \[`[^`]+`\]\()#([\w-]+)\)", r"\1methods/\2.md)", page, flags=re.M)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links into the tree: to the page where there is one, else the name alone, or to ``repo_url``."""
    source = page.file.src_uri
    if source in ABOVE.values():
        return markdown
    return moved(markdown, "docs", source, config.get("repo_url") or "")


def moved(text: str, folder: str, page: str, repository: str = "") -> str:
    """``text``, whose links start in ``folder`` of the tree, as the site's ``page``."""
    here = posixpath.dirname(posixpath.join("docs", page) if folder else page)

    def link(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return found[0]
        place = posixpath.normpath(posixpath.join(here, path))
        if place in ABOVE or place == "README.md":
            goal = ABOVE.get(place, "index.md")
        elif place.startswith("docs/"):
            goal = place.removeprefix("docs/")
        else:
            away = f"{repository.rstrip('/')}/blob/main/{place}"
            return f"[{words}]({away})" if repository else f"`{place}`" if words.strip("`") in place else words
        goal = posixpath.relpath(goal, posixpath.dirname(page) or ".")
        return f"{mark}[{words}]({goal}{hash_}{anchor})"

    parts = FENCED.split(text)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Roles of docstrings (``:class:`~a.b.C```) become the last word of what they name."""
    return re.sub(r":[a-z]+:<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)
