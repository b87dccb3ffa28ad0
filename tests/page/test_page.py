"""The page of a report: what it says, that nothing in it is live, and that odd reports give a page too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lbq.formats.disk import FileEntry, hash_file
from lbq.formats.manifest import PAGE, Manifest, read_manifest
from lbq.formats.quality import Estimate
from lbq.formats.report import Report, read_report
from lbq.page import is_page, render

Made = tuple[Manifest, Report]
Make = Callable[..., Made]
Edit = Callable[..., Made]
Lbq = Callable[..., Any]

LIMIT = 300_000  # bytes of a page


class Page(HTMLParser):
    """Elements, attributes and text of a page, the text of each section too."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.styles = ""
        self.sections: dict[str, str] = {}
        self._section, self._in_style = "", False
        self.feed(data.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag in ("td", "th", "dt", "dd", "p", "li", "title"):
            self.handle_data("\n")

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles += data
            return
        self.text += data
        self.sections[self._section] = self.sections.get(self._section, "") + data

    def attributes(self) -> Iterator[tuple[str, str, str]]:
        for tag, attributes in self.elements:
            for name, value in attributes.items():
                yield tag, name, value or ""


def words(text: str) -> str:
    return " ".join(text.split())


def check(data: bytes) -> Page:
    """What holds of every page."""
    page = Page(data)
    html = data.decode()
    assert html.startswith("<!DOCTYPE html>")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "img", "form", "base", "audio", "video", "image", "a"}
    for tag, name, value in page.attributes():
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "srcset", "action", "xlink:href", "data", "poster"):
            assert value.startswith("#") or value == "data:,", (tag, name, value)
        assert name != "style" or re.fullmatch(r"(--[a-z]+:[0-9]+(ch)?;?)+", value)
        assert "http" not in value or name == "http-equiv"
        assert "nan" not in value.lower().split(" "), (tag, name, value)
        assert "inf" not in re.split(r"[ %MLh]", value.lower()), (tag, name, value)
    assert not re.search(r"@import|url\(|expression|//", page.styles)
    for word in re.findall(r"[\w.%]+", page.text.lower()):
        assert word not in ("nan", "inf", "none", "undefined", "nan%", "inf%"), word
    ids = [value for _, name, value in page.attributes() if name == "id"]
    assert len(ids) == len(set(ids))
    assert len(data) < LIMIT
    return page


@pytest.fixture(params=["weights", "scores", "full"])
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_level(make: Make, level: str) -> None:
    manifest, report = make(level=level)
    data = render(manifest, report)
    page = check(data)
    text = words(page.text)
    for value in (
        "example/Aurora-1B",
        "INT4 g32",
        "4.50",
        "600.0 KB",
        "2.0 MB",
        "0.99572",
        "9.26%",
        "Round to nearest",
    ):
        assert value in text, value
    for value in ("unknown keys are ignored: use_magic", "layers.7", "c0ffee", "cd" * 32, "01" * 32, "lbq 0.1.0"):
        assert value in text, value
    assert ("frontier" in page.sections) == (level == "full")
    measured = ("0.383 ± 0.019", "67.9% ± 0.7%", "29.54", "23.03", "+0.249 ± 0.025", "0.87927", "−0.58315")
    for value in (*measured, "0.287", "0.690", "2.26", "8.20", "2048 positions in 8 windows of 512 tokens"):
        assert (value in words(page.sections["figures"])) == (level != "weights"), value
    assert ("lbq convert --report kl" in text) == (level == "weights")
    assert ("lbq convert --report full" in text) == (level == "scores")


def test_tensors(make: Make) -> None:
    manifest, report = make()
    page = check(render(manifest, report))
    titles = page.text
    for module in report.modules[:-1]:
        error = f"{100 * module.relative_error:{'.2f' if module.relative_error < 0.1 else '.1f'}}%"
        assert f"\n{module.name}: error {error}, cosine {module.cosine:.5f}, INT4 g32" in titles
    worst = sorted(report.modules, key=lambda module: module.cosine)
    shown = page.sections["worst"]
    places = [shown.index(f"\n{module.name}\n") for module in worst[:10]]
    assert places == sorted(places)
    assert shown.count("row ") == 10
    assert worst[10].name not in shown
    assert f"lm_head, INT4 g32, cosine {report.modules[-1].cosine:.5f}" in words(page.sections["layers"])


