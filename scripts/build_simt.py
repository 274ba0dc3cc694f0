"""Builds the module `_simt` for the tests: both back ends, with the CUDA sources compiled for the host.

python scripts/build_simt.py FOLDER [--sanitize address,undefined]
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

import pybind11

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--sanitize", default="")
    args = parser.parse_args()
    folder = args.folder.resolve()
    bin_dir = pathlib.Path(sys.executable).parent
    path = f"{bin_dir}:/usr/local/bin:/usr/bin:/bin"
    cmake = shutil.which("cmake", path=path) or "cmake"
    ninja = shutil.which("ninja", path=path) or "ninja"
    subprocess.run(
        [
            cmake,
            "-G",
            "Ninja",
            "-S",
            ROOT,
            "-B",
            folder,
            "-DFASTKD_SIMT=ON",
            f"-DFASTKD_SANITIZE={args.sanitize}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_PREFIX_PATH={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "--log-level=WARNING",
        ],
        check=True,
    )
    subprocess.run([ninja, "-C", folder, "--quiet"], check=True)


if __name__ == "__main__":
    main()
