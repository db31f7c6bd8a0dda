"""Builds csrc/ with CMake and ninja against the installed torch."""

import os
import shutil
import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_VERSION = torch.__version__.split("+")[0]


def tool(name: str) -> str:
    """Return the path of a build tool, which a wheel may have put beside python."""
    beside_python = os.path.dirname(sys.executable)
    path = os.pathsep.join([os.environ.get("PATH", ""), beside_python])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"setup.py needs {name}; run: pip install {name}")
    return found


def build_folder() -> Path:
    """Return one folder per environment, so that none spoils another's work.

    An isolated build has a torch of its own in a folder that is never the same.
    """
    home = os.path.dirname(torch.__file__)
    is_isolated = not Path(home).is_relative_to(sys.prefix)
    key = "isolated" if is_isolated else sha256(home.encode()).hexdigest()[:8]
    name = f"{sys.implementation.cache_tag}-torch{TORCH_VERSION}-{key}"
    return ROOT / "build" / name


class CMakeBuild(build_ext):
    """Runs CMake in a stable folder, so that a second build finds its work done."""

    def build_extension(self, ext: Extension) -> None:
        """Build the native module and copy it to where setuptools wants it."""
        folder = build_folder()
        settings = {
            "CMAKE_BUILD_TYPE": "RelWithDebInfo",
            # Lines are enough, and take half the time.
            "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O2 -g1 -DNDEBUG",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "TORCH_ROOT": os.path.dirname(torch.__file__),
            "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYTHON_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        }
        flags = [f"-D{name}={value}" for name, value in settings.items()]
        cmake = tool("cmake")
        jobs = str(self.parallel or min(4, os.cpu_count() or 1))
        subprocess.run(
            [cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", *flags],
            check=True,
        )
        subprocess.run([cmake, "--build", str(folder), "-j", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)
        # The device proxy: libraries and a program that no Python loads.
        home = ROOT if self.editable_mode or self.inplace else Path(self.build_lib)
        proxy = home / "mnemosyne_plugin" / "proxy" / "lib"
        proxy.mkdir(parents=True, exist_ok=True)
        for built in (folder / "device_proxy").iterdir():
            # A running program cannot be written over, but its name can be given away.
            (proxy / built.name).unlink(missing_ok=True)
            shutil.copy2(built, proxy / built.name)


setup(
    name="mnemosyne-plugin",
    version="0.1.0",
    description="Error recovery for LLM training without restarts and checkpoints",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mnemosyne_plugin", "mnemosyne_plugin.*"]),
    package_data={"mnemosyne_plugin.ccl": ["_C.pyi"]},
    ext_modules=[Extension("mnemosyne_plugin.ccl._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[f"torch=={TORCH_VERSION}"],
    extras_require={
        "dev": [
            "clang-format",
            "cmake",
            "mypy",
            "ninja",
            "pytest",
            "pytest-timeout",
            "ruff",
        ],
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],
        "megatron": ["megatron-core>=0.16.1,<0.20"],
    },
    entry_points={
        "console_scripts": ["mnemosyne = mnemosyne_plugin.cli:main"],
        "torch.backends": ["mnemosyne = mnemosyne_plugin.autoload:autoload"],
    },
    zip_safe=False,
)
