"""Build the API reference from the docstrings, with pdoc: HTML pages that need no server.

    python launchers/api.py [--output build/api] [MODULE ...]

A docstring that pdoc cannot read, or a module that cannot be imported, is an error.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def add_modules_to_all(package: str) -> None:
    """Add the modules of a package to its `__all__`, in this process and for all packages below it.

    pdoc makes pages of the names in `__all__` alone. Here `__all__` holds the names that users import.
    """
    module = importlib.import_module(package)
    names = [info for info in pkgutil.iter_modules(getattr(module, "__path__", [])) if info.name != "__main__"]
    if hasattr(module, "__all__"):
        for name in module.__all__:
            vars(module).setdefault(name, getattr(module, name))  # lazy imports are not in the dictionary yet
        module.__all__ = list(dict.fromkeys([*module.__all__, *(info.name for info in names)]))
    for info in names:
        if info.ispkg:
            add_modules_to_all(f"{package}.{info.name}")


def build(modules: list[str], output: Path) -> None:
    """Write the pages of modules, and of all modules below them, into a folder.

    Raises:
        Warning: pdoc could not import a module or read a docstring.
    """
    import pdoc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn when they are imported
        for module in modules:
            add_modules_to_all(module)
        warnings.filterwarnings("error", module=r"pdoc\b")
        # Names that are imported for type checkers alone: the page shows them as they are written.
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        pdoc.render.configure(docformat="google", footer_text="pause-megatron")
        pdoc.pdoc(*modules, output_directory=output)


def main() -> int:
    """Build the pages and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=["pause_megatron"], metavar="MODULE", help="default: the package")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "api", metavar="DIR", help="default: build/api")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    try:
        build(args.modules, args.output)
    except ModuleNotFoundError as error:
        if error.name != "pdoc":
            raise
        print("error: the API reference needs pdoc: pip install -e '.[docs]'", file=sys.stderr)
        return 2
    print(args.output / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
