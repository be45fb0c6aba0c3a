"""Pages of the site that are made from the repository: README, experiments, API, command line."""

from __future__ import annotations

import ast
import base64
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

#: A page of the repository, and where it stands on the site.
PAGES = (
    {
        "README.md": "overview.md",
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
        "experiments/clevr/RENDERER.md": "experiments/renderer.md",
        "experiments/clevr/recipes/README.md": "experiments/clevr_recipes.md",
        "experiments/clevr/NOTES.md": "experiments/clevr_notes.md",
        "experiments/random_sets/grid.md": "experiments/random_sets_tables.md",
        "msdspn_jax/assets/clevr_small.md": "experiments/clevr_model.md",
        "tests/golden/README.md": "golden.md",
    }
    | {f"docs/{p.name}": p.name for p in sorted(ROOT.glob("docs/*.md"))}
    | {
        f"experiments/{name}/README.md": f"experiments/{name}.md"
        for name in sorted(p.parent.name for p in ROOT.glob("experiments/*/README.md"))
    }
)
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config) -> Files:
    """Add the made pages, and whatever they link to."""
    assets: dict[str, str] = {}
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        text = _with_links(text, source, page, assets)
        existing = files.get_file_from_path(page)
        if existing is not None:
            files.remove(existing)
        files.append(File.generated(config, page, content=text))
    for source, place in assets.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for notebook in NOTEBOOKS:
        for place, content in _notebook(notebook).items():
            files.append(File.generated(config, place, content=content))
    files.append(File.generated(config, "api.md", content=_api()))
    files.append(File.generated(config, "command_line.md", content=_command_line()))
    return files


def _with_links(text: str, source: str, page: str, assets: dict[str, str]) -> str:
    """The page with its links, which are those of the repository, turned into links of the site."""

    def turned(match: re.Match) -> str:
        opening, target, anchor, closing = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            place = PAGES[path]
        elif path == "notebooks":
            place = f"notebooks/{NOTEBOOKS[0].stem}.md"
        elif path.startswith("notebooks/") and path.endswith(".ipynb"):
            place = path.removesuffix(".ipynb") + ".md"
        elif (ROOT / path).is_file():
            place = assets[path] = "files/" + path + (".txt" if path.endswith(".md") else "")
        elif (ROOT / path / "README.md").is_file():
            place = PAGES[posixpath.join(path, "README.md")]
        else:
            return match[0]
        relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return opening + relative + (anchor or "") + closing

    return _LINK.sub(turned, text)


def _mathml(match: re.Match) -> str:
    """A formula as MathML, which browsers draw by themselves, with nothing left for Markdown."""
    block = match[1] is not None
    text = (match[1] or match[2]).replace("\\arg", "\\operatorname{arg}")  # unknown to it
    markup = convert(text, display="block" if block else "inline")
    if not block:  # Else a line that begins with it would be a paragraph of its own.
        markup = f"<span>{markup}</span>"
    for character in "*_\\|":
        markup = markup.replace(character, f"&#{ord(character)};")
    return markup


def _notebook(path: Path) -> dict[str, str | bytes]:
    """A notebook as a page with its outputs, and its pictures: place -> content."""
    page, lines, made = f"notebooks/{path.stem}.md", [], {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [_FORMULA.sub(_mathml, source), ""]
            continue
        lines += ["```python", source, "```", ""]
        for place, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{number}_{place}.png"
                made[f"notebooks/{name}"] = base64.b64decode("".join(data["image/png"]))
                lines += [f"![output of the cell above]({name})", ""]
            else:
                text = "".join(output.get("text") or data.get("text/plain", ""))
                lines += ["```text", text.rstrip(), "```", ""]
    return made | {page: "\n".join(lines)}


def _api() -> str:
    """Every public name, under the module that defines it, in the order of the package."""
    package = ROOT / "msdspn_jax" / "__init__.py"
    rooms: dict[str, list[str]] = {}
    for node in ast.parse(package.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msdspn_jax."):
            rooms.setdefault(str(node.module), []).extend(alias.name for alias in node.names)
    lines = ["# API", "", "Every name is importable from the package itself: `ms.minimise`.", ""]
    for room, names in rooms.items():
        text = (ROOT / (room.replace(".", "/") + ".py")).read_text()
        summary = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
        lines += [f"## {room.removeprefix('msdspn_jax.')}", "", summary, ""]
        for name in names:
            lines += [f"::: {room}.{name}", "    options: {heading_level: 3}", ""]
    return "\n".join(lines)


#: Prints what every verb, and every task, report and kind of data, says to --help, as JSON.
_HELP = """
import contextlib, io, json
from msdspn_jax import cli
from msdspn_jax.tasks import TASKS

words = [[], *([verb] for verb in cli.VERBS)]
words += [["train", task] for task in TASKS]
words += [["data", "clevr"], ["data", "clevr-tfds"], ["predict", "--data"]]
found = {}
for each in words:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([*each, "--help"])
    found[" ".join(["msdspn", *each])] = said.getvalue()
print(json.dumps(found))
"""


def _command_line() -> str:
    """What ``--help`` says, of every verb and every task."""
    said = subprocess.run(
        [sys.executable, "-c", _HELP],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ
        | {"COLUMNS": "78", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)},
    ).stdout
    lines = ["# Command line", "", "What `--help` says, at every place.", ""]
    for title, text in sorted(json.loads(said).items()):
        if not text.strip():
            raise ValueError(f"{title} --help: expected a text, got nothing")
        lines += [f"## {title}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)
