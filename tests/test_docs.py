"""The documentation is true of the code: links, commands, flags and defaults, file names, quoted messages."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron_fdd.cli import COMMANDS
from megatron_fdd.config import FddConfig
from tests.harness.command_lines import commands, flags_of, training_parser
from tests.harness.markdown import ROOT, Page, pages

PAGES = pages("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "examples/**/README.md")
LINKING_PAGES = [*PAGES, *pages("benchmarks/LOG.md", "CHANGELOG.md")]
# Named in the pages before they are there.
PENDING: set[str] = set()
# Its subject is other programs' flags and files.
ABOUT_OTHERS = "docs/migrating-from-modelopt.md"
# A room whose errors no user meets: the checks of the command line come first.
UNQUOTED = {"ops"}
# Flags of torchrun, and of every program.
_OTHER_FLAGS = {"--standalone", "--master-port", "--node-rank", "--nproc-per-node", "--help"}
_OTHER_FILES = {"pretrain_gpt.py"}
# The start of a sentence that begins with "Of": of a comment, of a docstring, or after the end of another.
_BEGINS_WITH_OF = re.compile(r"""(?:#|\"{3}|[.:;!?])\s*Of\s""")
# First words of a noun phrase, which no docstring of a function may be.
_NOUN_PHRASE = frozenset("A An As By Each Every From How Of The These What Where With".split())
_PROGRAM = re.compile(r"(?:[A-Z_]+=\S* )*(?:python|torchrun|bash|srun|sbatch|pip|fdd) ")
# What a reader can do: a verb that begins a clause, or what a value must be.
_REMEDY = re.compile(
    r"[;:,.(] ?(?:or |so |if [\w ]+, )?(?:add|choose|convert|copy|delete|do|evaluate|give|install|keep|leave|lower|make"
    r"|name|pass|pip install|prepare|put|raise|remove|rename|run|save|say|see|set|start|tell|train|try|unset|use|write)"
    r"\b|\b(?:must|at least|or more|needs?|only|such as)\b",
    re.IGNORECASE,
)


def each(page: Page) -> str:
    return page.name


@cache
def page_at(path: Path) -> Page:
    return Page(path)


@pytest.mark.parametrize("page", LINKING_PAGES, ids=each)
def test_links_lead_somewhere(page: Page) -> None:
    broken = []
    for link in page.links:
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        if path.is_relative_to(ROOT) and str(path.relative_to(ROOT)) in PENDING and not path.exists():
            continue
        if not path.exists() or (anchor and anchor not in page_at(path).anchors):
            broken.append(link)
    assert broken == []


@pytest.mark.tier("default")
def test_bash_can_be_read() -> None:
    for block in (block for page in PAGES for block in page.blocks("bash")):
        result = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert result.returncode == 0, f"{result.stderr}\n{block}"


@pytest.mark.parametrize("page", PAGES, ids=each)
def test_commands_exist_and_know_their_flags(page: Page) -> None:
    wrong = []
    inline = [code for code in page.inline_code if _PROGRAM.match(code)]
    for command in (command for bash in [*page.blocks("bash"), *inline] for command in commands(bash)):
        if not is_there(command.program):
            wrong += [command.program] * (command.program not in PENDING)
        elif command.flags and not command.program.endswith(".sh"):
            known = flags_of(command.program)
            wrong += [f"{command.program} {flag}" for flag in command.flags if flag not in known]
    assert wrong == []


def test_the_files_for_clusters_can_be_read() -> None:
    """What no machine here can run: the YAML is a PyTorchJob, and the training's flags in it exist."""
    job = yaml.safe_load((ROOT / "docker/pytorchjob.yaml").read_text(encoding="utf-8"))
    assert job["kind"] == "PyTorchJob"
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replicas["template"]["spec"]["containers"]
        (command,) = commands(*container["args"])
        assert len(command.flags) > 10
        assert set(command.flags) <= flags_of(command.program)


@pytest.mark.parametrize("page", pages("docs/api/*.md"), ids=each)
def test_what_the_pages_of_the_api_show_is_there(page: Page) -> None:
    for name in re.findall(r"^::: (.+)$", page.text, re.MULTILINE):
        pkgutil.resolve_name(name)  # fails where it is not


def is_there(program: str) -> bool:
    if program.startswith("fdd "):
        return True  # only those that exist are taken for commands
    if "/" in program:
        return (ROOT / program).is_file()
    return importlib.util.find_spec(program) is not None


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != ABOUT_OTHERS], ids=each)
def test_flags_in_the_text_exist(page: Page) -> None:
    if any(tool in page.text and not is_there(tool) for tool in PENDING if tool.endswith(".py")):
        pytest.skip("describes a tool that is not there yet")
    known = {*training_parser()._option_string_actions, *_OTHER_FLAGS}
    for name in COMMANDS:
        known |= flags_of(f"fdd {name}")
    quoted = {code for quote in page.quotes for code in quote}
    codes = [code for code in page.inline_code if code not in quoted and not _PROGRAM.match(code)]
    named = {flag for code in codes for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    # A name that ends so stands for many.
    assert {flag for flag in named - known if not flag.endswith("-")} == set()


def test_our_flags_exist_wherever_they_are_named() -> None:
    known = training_parser()._option_string_actions
    for page in PAGES:
        named = set(re.findall(r"--fdd-[a-z][a-z-]*[a-z]", page.text))
        assert named - set(known) == set(), page.name


def test_generated_parts_are_up_to_date() -> None:
    """`python docs/generate.py` makes them so."""
    made = generated_parts()
    texts = {page.path.name: page.text for page in pages("docs/*.md")}
    assert [name for name, text in texts.items() if made.filled(name, text) != text] == []
    marked = {
        (name, part) for name, text in texts.items() for part in re.findall(made.MARK.format("(.+)"), text)
    }
    assert marked == made.PARTS.keys()


def generated_parts() -> ModuleType:
    """docs/generate.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_field_of_the_config_has_a_flag() -> None:
    flags = [action.option_strings[-1] for action in training_parser()._actions]
    ours = [flag for flag in flags if flag.startswith(("--fdd-", "--teacher-"))]
    assert len(ours) == len(FddConfig.__slots__)
    listed = re.findall(r"^\| `(--[\w-]+)", page_at(ROOT / "docs/flags.md").text, re.MULTILINE)
    assert set(ours) <= set(listed)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != ABOUT_OTHERS], ids=each)
def test_named_files_exist(page: Page) -> None:
    missing = []
    for code in page.inline_code:
        rooted = re.fullmatch(r"(?:megatron_fdd|tests|tools|examples|benchmarks|docs)/[\w./-]*", code)
        if (rooted or re.fullmatch(r"[\w/]+\.py", code)) and code not in PENDING | _OTHER_FILES:
            places = [ROOT, ROOT / "megatron_fdd", ROOT / "tests", site_packages()]
            missing += [code] * (not any((place / code).exists() for place in places))
    assert missing == []


def site_packages() -> Path:
    spec = importlib.util.find_spec("megatron.training")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[2]


def test_quoted_messages_are_said() -> None:
    ours = frozenset().union(*(strings(source) for source in our_sources()))
    stale = []
    for quote, source in troubleshooting():
        said = strings(site_packages() / source) if source else ours
        stale += [quote] * (not any(quote in message for message in said))
    assert stale == []


def test_every_refusal_has_a_remedy() -> None:
    """A message says what to do, or the page has more about it."""
    quotes = [quote for quote, source in troubleshooting() if not source]
    refusals = {text for source in our_sources() if room(source) not in UNQUOTED for text in raised(source)}
    assert len(refusals) > 100
    bare = [text for text in refusals if not _REMEDY.search(text)]
    assert len(bare) < len(refusals) / 2
    assert sorted(text for text in bare if not any(quote in text for quote in quotes)) == []


def test_a_check_begins_with_what_it_does() -> None:
    """A function that raises or warns, and returns nothing, is not described as if it answered a question."""
    begins = {"check": ("Refuse", "Warn"), "refuse": ("Refuse",), "warn": ("Warn",)}
    told, others = 0, []
    for source in (ROOT / "megatron_fdd").rglob("*.py"):
        for node in ast.walk(tree_of(source)):
            if not isinstance(node, ast.FunctionDef) or not isinstance(node.returns, ast.Constant):
                continue
            verb, _, rest = node.name.lstrip("_").partition("_")
            if rest and verb in begins and node.returns.value is None:
                told += 1
                if not (ast.get_docstring(node) or "").startswith(begins[verb]):
                    others.append(f"{source.relative_to(ROOT)}: {node.name}")
    assert others == []
    assert told > 70


def troubleshooting() -> list[tuple[str, str]]:
    """Quoted messages, each with the foreign file that says it ("" for ours)."""
    return page_at(ROOT / "docs/troubleshooting.md").quotes


def our_sources() -> list[Path]:
    return [*(ROOT / "megatron_fdd").rglob("*.py"), *(ROOT / "tools").glob("*.py")]


def room(source: Path) -> str:
    return source.relative_to(ROOT).with_suffix("").parts[1]


@cache
def tree_of(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


@cache
def strings(source: Path) -> frozenset[str]:
    """Every string of a module but docstrings, and every condition that it asserts."""
    tree = tree_of(source)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = {text(node) for node in ast.walk(tree) if node not in docstrings}
    found |= {f"assert {ast.unparse(node.test)}" for node in ast.walk(tree) if isinstance(node, ast.Assert)}
    return frozenset(each for each in found if each is not None)


def text(node: ast.AST) -> str | None:
    """A string as it stands in the source, with `...` for what is filled in; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("{}", "...")
    return None


def raised(source: Path) -> set[str]:
    """What a module's ValueErrors and FloatingPointErrors say, and why it refuses a field of a config."""
    found: set[str | None] = set()
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            is_users = getattr(node.exc.func, "id", "") in ("ValueError", "FloatingPointError")
            found |= {text(node.exc.args[0])} if is_users else set()
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "refuse" and len(node.args) == 3:
            found.add(text(node.args[2]))
    return {each for each in found if each is not None and re.search(r"[a-z]", each)}


def test_no_sentence_begins_with_of() -> None:
    folders = ("megatron_fdd", "tests", "benchmarks", "tools", "examples", "docs")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 200
    assert [path.name for path in sources if _BEGINS_WITH_OF.search(path.read_text(encoding="utf-8"))] == []


def test_docstrings_have_their_form() -> None:
    """Public names have one; a function's is an imperative, or begins with "Whether" where it returns a bool."""
    wrong = []
    for source in (ROOT / "megatron_fdd").rglob("*.py"):
        tree = tree_of(source)
        faults = ["the module has no docstring"] * (ast.get_docstring(tree) is None)
        faults += [f"{node.name}: {why}" for node, public in defined(tree) if (why := fault(node, public))]
        wrong += [f"{source.relative_to(ROOT)}: {each}" for each in faults]
    assert wrong == []


Definition = ast.FunctionDef | ast.ClassDef


def defined(
    owner: ast.Module | Definition, public: bool = True, inherits: bool = False
) -> Iterator[tuple[Definition, bool]]:
    """Yield classes and functions, and whether they need a docstring; an overriding method may inherit its own."""
    for node in owner.body:
        if isinstance(node, Definition):
            is_public = public and not node.name.startswith("_")
            yield node, is_public and not inherits
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases}
                yield from defined(node, is_public, bool(bases - {"ABC", "Protocol"}))


def fault(node: Definition, public: bool) -> str:
    """Return what is wrong with a docstring, or ""."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None:
        return "no docstring" if public else ""
    if isinstance(node, ast.ClassDef):
        return ""
    first = docstring.split()[0]
    if first == "Whether" and (node.returns is None or ast.unparse(node.returns) != "bool"):
        return "begins with Whether and returns no bool"
    is_property = any("property" in ast.unparse(each) for each in node.decorator_list)
    return "a noun phrase, not an imperative" if first in _NOUN_PHRASE and not is_property else ""
