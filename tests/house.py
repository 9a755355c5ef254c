"""Lines of the package: the total and the longest function, as `make lint` checks them."""

import ast
import sys
from pathlib import Path

MOST_LINES, LONGEST_FILE, LONGEST_FUNCTION = 9_000, 400, 60


def main() -> None:
    """Print the sizes; exit with 1 where one is over its limit."""
    files = {path: path.read_text() for path in sorted(Path("minildm").rglob("*.py"))}
    lines = {path: len(text.splitlines()) for path, text in files.items()}
    functions = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, text in files.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }
    longest = max(functions, key=functions.get)
    sizes = {
        "lines in minildm/": (sum(lines.values()), MOST_LINES),
        f"lines in {max(lines, key=lines.get)}": (max(lines.values()), LONGEST_FILE),
        f"lines in {longest}": (functions[longest], LONGEST_FUNCTION),
    }
    for what, (found, most) in sizes.items():
        print(f"{what}: {found}, at most {most}")
    sys.exit(any(found > most for found, most in sizes.values()))


if __name__ == "__main__":
    main()
