"""README.md keeps its word: its commands exist, its Python compiles, and what it marks as runnable runs.

An HTML comment on the line before a fenced block (readers never see it) asks for more than a look at the flags:

    <!-- run -->             run the block; it needs the default model
    <!-- run: no model -->   run the block; it needs no model

The blocks that run share one temporary directory, in the order of the page. The README.md there is the beginning of the
page, of more tokens than the slots hold, since each command reads it anew.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
BIN = Path(sys.executable).parent
SHELL_LANGUAGES = ("console", "bash", "sh", "shell")
OPERATORS = ("|", "||", "&", "&&", ";", "(", ")", "|&")

needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language, its text, and what the comment before it asks for."""

    line: int
    language: str
    text: str
    run: str | None = None


def blocks_of(markdown: str) -> Iterator[Block]:
    """Find the fenced blocks of a page."""
    pattern = r"^(?:<!-- *(run(?:: *no model)?) *-->\n+)?^( *)(`{3,})(\w*)[^\n]*\n(.*?)^\2\3 *$"
    for found in re.finditer(pattern, markdown, re.MULTILINE | re.DOTALL):
        run, indent, _, language, text = found.groups()
        line = markdown.count("\n", 0, found.start(3)) + 1
        yield Block(line, language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE), run)


def script_of(block: Block) -> str:
    """Return what a reader would type: the lines after `$ `, or the whole block where no line has a prompt."""
    text = block.text.replace("\\\n", " ")
    typed = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    return "\n".join(typed) if typed or block.language == "console" else text


def commands_of(script: str) -> Iterator[list[str]]:
    """Find the calls of lococo in a script, each as its words."""
    for line in script.splitlines():
        if "lococo" not in line:  # nor asked to be words: a here-document may hold a lone quote
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in OPERATORS:
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):  # VARIABLE=value before the command
                words.pop(0)
            if words and Path(words[0]).name == "lococo":
                yield words[1:]
            words = []


@cache
def help_of(*verbs: str) -> str | None:
    """Return what `lococo VERBS --help` prints; None where there is no such verb."""
    call = [sys.executable, "-c", "import sys; from lococo.cli import main; sys.exit(main())", *verbs, "--help"]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if done.returncode == 0 else None


def verbs_in(text: str) -> list[str]:
    """List the verbs that a help text offers: `usage: lococo [options] {read,eval} ...`."""
    found = re.search(r"\{([\w,.-]+)\}\s+\.\.\.", text)
    return found.group(1).split(",") if found else []


def complaint_about(words: list[str]) -> str | None:
    """Say what is wrong with a call of lococo, if anything is."""
    verbs: list[str] = []
    text = help_of()
    assert text is not None, "`lococo --help` fails"
    for word in words:
        if word == "--":
            break
        flag = re.match(r"--[A-Za-z][\w.-]*|-[A-Za-z]\b", word)
        if flag and not re.search(rf"(?<![\w-]){re.escape(flag.group())}(?![\w-])", text):
            return f"`lococo {' '.join([*verbs, '--help'])}` knows no {flag.group()}"
        if flag:
            continue
        if word in (offered := verbs_in(text)):
            verbs.append(word)
            text = help_of(*verbs)
            if text is None:
                return f"`lococo {' '.join(verbs)} --help` fails"
        elif offered and not verbs:
            return f"no verb {word!r}; there are {', '.join(offered)}"
    return None


BLOCKS = list(blocks_of(README.read_text(encoding="utf-8"))) if README.exists() else []
CALLS = [
    pytest.param(words, id=f"line {block.line}: {' '.join(words)}")
    for block in BLOCKS
    if block.language in SHELL_LANGUAGES
    for words in commands_of(script_of(block))
]
PYTHON = [pytest.param(block, id=f"line {block.line}") for block in BLOCKS if block.language == "python"]
RUN = [
    pytest.param(block, id=f"line {block.line}", marks=[pytest.mark.real_model] if block.run == "run" else [])
    for block in BLOCKS
    if block.run
]


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the README's blocks run."""
    folder = tmp_path_factory.mktemp("visitor")
    page = README.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / README.name).write_text("".join(page[:70]), encoding="utf-8")
    return folder


