"""``report.html``: an artifact's report as one self-contained page, for a browser and for print.

Everything is in the page: no script, no network, charts as SVG. It is a pure function of manifest and report: the same
two give the same bytes.
"""

from __future__ import annotations

from lbq.page.render import is_page, render

__all__ = ["is_page", "render"]
