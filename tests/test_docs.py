"""README and docs/: links and paths lead somewhere, Python blocks parse, the API reference lacks no public name."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Without fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for _, language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-") for title in titles}


def patched(diff: str) -> str:
    """What a script looks like after the change that a diff shows."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))


@each_page
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):  # external: never fetched here
            assert target.startswith("https://"), target
            continue
        path, _, anchor = unquote(target).partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


@each_page
def test_paths_in_the_text_exist(page):
    folders = "hvd_accordion|tests|examples|docker|docs"
    text = prose(page)
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`|(?<![\w/])((?:{folders})/[\w./]+\.py)\b", text):
        path = path[0] or path[1]
        assert (ROOT / path).exists(), f"{page.name}: {path}"


@each_page
def test_make_has_the_targets_in_the_text(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)(?=[` ]|$)", text, re.MULTILINE)) <= targets


@each_page
def test_python_blocks_parse_and_import_what_there_is(page):
    scripts = blocks(page, "python") + [patched(diff) for diff in blocks(page, "diff")]
    for script in scripts:
        for node in ast.walk(ast.parse(script)):
            if isinstance(node, ast.ImportFrom) and node.module == "hvd_accordion":
                module = importlib.import_module("hvd_accordion")
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], script


def public_names() -> list[tuple[str, str]]:
    """Module and name of all that the package's own `__all__` lists hold; read, not imported, for no framework is needed."""
    found = []
    for file in sorted((ROOT / "hvd_accordion").rglob("__init__.py")):
        module = ".".join(file.relative_to(ROOT).parent.parts)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id == "__all__" and isinstance(value, ast.List):
                found += [(module, ast.literal_eval(name)) for name in value.elts]
    return found


USED = re.compile(r"hvd_accordion(\.(torch|tensorflow|keras|tensorflow\.keras|integrations\.\w+))?$")


@pytest.mark.parametrize(("module", "name"), [pair for pair in public_names() if USED.match(pair[0])])
def test_the_reference_has_every_public_name(module, name):
    module = module.replace("hvd_accordion.keras", "hvd_accordion.tensorflow.keras")  # the same objects
    documented = rf"auto\w+:: {re.escape(module)}\.{name}$"
    assert re.search(rf"{documented}|{documented[:-1]}\.\w+$", REFERENCE, re.MULTILINE), f"{module}.{name}"


def test_the_readme_can_be_read():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170
