"""What loads what, in fresh processes: the runtime stands alone, and `import lbq` costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What only converting needs. `lbq run` works where these are not installed.
ABSENT = ("transformers", "auto_round", "compressed_tensors", "huggingface_hub", "safetensors")


def python(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_lbq_is_light() -> None:
    loaded = set(python("import sys, lbq, lbq.cli, lbq.runtime; print(*sys.modules)").split())
    assert "lbq.runtime" in loaded
    assert not loaded & {"torch", "numpy", *ABSENT, "lbq.quantizer", "lbq.runtime.model"}


def test_the_runtime_stands_alone(kept_artifact: Path) -> None:
    """`lbq run` answers where the packages of the quantizer cannot be imported, and loads none of its modules."""
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {ABSENT} or name.startswith('lbq.quantizer'):\n"
        "            raise ModuleNotFoundError(f'{name} is absent', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from lbq import cli\n"
        "code = cli._run()\n"
        "print()\n"
        "print(*sys.modules)\n"
        "sys.exit(code)\n"
    )
    options = ("-p", "Hi", "--max-tokens", "3", "--device", "cpu", "--threads", "1")
    loaded = set(python(program, "run", kept_artifact, *options).splitlines()[-1].split())
    assert "lbq.runtime.model" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in ABSENT or name.startswith("lbq.quantizer")]


def test_the_quantizer_does_not_load_the_runtime() -> None:
    loaded = set(python("import sys, lbq.quantizer.convert; print(*sys.modules)").split())
    assert not [name for name in loaded if name.startswith("lbq.runtime")]
    assert not loaded & {"transformers", "auto_round", "huggingface_hub"}  # loaded when they are needed


@pytest.mark.parametrize(
    ("part", "banned"),
    [
        ("runtime", ("lbq.quantizer", "lbq.cli", *ABSENT)),
        ("quantizer", ("lbq.runtime", "lbq.cli")),
        ("formats", ("lbq.runtime", "lbq.quantizer", "lbq.cli", *ABSENT)),
    ],
)
def test_no_module_imports_across_the_stages(part: str, banned: tuple[str, ...]) -> None:
    """Not even inside a function."""
    paths = sorted((ROOT / part).rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not any(name == ban or name.startswith(f"{ban}.") for ban in banned), f"{path}: {name}"


def test_names_of_the_package() -> None:
    import lbq
    from lbq.conversion import convert
    from lbq.loading import load

    assert (lbq.convert, lbq.load) == (convert, load)
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = lbq.frobnicate