def test_charts_show_every_layer(make: Make) -> None:
    manifest, report = make(layers=12)
    elements = check(render(manifest, report)).elements
    paths = [
        attributes["d"] or "" for tag, attributes in elements if tag == "path" and attributes["class"] == "line one"
    ]
    assert len(paths) == 2 * 7  # each kind once in its panel, and once in grey behind all
    assert {path.count("L") for path in paths} == {11}
    tiles = [
        attributes
        for tag, attributes in elements
        if tag == "path" and re.fullmatch("e[0-7]", attributes["class"] or "")
    ]
    assert len(tiles) == 12 * 7
    assert {attributes["class"] for attributes in tiles} == {f"e{i}" for i in range(8)}
    lines = [
        attributes["d"] or ""
        for tag, attributes in elements
        if tag == "path" and attributes["class"] in ("line b3", "line b4", "line b8")
    ]
    assert len(lines) == 3 * 4
    assert {path.count("L") for path in lines} == {11}


def test_frontier(make: Make) -> None:
    page = check(render(*make()))
    marks = [attributes for _, attributes in page.elements if attributes.get("class") in ("measured", "own")]
    assert [attributes["class"] for attributes in marks] == ["measured"] * 4 + ["own"]
    assert "This artifact: 4.50 bits, KL 0.383 ± 0.019" in page.text
    assert "3.30 bits, predicted KL 3.00, measured KL 3.30 ± 0.10" in page.text
    line = next(
        attributes["d"] or "" for tag, attributes in page.elements if attributes.get("class") == "line predicted"
    )
    points = [tuple(map(int, point.split())) for point in re.split("[ML]", line)[1:]]
    assert len(points) == 20
    assert points == sorted(points)  # more bits to the right, less divergence further down
    circles = [(attributes["cx"], attributes["cy"]) for tag, attributes in page.elements if tag == "circle"]
    own = tuple(float((value or "").rstrip("%")) for value in circles[-1])
    at = min(points, key=lambda point: abs(point[0] / 10 - own[0]))
    assert own[1] == pytest.approx(at[1] / 10, abs=15)
    assert "on 1024 positions in 4 windows of 512 tokens of train.txt" in words(page.sections["frontier"])


def test_a_frontier_where_the_artifact_alone_was_measured(make: Make) -> None:
    manifest, report = make()
    assert report.quality is not None
    kl = report.quality.scores.kl
    own = Estimate(kl.mean, kl.standard_error)
    points = tuple(msgspec.structs.replace(point, measured_kl=None) for point in report.quality.frontier)
    points = (*points[:5], msgspec.structs.replace(points[5], measured_kl=own), *points[6:])
    quality = msgspec.structs.replace(report.quality, frontier=points)
    page = check(render(manifest, msgspec.structs.replace(report, quality=quality)))
    assert [a["class"] for _, a in page.elements if a.get("class") in ("measured", "own")] == ["own"]
    assert "measured ± standard error" not in page.text


def test_mixed_bits(make: Make) -> None:
    """8 bits in the first layer's attention: a map of bits, and dots in the colours of bits."""
    page = check(render(*make(bits=lambda unit: 8 if unit < 2 else 3)))
    assert "q, layer 0: INT8 g32" in page.text
    assert "in the colours of the bits above" in page.text
    assert "q, layers 1 to 29: INT3 g32" in page.text
    assert "gate, layers 0 to 29: INT3 g32" in page.text
    styles = [attributes.get("class") for _, attributes in page.elements]
    assert {"line dots b3", "line dots b8", "f3", "f8"} <= set(styles)
    assert "line one" not in styles
    stored = [
        attributes["data-label"]
        for tag, attributes in page.elements
        if tag == "td" and attributes.get("class") == "stored"
    ]
    assert set(stored) <= {"INT3", "INT8"}
    assert len(stored) == 10
    assert "Bits of every linear layer" not in render(*make()).decode()


def test_what_stays(make: Make) -> None:
    manifest, report = make(layers=4)
    kept = "model.layers.2.mlp.down_proj"
    quantized = {name: entry for name, entry in manifest.quantized.items() if name != kept}
    modules = tuple(module for module in report.modules if module.name != kept)
    manifest = msgspec.structs.replace(manifest, quantized=quantized)
    page = check(render(manifest, msgspec.structs.replace(report, modules=modules)))
    assert "down, layer 2: stays BF16" in page.text
    assert "BF16" in words(page.sections["layers"])
    assert "the other kinds in grey" in page.text  # all that is quantised has the same bits


