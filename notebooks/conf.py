"""The course as a site, built by `make book` from the committed outputs; nothing is executed."""

import json
import re

project = html_title = "minildm"
root_doc, html_theme, highlight_language = "README", "furo", "none"
include_patterns = ["README.md", "notebooks/**", "data/*/README.md"]
exclude_patterns = [".*", "**/.*", "runs", "notebooks/runs", "notebooks/sweeps"]
suppress_warnings = ["myst.xref_missing"]  # links to folders
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
html_copy_source = html_show_copyright = False
html_show_search_summary = False  # it fetches pages, which a browser refuses to do from a disk
nb_execution_mode, myst_enable_extensions = "off", ["dollarmath"]
mathjax3_config = {"tex": {"environments": {"split": ["", ""]}}}  # Sphinx adds it; it refuses \tag
MORE = ("more", "(notebooks/*/*.) (notebooks/[A-Z]*.) (data/*/README.)")


def prepare(_app: object, page: str, source: list[str]) -> None:
    """Contents from the README's table of the course; folds and alt texts where myst-nb looks."""
    if page == root_doc:
        parts = re.findall(r"^\| ([^|]+) \| (.*\.ipynb\).*) \|$", source[0], re.MULTILINE)
        for part, row in [*parts, MORE]:
            names = "\n".join(re.findall(r"\((\S+)\.\w*\)", row))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {part}\n{names}\n```\n"
    elif source[0].startswith("{"):
        badge = re.compile(r"!\[([^]]*)\]\(https://colab[^)]*\)")  # an image from the internet
        notebook = json.loads(badge.sub(r"\1", source[0]))
        notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        for cell in notebook["cells"]:
            meta, tags = cell["metadata"], cell["metadata"].setdefault("tags", [])
            prompt = "Solution" if "solution" in tags else "Show the code"
            if "solution" in tags or meta.get("jupyter", {}).get("source_hidden"):
                tags.append("hide-input")
            outputs = [output.get("metadata", {}) for output in cell.get("outputs", [])]
            images = [shown["image/png"] for shown in outputs if "image/png" in shown]
            meta["mystnb"] = {"image": dict(*images[:1]), "code_prompt_show": prompt}
        source[0] = json.dumps(notebook)


def setup(app) -> None:
    app.connect("source-read", prepare)