@needs_readme
@pytest.mark.parametrize("words", CALLS)
def test_a_command_is_one_the_command_line_takes(words: list[str]) -> None:
    assert complaint_about(words) is None


@needs_readme
@pytest.mark.parametrize("block", PYTHON)
def test_python_compiles(block: Block) -> None:
    compile(block.text, f"README.md:{block.line}", "exec")


@needs_readme
@pytest.mark.parametrize("block", RUN)
def test_a_block_marked_to_run_runs(block: Block, visitor: Path, request: pytest.FixtureRequest) -> None:
    if block.run == "run":
        request.getfixturevalue("default_model")  # skips where the model is absent
    call = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-ec", script_of(block)]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(call, cwd=visitor, env=environment, input="", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"README.md:{block.line}\n{done.stdout}\n{done.stderr}"


@needs_readme
def test_the_page_shows_the_command_line_and_the_library() -> None:
    assert CALLS, "README.md calls lococo nowhere"
    assert PYTHON, "README.md has no Python"
    assert RUN, "README.md has nothing marked <!-- run -->"
    assert all(block.language in (*SHELL_LANGUAGES, "python") for block in BLOCKS if block.run)


@needs_readme
def test_the_page_is_what_the_package_shows() -> None:
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert project.get("readme") == "README.md", 'add `readme = "README.md"` below `description` in pyproject.toml'


def test_help_does_not_import_torch() -> None:
    code = """
import sys
import lococo.cli
sys.argv = ["lococo", "--help"]
try:
    lococo.cli.main()
except SystemExit as done:
    assert not done.code, done.code
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, f"`lococo --help` imports {heavy}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


PAGE = """
Text with `lococo inline`.

<!-- run -->
```console
$ lococo read book.txt --num_slots 8 | head -3   # a comment
lococo prints this
$ echo "lococo" && HF_HOME=x .venv/bin/lococo eval perplexity \\
    --chunk_size=4 > out.json
```

1. An item:

   ```python
   print("hello")
   ```

<!-- run: no model -->
```bash
lococo --help
```
"""


def test_blocks_are_found_with_their_marks() -> None:
    found = list(blocks_of(PAGE))
    assert [(block.line, block.language, block.run) for block in found] == [
        (5, "console", "run"),
        (14, "python", None),
        (19, "bash", "run: no model"),
    ]
    assert found[1].text == 'print("hello")\n'


def test_commands_are_found_among_prompts_pipes_and_output() -> None:
    first, _, last = blocks_of(PAGE)
    assert list(commands_of(script_of(first))) == [
        ["read", "book.txt", "--num_slots", "8"],
        ["eval", "perplexity", "--chunk_size=4", ">", "out.json"],
    ]
    assert list(commands_of(script_of(last))) == [["--help"]]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("read book.txt --num_slots=8 -o x", None),
        ("eval perplexity --window 3", None),
        ("--version", None),
        ("raed book.txt", "no verb 'raed'; there are read, eval"),
        ("read book.txt --num_slot 8", "`lococo read --help` knows no --num_slot"),
        ("eval perplexity --num_slots 3", "`lococo eval perplexity --help` knows no --num_slots"),
        ("--num_slots 8 read", "`lococo --help` knows no --num_slots"),
    ],
)
def test_a_wrong_verb_or_flag_is_complained_about(
    line: str, complaint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {
        (): "usage: lococo [-h] [--version] {read,eval} ...",
        ("read",): "usage: lococo read [--num_slots N] [-o FILE] document",
        ("eval",): "usage: lococo [options] eval {perplexity} ...",
        ("eval", "perplexity"): "usage: lococo eval perplexity [--window N]",
    }
    monkeypatch.setitem(globals(), "help_of", lambda *verbs: pages.get(verbs))
    assert complaint_about(line.split()) == complaint