def test_autoround(make: Make, edit: Edit) -> None:
    """The settings of any method are shown, those of its calibration too."""
    calibration = {"name": "train.txt", "sha256": "ab" * 32, "samples": 128, "tokens": 2048, "tokens_sha256": "cd" * 32}
    settings = {"name": "autoround", "iterations": 200, "batch": 8, "seed": 42, "device": "cuda"}

    def change(manifest: Any, _: Any) -> None:
        manifest["method"] |= {**settings, "calibration": calibration}
        manifest["source"]["license"] = {"id": "other", "name": "aurora-1", "link": "https://example.com/licence"}

    page = check(render(*edit(make(), change)))
    assert "AutoRound, INT4 g32, head INT8" in page.text
    shown = words(page.sections["settings"])
    for value in ("method autoround", "iterations 200", "seed 42", "name: train.txt, sha256: abab", "samples: 128"):
        assert value in shown, value
    assert "aurora-1, https://example.com/licence" in page.sections["provenance"]


def test_imported_codes(make: Make, edit: Edit) -> None:
    """Weight by weight the source's: no error anywhere."""

    def change(manifest: Any, report: Any) -> None:
        manifest["method"] |= {"name": "import", "origin": "gptq", "requantized": 0}
        for module in report["modules"]:
            module.update(cosine=1.0, relative_error=0.0, worst_row_error=0.0)

    page = check(render(*edit(make(level="weights"), change)))
    assert "Imported, INT4 g32" in page.text
    assert "origin gptq" in words(page.sections["settings"])
    assert "q_proj: error 0%, cosine 1.00000, INT4 g32" in page.text


def test_bits_chosen_for_a_size(make: Make) -> None:
    manifest, report = make()
    method = msgspec.structs.replace(manifest.method, bits=None, lm_head=None, target_bpw=3.5)
    text = words(check(render(msgspec.structs.replace(manifest, method=method), report)).text)
    assert "3.5 bits a weight" in text
    assert "bits chosen unit by unit" in text


def test_the_page_is_the_same_as_part_of_the_artifact(make: Make) -> None:
    manifest, report = make()
    first = render(manifest, report)
    assert render(manifest, report) == first
    files = {PAGE: FileEntry(len(first), "00" * 32), **manifest.files}
    backwards = dict(reversed(files.items()))
    assert render(msgspec.structs.replace(manifest, files=backwards), report) == first


def test_eighty_layers(make: Make) -> None:
    data = render(*make(layers=80, bits=lambda unit: (8, 4, 3)[unit % 3]))
    page = check(data)
    assert "model.layers.79.mlp.down_proj" in page.text
    ticks = [attributes["x"] for tag, attributes in page.elements if tag == "text" and attributes.get("class") == "x"]
    assert len(ticks) < 12 * (7 + 4 + 2 + 1)


# ------------------------------------------------------------------------ hostile


HOSTILE = """</title></style></code>--><script>alert(1)</script>"'`<img src=x onerror=alert(1)>&lt;{{ 7*7 }}{% x %}"""


def test_hostile_names(make: Make, edit: Edit) -> None:
    """Every text of manifest and report is text on the page."""
    evil = 'q"><script src=//x.example/y.js></script>'

    def change(manifest: Any, report: Any) -> None:
        part = json.dumps("self_attn.q_proj")[1:-1]
        for container in (manifest, report):
            encoded = json.dumps(container).replace(part, json.dumps(evil)[1:-1])
            container.clear()
            container.update(json.loads(encoded))
        manifest["source"].update(name=HOSTILE, revision=HOSTILE)
        manifest["source"]["files"][HOSTILE] = {"size": 5, "sha256": "ab" * 32}
        manifest["method"].update(keep=[HOSTILE], set=["\u202egnp.exe\x00\x1b[31m"], readers=[HOSTILE])
        manifest["source"]["license"] = {"id": "other", "name": HOSTILE, "link": HOSTILE}
        manifest["tools"][HOSTILE] = HOSTILE
        manifest["notes"] = [HOSTILE]
        report["quality"]["device"] = HOSTILE
        for name in ("text", "sensitivity_text"):
            report["quality"][name]["path"] = HOSTILE
            report["quality"][name]["sha256"] = HOSTILE

    data = render(*edit(make(), change))
    page = check(data)
    assert page.text.count("<script>alert(1)</script>") > 8
    assert "7*7" in page.text
    assert f"model.layers.0.{evil}" in page.text
    assert "\\u202egnp.exe\\x00\\x1b[31m" in page.text
    assert all(character.isprintable() or character == "\n" for character in data.decode())


