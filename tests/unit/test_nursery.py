"""What the nursery imports in advance, each case in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from mnemosyne_plugin.launch import nursery

RUN = """
import sys
from pathlib import Path
from mnemosyne_plugin.launch import nursery
nursery._library_folders = lambda: [Path(sys.argv[1])]
sys.path[:0] = sys.argv[1:3]
print(nursery.preload(sys.argv[3:]), sorted(set(sys.argv[3:]) & set(sys.modules)))
"""


def preload(folder: Path, *modules: str) -> str:
    """Return the culprit and what was imported; ``site`` is the library's folder."""
    command = [sys.executable, "-c", RUN, str(folder / "site"), str(folder / "script")]
    done = subprocess.run(
        [*command, *modules], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return done.stdout.strip()


def write(folder: Path, name: str, source: str) -> None:
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def test_libraries_are_imported_and_modules_of_the_user_are_not(tmp_path: Path) -> None:
    write(tmp_path, "site/library", "print('noise')")
    write(tmp_path, "site/package/__init__", "")
    write(tmp_path, "site/package/part", "")
    write(tmp_path, "script/users", "import os; os.environ['RANK']")
    modules = ("library", "package.part", "users", "missing", "package.missing")
    assert preload(tmp_path, *modules) == "None ['library', 'package.part']"


def test_a_module_that_fails_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "site/bad", "raise RuntimeError")
    write(tmp_path, "site/leaves", "raise SystemExit(3)")
    write(tmp_path, "site/good", "")
    assert preload(tmp_path, "bad", "leaves", "good") == "None ['good']"


def test_a_module_that_starts_a_thread_is_named(tmp_path: Path) -> None:
    source = "import threading; threading.Thread(target=threading.Event().wait,"
    write(tmp_path, "site/busy", source + " daemon=True).start()")
    write(tmp_path, "site/good", "")
    assert preload(tmp_path, "good", "busy").startswith("busy ")


def test_the_standard_library_and_site_packages_are_libraries() -> None:
    homes = nursery._library_folders()
    for name in (
        "json.decoder",
        "sys",
        "torch.optim",
        "pytest",
        "zipimport",
        "mnemosyne_plugin.errors",
    ):
        assert nursery._may_preload(name, homes), name
    for name in ("__main__", "no_such_module", ""):
        assert not nursery._may_preload(name, homes), name


def test_what_a_user_has_put_into_a_namespace_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, own = tmp_path / "library", tmp_path / "own"
    for folder, package in ((library, "core"), (own, "training")):
        (folder / "space" / package).mkdir(parents=True)
        (folder / "space" / package / "__init__.py").write_text("raise RuntimeError")
        monkeypatch.syspath_prepend(str(folder))
    assert nursery._may_preload("space.core.parts", [library])
    assert not nursery._may_preload("space.training.parts", [library])
    assert not nursery._may_preload("space", [library])
    assert "space.training" not in sys.modules
