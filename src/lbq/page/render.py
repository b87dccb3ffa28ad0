"""The template with the view of one artifact."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from lbq.formats.manifest import Manifest
from lbq.formats.report import Report
from lbq.formats.wording import plain, size
from lbq.page.maps import stored
from lbq.page.numbers import cosine, number, percent, with_error
from lbq.page.view import view_of

_GENERATOR = b'<meta name="generator" content="lbq">'  # as the template has it
_HEAD_BYTES = 1024


def render(manifest: Manifest, report: Report) -> bytes:
    """``report.html`` in UTF-8, for an artifact's manifest and the report of its layers.

    What was not measured is left out, with a line on how to get it. An entry for the page itself in the manifest's
    files is not shown, so that the page is the same before and after it becomes part of an artifact.
    """
    view = view_of(manifest, report)
    return _template().render(view=view, manifest=manifest, quality=report.quality).encode()


def is_page(path: Path) -> bool:
    """Whether a file is a page that :func:`render` made. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return _GENERATOR in file.read(_HEAD_BYTES)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of models, files and tensors come from files
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cosine": cosine,
        "number": number,
        "percent": percent,
        "share": _share,
        "size": size,
        "stored": stored,
        "with_error": with_error,
    }
    return environment.get_template("page.html.jinja")


def _share(value: float) -> str:
    """A length in an SVG."""
    return f"{100 * value:.2f}%"


def _shown(value: object) -> object:
    """Control characters of names are escaped, as on a terminal; what is markup already stays."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value
