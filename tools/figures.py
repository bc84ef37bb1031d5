"""The figures that keep the house small: function and file lengths, and import cycles. Beyond a limit, it fails.

python tools/figures.py
"""

import ast
import statistics
import sys
from pathlib import Path

import grimp

PACKAGE = Path(__file__).resolve().parents[1] / "phased_cpt"
LONGEST_FUNCTION = 60
LONGEST_FILE = 400


def function_lengths(tree: ast.Module, file: Path) -> list[tuple[int, str]]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    where = file.relative_to(PACKAGE.parent)
    return [((node.end_lineno or 0) - node.lineno + 1, f"{where}:{node.lineno} {node.name}") for node in functions]


def import_cycles() -> list[str]:
    """Top modules that import each other, directly or through others."""
    graph = grimp.build_graph(PACKAGE.name)
    tops = sorted(graph.find_children(PACKAGE.name))
    return [
        f"{one} ⇄ {other}"
        for i, one in enumerate(tops)
        for other in tops[i + 1 :]
        if graph.chain_exists(one, other, as_packages=True) and graph.chain_exists(other, one, as_packages=True)
    ]


def main() -> int:
    texts = {file: file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
    functions = sorted(length for file, text in texts.items() for length in function_lengths(ast.parse(text), file))
    files = sorted((text.count("\n"), str(file.relative_to(PACKAGE.parent))) for file, text in texts.items())
    lengths = [length for length, _ in functions]
    cycles = import_cycles()
    print(
        f"functions: {len(lengths)}, median {statistics.median(lengths):g} lines, "
        f"p90 {statistics.quantiles(lengths, n=10)[8]:g}, longest {functions[-1][0]} ({functions[-1][1]})\n"
        f"files: {len(files)}, {sum(length for length, _ in files)} lines, longest {files[-1][0]} ({files[-1][1]})\n"
        f"import cycles between top modules: {len(cycles) or 'none'}"
    )
    too_long = [f"{what}: {n} lines, at most {LONGEST_FUNCTION}" for n, what in functions if n > LONGEST_FUNCTION]
    too_long += [f"{what}: {n} lines, at most {LONGEST_FILE}" for n, what in files if n > LONGEST_FILE]
    print(*too_long, *cycles, sep="\n", end="")
    return 1 if too_long or cycles else 0


if __name__ == "__main__":
    sys.exit(main())
