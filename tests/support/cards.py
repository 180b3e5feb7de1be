"""The code of an export's card, run as a reader would."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path


def run_card(folder: Path, prompt: str) -> str:
    """Run the first code of an export's card, with 8 new tokens as on the page. Returns what it prints."""
    code = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    assert '"FOLDER"' in code and "max_new_tokens=64" in code
    code = code.replace('"FOLDER"', repr(str(folder))).replace("max_new_tokens=64", "max_new_tokens=8")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {"prompt": prompt})
    return out.getvalue().removesuffix("\n")
