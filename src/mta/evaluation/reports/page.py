"""One HTML page from Markdown and pictures. The page loads nothing: no script, no request, pictures inside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mta.evaluation.reports.figures import Picture
from mta.system.atomic import write_text


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: a title, Markdown, and pictures by their file names (without an ending)."""

    title: str
    text: str
    pictures: Mapping[str, Picture] = field(default_factory=dict)


def page(title: str, head: str, sections: Sequence[Section]) -> str:
    """Return the HTML of a report. ``head`` is Markdown. Raw HTML in Markdown is shown as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("js-default").disable(["image", "link", "autolink"])
    pages = Environment(loader=PackageLoader("mta.evaluation.reports", "."), autoescape=True, undefined=StrictUndefined)
    pages.filters["markdown"] = markdown.render
    return pages.get_template("report.html.jinja").render(title=title, head=head, sections=sections)


def write_report(folder: Path, title: str, head: str, sections: Sequence[Section]) -> None:
    """Write a report as ``README.md`` with pictures beside it (SVG and PNG), and as ``index.html``."""
    text = f"# {title}\n\n{head}\n"
    for section in sections:
        text += f"## {section.title}\n\n{section.text}\n"
        for name, picture in section.pictures.items():
            picture.save(folder / name)
            text += f"![{section.title}]({name}.svg)\n\n"
    write_text(folder / "README.md", text)
    write_text(folder / "index.html", page(title, head, sections))


def plain(text: str) -> str:
    """Escape a text for Markdown, so that any text is shown as it is. White space becomes single spaces."""
    words = re.sub(r"\s+", " ", text).strip()
    words = re.sub(r"([\\`*_\[\]<>|&~]|^[#+=-])", r"\\\1", words)
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", words)
