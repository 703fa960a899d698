"""Size: what the README promises to be readable in an afternoon is counted here."""

from __future__ import annotations

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator

import pytest

from kernel.config import HOME

LIMIT = 6085  # code lines of osp.py, kernel/ and slices/; 3,000 were the aim
LARGEST = 250  # code lines of one file, but for slices/chat.py
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
CORE = ("osp.py", "kernel/**/*.py", "slices/**/*.py")
AGENTS = ("plugins/*_agent/**/*.py",)
LEFT_OVER = (".orig", ".rej", ".bak", "~")


def code_lines(source: str) -> int:
    """Count the lines of Python that hold code: no blank lines, comments or docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans = [(t.start[0], t.end[0]) for t in tokens if t.type not in NO_CODE]
    lines = {line for first, last in spans for line in range(first, last + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                text = node.body[0]
                lines -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


def function_lengths(source: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def sources(*patterns: str) -> dict[str, str]:
    """Return the sources by path, without the tests and the bench that lie beside agents."""
    files = sorted(file for pattern in patterns for file in HOME.glob(pattern))
    names = [str(file.relative_to(HOME)) for file in files]
    kept = [name for name in names if not re.match(r"plugins/.*/(test_|bench/)", name)]
    return {name: (HOME / name).read_text(encoding="utf-8") for name in kept}


def counted(*patterns: str) -> dict[str, int]:
    counts = {name: code_lines(source) for name, source in sources(*patterns).items()}
    print(*(f"{lines:5} {name}" for name, lines in counts.items()), sep="\n")  # noqa: T201
    return counts


SAMPLE = '''"""Docstring
of two lines."""

# a comment
x = """one
two"""  # code


def f():
    """Docstring."""

    return (
        x
    )
'''


def test_only_code_is_counted() -> None:
    assert code_lines(SAMPLE) == 6
    assert list(function_lengths(SAMPLE)) == [6]


@pytest.mark.parametrize(
    ("what", "limit"),
    [
        (CORE, LIMIT),
        (AGENTS, 3020),  # 2,000 is the aim
        (("demo.py",), 324),
    ],
)
def test_a_part_is_no_larger_than_promised(what: tuple[str, ...], limit: int) -> None:
    total = sum(counted(*what).values())

    more = total - limit
    assert total and more <= 0, (
        f"{more} more: raise the limit in tests/test_size.py, and say what they buy"
    )


def test_a_file_fits_into_ones_head() -> None:
    counts = counted(*CORE, *AGENTS)
    large = {name for name, lines in counts.items() if lines > LARGEST}

    assert large <= {"slices/chat.py"}


def test_functions_are_short() -> None:
    lengths = sorted(n for source in sources(*CORE).values() for n in function_lengths(source))

    assert statistics.median(lengths) <= 6
    assert lengths[len(lengths) * 9 // 10] <= 18


def test_tests_are_no_longer_than_what_they_test() -> None:
    tests = sum(counted("tests/**/*.py").values())
    python = counted(*CORE, *AGENTS, "demo.py", "testkit.py", "entry.py", "bench/**/*.py")
    source = sum(python.values()) + example_lines() + page_lines()

    assert tests <= 1.6 * source, f"{tests} lines of tests for {source}"


def example_lines() -> int:
    """Count what tests/examples tests, which is no Python: settings of other programs."""
    files = [f for f in (HOME / "examples").rglob("*") if f.is_file()]
    other = (".py", ".pyc", ".md", ".json")
    texts = [f.read_text(encoding="utf-8") for f in files if f.suffix not in other]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return sum(1 for line in lines if line and not line.startswith("#"))


def page_lines() -> int:
    """Count what tests/docs runs and compares: the code, commands and drawings of the pages."""
    pages = [file.read_text(encoding="utf-8") for file in (HOME / "docs").glob("*.md")]
    blocks = [block for page in pages for block in re.findall(r"(?ms)^```\w+\n(.*?)^```", page)]
    return sum(1 for block in blocks for line in block.splitlines() if line.strip())


def test_the_bench_is_no_framework() -> None:
    files = [f for f in (HOME / "bench").rglob("*") if f.suffix in (".py", ".go", ".sh", ".lua")]
    lines = {f.name: len(f.read_text(encoding="utf-8").splitlines()) for f in files}

    assert sum(lines.values()) <= 1200, lines


def test_no_leftovers_of_a_merge_or_an_editor_lie_about() -> None:
    parts = ("kernel", "slices", "plugins", "tests", "bench", ".ci")
    files = [*HOME.iterdir(), *(file for part in parts for file in (HOME / part).rglob("*"))]

    assert [str(file) for file in files if file.name.endswith(LEFT_OVER)] == []
