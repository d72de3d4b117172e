from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.process
def test_a_wheel_holds_all_that_the_package_reads(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = f"import hatchling.build; hatchling.build.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("duallora-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "duallora"
    needed = [path for path in package.rglob("*") if path.suffix in (".py", ".safetensors", ".md", ".yaml")]
    assert {path.relative_to(ROOT / "src").as_posix() for path in needed} <= packed
    assert "duallora/py.typed" in packed
    assert "duallora/weights/vit-micro-conv-64.safetensors" in packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_dependencies_have_lower_bounds_and_no_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in extra:
            assert requirement.startswith("duallora[") or ">=" in requirement, requirement
            assert "==" not in requirement and "<" not in requirement, requirement