# ------------------------------------------------------------------------ degenerate


def test_one_layer(make: Make) -> None:
    page = check(render(*make(layers=1)))
    lines = [attributes["d"] or "" for _, attributes in page.elements if attributes.get("class") == "line one"]
    assert all(line.endswith("h0") for line in lines)  # a dot: a line of one point would not show


def test_one_window(make: Make, edit: Edit) -> None:
    def change(_: Any, report: Any) -> None:
        quality = report["quality"]
        quality["text"]["windows"] = 1
        for each in (
            quality["scores"]["kl"],
            quality["scores"]["same_top1"],
            quality["scores"]["perplexity"]["log_ratio"],
        ):
            each["standard_error"] = None

    page = check(render(*edit(make(level="scores"), change)))
    text = words(page.sections["figures"])
    assert "1 window of 512" in text
    assert "one window gives no standard errors" in text
    assert "±" not in text


def test_a_perplexity_past_any_float(make: Make, edit: Edit) -> None:
    def change(_: Any, report: Any) -> None:
        report["quality"]["scores"]["perplexity"].update(artifact=None, reference=1e307)

    text = words(check(render(*edit(make(), change))).text)
    assert "Perplexity over 10³⁰⁸ the original: 1.000·10³⁰⁷" in text


@pytest.mark.parametrize("value", [0.0, -1e-9, 5e-324, 1e-30, 1e-7, 1.0, 1e6, 1e100, -1e100])
def test_odd_numbers(make: Make, edit: Edit, value: float) -> None:
    """Any number that a report may hold, everywhere at once and in one place among sound ones."""

    def fill(container: Any) -> None:
        for key, inner in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(inner, dict | list):
                fill(inner)
            elif isinstance(inner, float):
                container[key] = value

    def everywhere(manifest: Any, report: Any) -> None:
        fill(manifest["summary"])
        fill(report)

    def once(_: Any, report: Any) -> None:
        fill(report["modules"][3])
        fill(report["quality"]["sensitivity"][5])
        fill(report["quality"]["frontier"][5])

    for change in (everywhere, once):
        check(render(*edit(make(layers=3), change)))


@pytest.mark.parametrize("value", ["1e101", "-1e300", "1e400", "NaN", "null", '"0.5"'])
def test_numbers_that_a_report_does_not_hold(make: Make, value: str) -> None:
    _, report = make(layers=1)
    module = msgspec.structs.replace(report.modules[0], cosine=0.123456)
    text = msgspec.json.encode(msgspec.structs.replace(report, modules=(module,))).decode()
    assert msgspec.json.decode(text, type=Report)
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(text.replace("0.123456", value), type=Report)


def test_sensitivities_of_what_is_not_there(make: Make) -> None:
    """A unit that the model has not is left out, and without any there is no chart."""
    manifest, report = make(layers=2)
    assert report.quality is not None
    odd = tuple(
        msgspec.structs.replace(each, modules=("model.layers.9.nothing",)) for each in report.quality.sensitivity
    )
    quality = msgspec.structs.replace(report.quality, sensitivity=odd, frontier=report.quality.frontier[:1])
    page = check(render(manifest, msgspec.structs.replace(report, quality=quality)))
    assert "Most sensitive" not in page.text
    assert "frontier" in page.sections


def test_nothing_quantized_in_layers(make: Make) -> None:
    manifest, report = make(layers=2, level="weights")
    head = report.modules[-1]
    manifest = msgspec.structs.replace(manifest, quantized={head.name: manifest.quantized[head.name]})
    page = check(render(manifest, msgspec.structs.replace(report, modules=(head,))))
    assert "Relative error of every linear layer" not in page.text
    assert "lm_head" in page.sections["layers"]


