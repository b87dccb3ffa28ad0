"""What a release installs: the sdist from this tree, the wheel from the sdist."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel made from it, by the build tool's default."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def modules() -> set[str]:
    """Every file of the package as it is in this tree, by the path it is installed at."""
    homes = {"lbq": ROOT / "src" / "lbq"} | {f"lbq/{name}": ROOT / name for name in ("formats", "quantizer", "runtime")}
    found = {
        f"{home}/{path.relative_to(folder)}"
        for home, folder in homes.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    return {name for name in found if name.endswith((".py", "py.typed", ".txt", ".jinja", ".css", ".json"))}


def test_wheel(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        assert {name.partition("/")[0] for name in names} == {"lbq", info}
        assert {name for name in names if name.startswith("lbq/")} == modules()
        assert archive.read("lbq/quantizer/rtn.py") == (ROOT / "quantizer" / "rtn.py").read_bytes()
        assert b"lbq = lbq.cli:main" in archive.read(f"{info}/entry_points.txt")
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "Name: lbq\n" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: MIT" in metadata
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_parts_of_the_package() -> None:
    names = modules()
    for name in (
        "formats/spec.py",
        "quantizer/convert.py",
        "runtime/model.py",
        "cli/__init__.py",
        "py.typed",
        "evaluation/english.txt",
        "page/page.css",
    ):
        assert f"lbq/{name}" in names


def test_sdist(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {"pyproject.toml", "README.md", "LICENSE", "quantizer/rtn.py", "src/lbq/py.typed"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".whl"))]
    weights = {str(Path(name).parent) for name in names if name.endswith(".safetensors")}
    assert weights == {f"tests/quantizer/foreign/{tool}" for tool in ("gptqmodel", "mlx")}  # of tiny models
    assert not [name for name in names if name.startswith(("src/lbq/quantizer", "models", ".venv"))]
    assert sum(member.size for member in members) < 5 << 20
