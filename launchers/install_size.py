"""Print how much an installation will download and keep, and refuse a disk that cannot hold it.

pip resolves the requirement without installing it. It reads only the metadata of wheels where the index allows that.
Sizes come from the servers. Most of it is torch and its dependencies, which differ twentyfold between builds.

    .venv/bin/python launchers/install_size.py .venv 'torch==2.13.0' --constraint launchers/constraints.txt
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
# Unpacked size over that of the wheels, measured on torch 2.13.0 with dependencies: 5.3 of 2.7 GB, 0.8 of 0.2 GB.
UNPACKED_CUDA, UNPACKED_CPU = 2.0, 4.0
# Other packages (DeepSpeed, datasets, transformers, ...), measured: extra -> GB to download, GB on disk.
OTHERS = {"quickstart": (0.2, 0.9), "test": (0.3, 1.4), "dev": (0.4, 1.5)}
# Of torch and its dependencies, if the servers give no sizes.
TYPICAL_CUDA, TYPICAL_CPU = 2.7 * GB, 0.2 * GB


@dataclass(frozen=True)
class Torch:
    """The torch that pip would install.

    Attributes:
        version: Version that pip chose. None: torch is installed already.
        cuda: Whether NVIDIA's libraries come with it.
        bytes: Bytes to download, with its dependencies.
        known: Whether the servers gave these sizes.
    """

    version: str | None
    cuda: bool
    bytes: float
    known: bool

    @property
    def unpacked(self) -> float:
        """Bytes on disk."""
        return self.bytes * (UNPACKED_CUDA if self.cuda else UNPACKED_CPU)


def resolve(requirement: str, constraint: str | None) -> list[dict]:
    """Return what pip would install for a requirement: entries of its report.

    Raises:
        subprocess.CalledProcessError: pip cannot resolve the requirement.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        # Metadata by byte ranges: otherwise an index without separate metadata sends whole wheels, gigabytes.
        command += ["--use-feature=fast-deps", "--report", str(report), requirement]
        command += ["--constraint", constraint] if constraint else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return json.loads(report.read_bytes())["install"]


def torch_of(entries: list[dict]) -> Torch:
    """Return version, build and size of torch and its dependencies."""
    names = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in entries}
    version = names.get("torch")
    if version is None:
        return Torch(None, False, 0, True)
    cuda = any(name.startswith("nvidia-") for name in names)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda entry: size_of(entry["download_info"]["url"]), entries))
    if None in sizes:
        return Torch(version, cuda, TYPICAL_CUDA if cuda else TYPICAL_CPU, False)
    return Torch(version, cuda, sum(sizes), True)


def size_of(url: str) -> int | None:
    """Return the bytes of a file by its headers; None if the server does not give them."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return None


def lines_about(torch: Torch, extra: str, free: float, venv: Path) -> list[str]:
    """Return the lines to print.

    Args:
        torch: The torch that pip would install.
        extra: Name of an extra of setup.py.
        free: Free bytes on the disk of the environment.
        venv: Folder of the environment.
    """
    others, others_on_disk = OTHERS.get(extra, OTHERS["test"])
    if torch.version is None:
        return [f"torch is installed; at most {others:.1f} GB to download, {others_on_disk:.1f} GB on disk"]
    build = "a CUDA build, with NVIDIA's libraries" if torch.cuda else "a CPU build"
    about = "" if torch.known else "typically "
    download, on_disk = torch.bytes / GB, torch.unpacked / GB
    found = [
        f"torch {torch.version} ({build}): {about}{download:.1f} GB to download, {on_disk:.1f} GB on disk",
        f"with all else about {download + others:.1f} GB to download and {on_disk + others_on_disk:.1f} GB on disk at "
        f"{venv}, where {free / GB:.1f} GB are free",
    ]
    if torch.cuda:
        plain = torch.version.partition("+")[0]
        found += [
            f"without an NVIDIA GPU a CPU build does: {TYPICAL_CPU / GB + others:.1f} GB to download, "
            f"{TYPICAL_CPU * UNPACKED_CPU / GB + others_on_disk:.1f} GB on disk. Stop (Ctrl-C) and start again with",
            f"    TORCH='torch=={plain}+cpu' PIP_EXTRA_INDEX_URL=INDEX, PyTorch's for CPUs: see its installation page",
        ]
    return found


def main() -> int:
    """Print the sizes, and return 1 if the disk cannot hold the installation, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="folder of the virtual environment")
    parser.add_argument("requirement", help="of torch, as pip takes it")
    parser.add_argument("--constraint", metavar="FILE", help="as pip takes it")
    parser.add_argument("--extra", default="quickstart", metavar="NAME", help="of setup.py (default: quickstart)")
    args = parser.parse_args()
    try:
        torch = torch_of(resolve(args.requirement, args.constraint))
    except (OSError, subprocess.CalledProcessError, KeyError, ValueError):
        log("the size of the download is not known: about 3 GB with a CUDA build of torch, 0.4 GB with a CPU build")
        return 0  # pip will report what is wrong with the requirement, the index or the network
    there = next(folder for folder in (args.venv, *args.venv.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    for line in lines_about(torch, args.extra, free, args.venv):
        log(line)
    needed = torch.unpacked + (OTHERS.get(args.extra, OTHERS["test"])[1] * GB if torch.version else 0)
    if free < needed:
        log(
            f"error: expected {needed / GB:.1f} GB free at {args.venv}, got {free / GB:.1f} GB; make room, set VENV to "
            "a folder elsewhere, or take a CPU build of torch"
        )
        return 1
    return 0


def log(text: str) -> None:
    """Print a line as setup.sh does."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