def test_standard_errors_of_zero(make: Make) -> None:
    """A model against itself."""
    manifest, report = make(level="scores")
    assert report.quality is not None
    nothing = Estimate(0.0, 0.0)
    scores = report.quality.scores
    kl = msgspec.structs.replace(scores.kl, mean=0.0, standard_error=0.0, p50=0.0, p90=0.0, p99=0.0, max=0.0)
    scores = msgspec.structs.replace(scores, kl=kl, same_top1=Estimate(1.0, 0.0))
    scores = msgspec.structs.replace(scores, perplexity=msgspec.structs.replace(scores.perplexity, log_ratio=nothing))
    page = check(
        render(
            manifest, msgspec.structs.replace(report, quality=msgspec.structs.replace(report.quality, scores=scores))
        )
    )
    assert "100.0%" in page.text


# ------------------------------------------------------------------------ the command


def test_command(kept_artifact: Path, lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path.name: hash_file(path) for path in kept_artifact.iterdir()}
    done = lbq("report", kept_artifact)
    assert (done.code, done.err) == (0, "")
    written = Path("report.html").read_bytes()
    assert done.out == f"report.html: {len(written) / 1000:.1f} KB\n"
    page = check(written)
    assert "lbq convert --report kl" in page.text
    again = lbq("report", kept_artifact, "--out", "other.html", "--json")
    assert json.loads(again.out) == {"path": "other.html", "bytes": len(written)}
    assert lbq("report", kept_artifact).code == 0  # in place of the page that is there
    assert Path("other.html").read_bytes() == Path("report.html").read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "report.html"]
    assert {path.name: hash_file(path) for path in kept_artifact.iterdir()} == before


def test_converting_puts_it_into_the_artifact(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path) -> None:
    """The page that is in the artifact, hashed as its other files are, is the one that `lbq report` writes."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The keeper climbed the stairs each evening, carrying oil and a brass lamp. " * 8)
    options = ("--gs", "32", "--device", "cpu", "--report", "kl", "--text", text, "--out", out)
    assert lbq("convert", checkpoints["llama"], *options).code == 0
    page = check((out / "report.html").read_bytes())
    scores = read_report(out).quality
    assert scores is not None
    assert f"{scores.scores.same_top1.mean:.1%}" in page.sections["figures"]
    assert hash_file(out / "report.html") == read_manifest(out).files[PAGE]
    assert lbq("verify", out).code == 0
    assert lbq("report", out, "--out", tmp_path / "again.html").code == 0
    assert (tmp_path / "again.html").read_bytes() == (out / "report.html").read_bytes()


def test_what_stands_in_the_way(artifact: Path, lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "report.html"
    foreign.write_text("<!DOCTYPE html><title>mine</title>")
    done = lbq("report", artifact, "--out", foreign)
    assert (done.code, done.error) == (4, f"{foreign}: exists and is not a page of lbq's; choose another --out")
    assert foreign.read_text() == "<!DOCTYPE html><title>mine</title>"
    for out in (tmp_path, "/dev/full"):
        assert "is not a page of lbq's" in lbq("report", artifact, "--out", out).error
    assert "absent is not a folder" in lbq("report", artifact, "--out", tmp_path / "absent" / "x.html").error
    monkeypatch.chdir(artifact)
    before = sorted(path.name for path in artifact.iterdir())
    done = lbq("report", ".")
    assert done.code == 4
    assert "in the folder of an artifact" in done.error
    assert sorted(path.name for path in artifact.iterdir()) == before


def test_a_link_keeps_its_place(kept_artifact: Path, lbq: Lbq, tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to("page.html")
    for _ in range(2):
        assert lbq("report", kept_artifact, "--out", tmp_path / "link.html").code == 0
        assert (tmp_path / "link.html").is_symlink()
        assert is_page(tmp_path / "page.html")


def test_artifacts_that_are_not_whole(artifact: Path, lbq: Lbq, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    report = artifact / "report.json"
    kept = report.read_bytes()
    report.write_bytes(kept.replace(b'"bits": 4', b'"bits": 8'))
    assert f"{report}: content differs" in lbq("report", artifact, "--out", out).error
    report.unlink()
    assert "report.json is missing" in lbq("report", artifact, "--out", out).error
    assert lbq("report", tmp_path, "--out", out).code == 3
    assert not out.exists()
