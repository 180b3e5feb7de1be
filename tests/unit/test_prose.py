"""Prose that people read: docstrings of the public interface, error texts, and sentences of the pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pause_megatron"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [
    path for depth in ("*", "*/*") for path in sorted(ROOT.glob(f"{depth}/README.md")) if "assets" not in path.parts
]
LONGEST_SENTENCE = 45
README_WORDS = 1200

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Public functions, classes and methods; what is defined inside a function is private."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_") and not is_overload(node):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def is_overload(node: Definition) -> bool:
    """Whether a definition is for type checkers only, or sets a property whose getter is documented."""
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return "overload" in names or any(name.endswith(".setter") for name in names)


def test_at_least_95_percent_of_public_definitions_have_a_docstring():
    documented, missing = 0, []
    for path in SOURCES:
        for node in public_definitions(ast.parse(path.read_text(encoding="utf-8")).body):
            documented += bool(ast.get_docstring(node))
            if not ast.get_docstring(node):
                missing.append(f"{name_of(path)}:{node.lineno} {node.name}")
    share = documented / (documented + len(missing))
    assert documented > 500 and share >= 0.95, f"{share:.1%}; without one:\n" + "\n".join(missing)


def test_the_first_line_of_every_module_is_a_sentence():
    wrong = []
    for path in SOURCES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first, _, rest = docstring.partition("\n")
        if not first.endswith(".") or len(first) > 117 or (rest and not rest.startswith("\n")):
            wrong.append(f"{name_of(path)}: {first}")
    assert wrong == []


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a source but docstrings, with its line; pieces of an f-string joined."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | docstrings:
            yield node.lineno, node.value


def test_errors_say_expected_and_got():
    """`PLACE: expected X, got Y`: "came" nowhere, and "found" not after "expected"."""
    wrong = re.compile(r"\bcame\b|expected\b.*[,;] found\b")
    found = [f"{name_of(path)}:{line}: {text}" for path in SOURCES for line, text in texts(path) if wrong.search(text)]
    assert found == []


def sentences(text: str) -> Iterator[str]:
    """Sentences of a page: code blocks out, each list item, table cell and heading apart, links by their text."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\|.*\|$", lambda row: "\n\n".join(re.split(r"(?<!\\)\|", row[0])), text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|^#+ .*$", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?:])[*)]*\s+(?=[\"'(*`A-Z0-9])", " ".join(paragraph.split()))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_sentence_of_a_page_is_long(path):
    long = [(len(sentence.split()), sentence) for sentence in sentences(path.read_text(encoding="utf-8"))]
    long = [f"{words} words: {sentence}" for words, sentence in long if words > LONGEST_SENTENCE]
    assert long == []


def test_the_sentences_of_a_page_are_found():
    page = "# A b\n\nOne `two.` three. Four [five](six seven).\n- eight\n- nine ten: Eleven\n\n| a b | c |\n"
    page += "```\nx y\n```\n"
    expected = ["One `two.` three.", "Four five.", "- eight", "- nine ten:", "Eleven", "a b", "c"]
    assert [sentence for sentence in sentences(page) if sentence] == expected


def test_the_readme_is_short_and_begins_with_code():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= README_WORDS
    shell, python = re.findall(r"^```(?:python|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[:2]
    assert [len([line for line in block.splitlines() if line]) for block in (shell, python)] == [3, 3]
    assert text.index("```bash") < 600 and text.index("```python") < 1100 and "run on two GPUs" in text[:2500]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target
