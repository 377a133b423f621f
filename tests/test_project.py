"""The rules of the project, read from its own files.

Who may import whom, what the header of a module promises, which files to copy, how long a function may be:
all of it asserted from the syntax tree. What documents and examples show is run, each in its own interpreter.

A rule about code is a function `..._violations(module)` that returns one sentence per violation. That the
rules find anything is tested too, on snippets that break them.
"""

import ast
import concurrent.futures
import configparser
import dataclasses
import functools
import importlib
import inspect
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A module imports modules of a lower layer only, so there are no cycles. A new module adds its row. Those
# still to come have the lowest layer that will do: HTTP/2 serves flowcoro_http's handlers, gRPC needs HTTP/2.
LAYERS = {
    "flowcoro_observe": 0,
    "flowcoro_schema": 0,
    "flowcoro": 1,
    "flowcoro_os": 2,
    "flowcoro_net": 2,
    "flowcoro_testing": 2,
    "flowcoro_resilience": 2,
    "flowcoro_balance": 2,
    "flowcoro_http": 3,
    "flowcoro_websocket": 3,
    "flowcoro_rpc": 3,
    "flowcoro_db": 3,
    "flowcoro_redis": 3,
    "flowcoro_amqp": 3,
    "flowcoro_inspect": 4,
    "flowcoro_cli": 4,
    "flowcoro_http2": 4,
    "flowcoro_discovery": 4,
    "flowcoro_grpc": 5,
    "flowcoro_gateway": 6,
}

# Every place that yields to the kernel. A handful, never more than 8: each is one more for a reader to know.
TRAPS = {"checkpoint", "park", "sleep", "sleep_until", "ParkingLot.park", "Task.__await__", "Pollable.wait_readable",
         "Pollable.wait_writable"}

MAX_FUNCTION_LINES = 80       # about 50 is the aim, docstring included; beyond 80 a concept is missing
MAX_CLASS_LINES = 300         # about 250 is the aim
MAX_HEADER_EXAMPLE_LINES = 15
EXAMPLE_LINES = range(20, 61)
TABLE_TOLERANCE = 0.05        # how far README's line counts may lag behind: not every edit has to touch them
NOT_RUN = "# not run:"        # begins a block of a document that only shows something
SUBPROCESS_TIMEOUT = 60       # seconds; everything here needs one or two, this is for a much slower machine

HEADER_SECTIONS = {
    "contents": r"contents\b",
    "theory of operation": r"(how it works|theory of operation)\b",
    "sources": r"sources\b",
    "what it does not do": r"what it does not do\b",
}


# ---- the files, parsed -------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Module:
    """One flat file: its name, its text and its syntax tree."""

    name: str
    source: str
    tree: ast.Module

    @classmethod
    def from_source(cls, name, source):
        return cls(name, source, ast.parse(source))

    @property
    def docstring(self):
        return ast.get_docstring(self.tree) or ""

    @functools.cached_property
    def nodes(self):
        """All of the tree, but for the hand-over."""
        exempt = set(hand_over(self))
        return [node for node in ast.walk(self.tree) if node not in exempt]

    def __str__(self):
        return self.name


MODULES = {
    path.stem: Module.from_source(path.stem, path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.glob("flowcoro*.py"))
}

every_module = pytest.mark.parametrize("module", MODULES.values(), ids=str)


def files_under(*patterns):
    """Paths below the root that match, sorted; the pytest id of each is its name as seen from there."""
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})


def relative(path):
    return path.relative_to(ROOT).as_posix()


EXAMPLES = files_under("examples/*.py")
DOCUMENTS = files_under("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/*.md")
TESTS = files_under("tests/*.py")
TEXTS = sorted({
    *DOCUMENTS, *EXAMPLES, *TESTS, *files_under("benchmarks/*.py", "benchmarks/*.txt"),
    *files_under("*.py", "*.cfg", "*.toml", "LICENSE", ".gitignore", ".ci/*"),
})


def run_python(*arguments, cwd, sees_root=True):
    """Run this interpreter with warnings as errors and without a stdin; returns the CompletedProcess."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONIOENCODING"] = "utf-8"
    if sees_root:
        environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
        timeout=SUBPROCESS_TIMEOUT,
    )


def assert_ran(done):
    """It ended well, and nothing went wrong where no exit status tells of it (a destructor, a lost task)."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr


def assert_none(violations):
    assert not violations, "\n".join(["", *violations])


# ---- questions to a syntax tree ----------------------------------------------------------------------------

def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def hand_over(module):
    """The nodes of the kernel's last statement, which gives `python -m flowcoro` to flowcoro_cli; else []."""
    last = module.tree.body[-1] if module.tree.body else None
    return list(ast.walk(last)) if module.name == "flowcoro" and is_main_guard(last) else []


def nodes(module, *kinds):
    """All nodes of these kinds in the file, but for the hand-over."""
    return [node for node in module.nodes if isinstance(node, kinds)]


def functions(module):
    return nodes(module, ast.FunctionDef, ast.AsyncFunctionDef)


def own_nodes(function):
    """The nodes that run when the function does: not those of functions defined inside it."""
    found, remaining = [], list(function.body)
    while remaining:
        node = remaining.pop()
        found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            remaining.extend(ast.iter_child_nodes(node))
    return found


def is_ours(name):
    return name.split(".")[0].split("_")[0] == "flowcoro"


def siblings(module):
    """{the name it has here: module name} of the FlowCoro modules that this one imports."""
    return {
        alias.asname or alias.name: alias.name
        for node in nodes(module, ast.Import) for alias in node.names if is_ours(alias.name)
    }


def closure(name):
    """The files one has to copy to use this module: itself, and what it imports, and so on."""
    found, remaining = set(), {name}
    while remaining:
        name = remaining.pop()
        found.add(name)
        if name in MODULES:
            remaining |= set(siblings(MODULES[name]).values()) - found
    return {f"{name}.py" for name in found}


def assigned(module, name):
    """The literal assigned to a name at the module's top level; None when there is none."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return None


def public_names(name):
    return set(assigned(MODULES[name], "__all__") or ())


def private_names_bound_in(module):
    """Every `_name` that is defined, assigned as an attribute or listed as a slot somewhere in the module."""
    bound = {node.name for node in nodes(module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)}
    bound |= {node.attr for node in nodes(module, ast.Attribute) if isinstance(node.ctx, ast.Store)}
    bound |= {node.id for node in nodes(module, ast.Name) if isinstance(node.ctx, ast.Store)}
    bound |= {node.value for node in nodes(module, ast.Constant) if isinstance(node.value, str)}
    return {name for name in bound if is_private(name)}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


# ---- layers ------------------------------------------------------------------------------------------------

def import_violations(module):
    """The standard library from anywhere; a sibling of a lower layer on a line of its own at column 0.

    That form makes vendoring one substitution: `import flowcoro_x` becomes `from . import flowcoro_x`.
    """
    violations = []
    for node in nodes(module, ast.Import, ast.ImportFrom, ast.Call):
        if isinstance(node, ast.Import):
            for alias in node.names:
                violations += sibling_violations(module, node, alias) if is_ours(alias.name) else (
                    stdlib_violations(node, alias.name))
        elif isinstance(node, ast.ImportFrom):
            if node.level or is_ours(node.module):
                violations.append(f"line {node.lineno}: `{ast.unparse(node)}`; write `import module`")
            else:
                violations += stdlib_violations(node, node.module)
        elif module.name != "flowcoro_cli":     # which imports what a subcommand shows when that is asked for
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and "flowcoro" in ast.unparse(node):
                violations.append(f"line {node.lineno}: `{ast.unparse(node)}` hides an import")
    return violations


def sibling_violations(module, node, alias):
    place = f"line {node.lineno}: `{ast.unparse(node)}`"
    if len(node.names) > 1 or node.col_offset or node not in module.tree.body:
        return [f"{place} has to stand alone at column 0"]
    if LAYERS.get(alias.name, math.inf) >= LAYERS[module.name]:
        return [f"{place} is not of a layer below {LAYERS[module.name]}"]
    return []


def stdlib_violations(node, name, also=()):
    root = name.split(".")[0]
    if root in sys.stdlib_module_names or root in also:
        return []
    return [f"line {node.lineno}: {root} is not in the standard library"]


@every_module
def test_a_module_has_a_layer_and_imports_only_from_lower_ones(module):
    assert module.name in LAYERS, "add the new module to LAYERS"
    assert_none(import_violations(module))


def test_the_kernel_imports_no_sibling():
    assert siblings(MODULES["flowcoro"]) == {}, "hooks and statistics() are what metrics and tracing build on"
    probe = "import sys, flowcoro; print([name for name in sys.modules if name.startswith('flowcoro_')])"
    assert run_python("-c", probe, cwd=ROOT).stdout == "[]\n"


def test_the_kernel_run_as_a_program_hands_over_to_the_command_line_alone(tmp_path):
    last_statement = ast.unparse(MODULES["flowcoro"].tree.body[-1])
    assert set(re.findall(r"flowcoro_\w+", last_statement)) == {"flowcoro_cli"}
    version = assigned(MODULES["flowcoro"], "__version__")
    assert run_python("-m", "flowcoro", "--version", cwd=tmp_path).stdout == f"flowcoro {version}\n"


@pytest.mark.parametrize("path", EXAMPLES + TESTS, ids=relative)
def test_examples_and_tests_need_nothing_but_the_standard_library_flowcoro_and_pytest(path):
    allowed = {*MODULES, "pytest", *(test.stem for test in TESTS)} if path in TESTS else MODULES
    violations = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                violations += stdlib_violations(node, alias.name, also=allowed)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            violations += stdlib_violations(node, node.module, also=allowed)
    assert_none(violations)


# ---- the border of the kernel ------------------------------------------------------------------------------

def private_use_violations(module):
    """Of a sibling only what its __all__ lists; of an object of the kernel no `_attribute`."""
    violations = []
    imported = {here: name for here, name in siblings(module).items() if name in MODULES}
    kernel_private = private_names_bound_in(MODULES["flowcoro"]) - private_names_bound_in(module)
    for node in nodes(module, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else None
        if owner in imported and not node.attr.startswith("__"):
            if node.attr not in public_names(imported[owner]):
                violations.append(f"line {node.lineno}: {owner}.{node.attr} is not in its __all__")
        elif node.attr in kernel_private:
            violations.append(f"line {node.lineno}: {ast.unparse(node)} is private to the kernel")
    return violations


def traps(module):
    """Names of the functions that yield to the kernel: generators made awaitable, and `__await__` methods."""
    made_awaitable = {
        node.args[0].id for node in nodes(module, ast.Call)
        if is_coroutine_decorator(node.func) and node.args and isinstance(node.args[0], ast.Name)
    }
    owners = {function: f"{owner.name}." for owner in nodes(module, ast.ClassDef) for function in owner.body}
    return [
        owners.get(function, "") + function.name for function in functions(module)
        if any(isinstance(node, ast.Yield) for node in own_nodes(function))
        and (function.name == "__await__" or function.name in made_awaitable
             or any(map(is_coroutine_decorator, function.decorator_list)))
    ]


def is_coroutine_decorator(node):
    return ast.unparse(node) in ("coroutine", "types.coroutine", "flowcoro.coroutine")


def trap_violations(module):
    return [f"{name} yields to the kernel; park instead" for name in traps(module)]


above_the_kernel = pytest.mark.parametrize(
    "module", [module for name, module in MODULES.items() if name != "flowcoro"], ids=str)


@above_the_kernel
def test_of_other_modules_only_public_names_are_used(module):
    assert_none(private_use_violations(module))


@above_the_kernel
def test_only_the_kernel_yields_to_the_kernel(module):
    assert_none(trap_violations(module))


def test_the_kernel_has_a_handful_of_traps():
    assert sorted(traps(MODULES["flowcoro"])) == sorted(TRAPS)
    assert len(TRAPS) <= 8


# ---- headers -----------------------------------------------------------------------------------------------

def copy_list(docstring):
    """The files named after "To vendor, copy:", separated by commas; None when there is no such list."""
    listed = re.search(r"To vendor, copy:((?:\s+flowcoro\w*\.py,?)+)", docstring)
    return listed and set(re.findall(r"flowcoro\w*\.py", listed[1]))


def header_example(docstring):
    """The indented block after the line "Example:", dedented; "" when there is none."""
    block = re.search(r"^example\b[^\n]*:[ ]*\n((?:[ ]+[^\n]*\n|[ ]*\n)+)", docstring + "\n", re.M | re.I)
    return textwrap.dedent(block[1]).strip("\n") if block else ""


def header_violations(module):
    """What a reader who holds this file alone has to find in it."""
    lines = module.docstring.splitlines() or [""]
    version = assigned(module, "__version__")
    example = header_example(module.docstring)
    rules = {
        f"the first line names {module.name} and {version}": (
            {module.name, version} <= set(re.split(r"[\s:,]+", lines[0]))),
        f"the files to copy are {sorted(closure(module.name))}": (
            copy_list(module.docstring) == closure(module.name)),
        "it shows an example": bool(example),
        f"the example has at most {MAX_HEADER_EXAMPLE_LINES} lines": (
            len(example.splitlines()) <= MAX_HEADER_EXAMPLE_LINES),
        "it has exactly one line SPDX-License-Identifier: MIT": (
            re.findall(r"SPDX-License-Identifier: *(.*)", module.source) == ["MIT"]),
    }
    for section, pattern in HEADER_SECTIONS.items():
        rules[f"it has a section {section!r}"] = any(re.match(pattern, line, re.IGNORECASE) for line in lines)
    return [f"not so: {rule}" for rule, kept in rules.items() if not kept]


@every_module
def test_a_header_makes_its_file_usable_alone(module):
    assert_none(header_violations(module))


@every_module
def test_the_example_in_a_header_runs(module, tmp_path):
    assert_ran(run_python("-c", header_example(module.docstring), cwd=tmp_path))


@every_module
def test_all_is_what_a_module_has_and_each_name_is_documented(module):
    listed = assigned(module, "__all__")
    assert listed, "there is no __all__"
    assert len(listed) == len(set(listed)), "a name is listed twice"
    loaded = importlib.import_module(module.name)
    defined = {
        node.name for node in module.tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name[0] != "_"
    }
    violations = [f"{name} is listed, but there is none" for name in listed if not hasattr(loaded, name)]
    violations += [f"{name} is public, but not listed" for name in sorted(defined - set(listed))]
    violations += [f"{name} has no docstring" for name in undocumented(loaded, listed)]
    assert_none(violations)


def undocumented(loaded, names):
    """Public functions and classes without a docstring, public methods that neither have nor inherit one."""
    for name in names:
        value = getattr(loaded, name, None)
        if inspect.isclass(value):
            if not value.__dict__.get("__doc__"):
                yield name
            for attribute, member in vars(value).items():
                if not attribute.startswith("_") and is_documentable(member):
                    if not inspect.getdoc(getattr(value, attribute)):
                        yield f"{name}.{attribute}"
        elif inspect.isroutine(value) and not value.__doc__:
            yield name


def is_documentable(member):
    return inspect.isroutine(member) or isinstance(member, (property, functools.cached_property))


# ---- vendoring ---------------------------------------------------------------------------------------------

def assert_package_imports(parent):
    """Every module of the package `vendored` in this directory imports, and none drags in a top-level one."""
    probe = "import importlib, sys\n"
    probe += "".join(f"importlib.import_module('vendored.{name}')\n" for name in MODULES)
    probe += "assert not [name for name in sys.modules if name.startswith('flowcoro')], 'two copies'"
    assert_ran(run_python("-c", probe, cwd=parent, sees_root=False))


def test_one_substitution_per_file_turns_the_tree_into_a_package(tmp_path):
    package = tmp_path / "vendored"
    package.mkdir()
    (package / "__init__.py").touch()
    for module in MODULES.values():
        text = re.sub(r"^import flowcoro", "from . import flowcoro", module.source, flags=re.MULTILINE)
        (package / f"{module.name}.py").write_text(text, encoding="utf-8")
    assert_package_imports(tmp_path)


@pytest.mark.skipif("flowcoro_cli" not in MODULES, reason="`vendor` is a command of flowcoro_cli.py")
def test_the_vendor_command_makes_a_package_that_imports(tmp_path):
    package = tmp_path / "vendored"
    assert_ran(run_python("-m", "flowcoro", "vendor", package, *MODULES, "--package", cwd=tmp_path))
    assert_package_imports(tmp_path)
    assert_ran(run_python("-m", "vendored.flowcoro", "--version", cwd=tmp_path, sees_root=False))


# ---- packaging ---------------------------------------------------------------------------------------------

@functools.cache
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_the_package_consists_of_the_flat_files():
    assert sorted(setup_cfg()["options"]["py_modules"].split()) == sorted(MODULES)


def test_there_is_one_version():
    assert setup_cfg()["metadata"]["version"] == "attr: flowcoro.__version__"
    versions = {module.name: assigned(module, "__version__") for module in MODULES.values()}
    assert set(versions.values()) == {versions["flowcoro"]}, versions
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == versions["flowcoro"]


def test_nothing_is_required_and_only_pytest_to_test():
    assert "install_requires" not in setup_cfg()["options"]
    assert dict(setup_cfg()["options.extras_require"]) == {"test": "\npytest"}
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")).keys() == {"build-system"}


def test_the_readme_has_one_line_that_runs_the_tests_in_an_environment_of_its_own():
    text = "\n".join(block.text for block in fences(ROOT / "README.md"))
    lines = [line for line in text.splitlines() if "-m pytest" in line]
    assert len(lines) == 1, lines
    assert lines[0].removeprefix("$ ").startswith("python3 -m venv .venv && ")


# ---- tests, examples ---------------------------------------------------------------------------------------

def test_the_files_a_newcomer_looks_for_exist():
    wanted = ["flowcoro.py", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE",
              ".ci/run", "docs/design.md", "docs/glossary.md"]
    assert [name for name in wanted if not (ROOT / name).exists()] == []
    assert len(EXAMPLES) >= 8


def test_tests_map_to_modules_one_to_one():
    subjects = {name.removeprefix("flowcoro_") for name in MODULES} | {"project"}
    topics = [path.stem.removeprefix("test_") for path in TESTS if path.stem.startswith("test_")]
    subjects_of = {
        topic: {subject for subject in subjects if f"{topic}_".startswith(f"{subject}_")} for topic in topics
    }
    assert [topic for topic, found in subjects_of.items() if not found] == [], "tests of no module"
    assert subjects - set().union(*subjects_of.values()) == set(), "modules without tests"


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory):
    """{example, or block of a document: the Future of its CompletedProcess}; each runs in a folder of its own.

    Those that tests have been selected for all run before the first one is looked at, two at a time: most of them sleep.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = {}
        for item in request.session.items:
            if item.path == pathlib.Path(__file__) and "ran" in item.fixturenames:
                [example] = item.callspec.params.values()
                folder = tmp_path_factory.mktemp("program")
                program = example
                if isinstance(example, Fence):
                    if example.text.lstrip().startswith(NOT_RUN):
                        continue
                    program = folder / "block.py"           # a file, so that a traceback can show its lines
                    program.write_text(example.text, encoding="utf-8")
                futures[example] = pool.submit(run_python, program, cwd=folder)
    return futures


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_an_example_is_short_says_what_it_shows_and_runs(path, ran):
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    may_fail = path.stem.endswith("_broken") and "Exits with an error" in docstring
    assert docstring, "an example begins with a docstring"
    assert len(text.splitlines()) in EXAMPLE_LINES
    done = ran[path].result()
    if may_fail:
        assert done.returncode != 0, "its docstring promises an error"
    else:
        assert_ran(done)
        assert not done.stderr or "stderr" in docstring, done.stderr


# ---- documents ---------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced block of a document: where it is, the word after the backticks, and its text."""

    path: pathlib.Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{relative(self.path)}:{self.line}"


def fences(path):
    """The fenced blocks of a Markdown file, dedented."""
    text = path.read_text(encoding="utf-8")
    pattern = r"^([ ]*)(```+)[ ]*(\w*)[^\n]*\n(.*?)^[ ]*\2[ ]*$"
    return [
        Fence(path, text.count("\n", 0, found.start()) + 1, found[3], textwrap.dedent(found[4]))
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def prose(path):
    """The text of a document without its fenced blocks and its `code`."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^[ ]*```.*?^[ ]*```[ ]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "`code`", text)


GUIDE = ROOT / "docs" / "guide.md"
FENCES = [block for path in DOCUMENTS for block in fences(path)]
PYTHON_FENCES = [block for block in FENCES if block.language == "python"]
SHELL_FENCES = [block for block in FENCES if block.language in ("console", "sh", "bash", "shell")]

# What documents may call besides Python; whether it is installed is the reader's affair.
SHELL_WORDS = {
    "bash", "cat", "cd", "cp", "curl", "git", "grep", "head", "kill", "ls", "mkdir", "pip", "printf", "sed", "strace",
    "tail", "taskset", "time", "timeout",
}


def commands(block):
    """The commands of a console block (lines after `$ `) or a shell block (every line), as lists of words."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if word in ("&", "&&", "||", "|", ";"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"\w+=", word):      # NAME=value in front belongs to the environment
                words.append(word)


@functools.cache
def subcommand_exists(name):
    return run_python("-m", "flowcoro", name, "--help", cwd=ROOT).returncode == 0


def command_violations(block):
    """A command is known; `-m flowcoro` has the subcommand; a script is in the tree or in the document."""
    document = block.path.read_text(encoding="utf-8")
    violations = []
    for words in commands(block):
        program, arguments = words[0].split("/")[-1], words[1:]
        scripts = [word for word in words if word.endswith(".py") and not word.startswith("-")]
        if re.fullmatch(r"python3?(\.\d+t?)?", program):
            if "-m" in arguments:
                scripts = []
                if arguments[arguments.index("-m") + 1:][:1] == ["flowcoro"]:
                    rest = arguments[arguments.index("flowcoro") + 1:]
                    if rest and not rest[0].startswith("-") and not subcommand_exists(rest[0]):
                        violations.append(f"{block}: python -m flowcoro has no {rest[0]!r}")
        elif program == "flowcoro" or program not in SHELL_WORDS:
            violations.append(f"{block}: what is {words[0]!r}?")
        for script in scripts:
            shown = "/" not in script and len(re.findall(rf"(?<![\w/]){re.escape(script)}", document)) > 1
            if not (ROOT / script).exists() and not shown:
                violations.append(f"{block}: there is no {script}")
    return violations


@pytest.mark.parametrize("block", PYTHON_FENCES, ids=str)
def test_python_in_a_document_runs(block, ran):
    if block.text.lstrip().startswith(NOT_RUN):
        assert block.text.lstrip().split("\n", 1)[0].removeprefix(NOT_RUN).strip(), "a block that is not run says why"
        return
    done = ran[block].result()
    assert_ran(done)
    if block.path == GUIDE:
        assert done.stdout == shown_output(block)


def shown_output(block):
    """What a document shows right below a program as its output."""
    text = block.path.read_text(encoding="utf-8").split("\n", block.line - 1)[-1]
    found = re.match(r"```python\n.*?^```\n(?:\n```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL)
    return found[1] or ""


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"flowcoro_cli"}))
def test_the_guide_speaks_of_every_public_name(name):
    text = GUIDE.read_text(encoding="utf-8")
    assert [thing for thing in sorted(public_names(name)) if not re.search(rf"\b{thing}\b", text)] == []


@pytest.mark.parametrize("block", SHELL_FENCES, ids=str)
def test_commands_in_a_document_exist(block):
    assert_none(command_violations(block))


def anchors(path):
    """The fragments that a link into this document can name: its headings, spelt as GitHub does."""
    headings = re.findall(r"^#+[ ]+(.*?)[ #]*$", prose(path).replace("`code`", ""), re.MULTILINE)
    full = re.findall(r"^#+[ ]+(.*?)[ #]*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings + full}


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_in_a_document_lead_somewhere(path):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", link):          # another site; the tests do not ask the network
            continue
        file, _, fragment = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors(target)):
            dead.append(link)
    assert dead == []


def module_table(text):
    """{file: (lines, files to copy)} from rows like `| flowcoro_x.py | 1,234 | … | flowcoro.py |`."""
    table = {}
    for row in re.findall(r"^\|(.+)\|[ ]*$", text, re.MULTILINE):
        first, *cells = row.split("|")
        name = re.search(r"flowcoro\w*\.py", first)
        counts = [int(cell.replace(",", "")) for cell in cells if re.fullmatch(r"[ ]*[\d,]+[ ]*", cell)]
        if name and counts:
            table[name[0]] = counts[0], set(re.findall(r"flowcoro\w*\.py", " ".join(cells)))
    return table


def test_the_readme_lists_every_module_with_its_length_and_the_files_to_copy():
    table = module_table((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(table) == [f"{name}.py" for name in sorted(MODULES)]
    violations = []
    for name, module in MODULES.items():
        lines, to_copy = table[f"{name}.py"]
        length = module.source.count("\n")
        if abs(lines - length) > TABLE_TOLERANCE * length:
            violations.append(f"{name}.py has {length} lines, the table says {lines}")
        if to_copy | {f"{name}.py"} != closure(name):
            violations.append(f"{name}.py needs {sorted(closure(name))}, the table says {sorted(to_copy)}")
    assert_none(violations)


# A file speaks of the project alone: not of the machine it was written on, nor of how and when that was done.
# The classes in the patterns keep this file from matching itself.
FOREIGN_TEXT = re.compile(
    r"[/]work/|[/]tmp/(bash_jobs|spec)|\b(?i:this|next|previous|last|another)[ ]session\b|TO[D]O|FIX[M]E")


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_a_file_speaks_of_the_project_alone(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert_none([f"{relative(path)}:{number}: {line.strip()}" for number, line in enumerate(lines, 1)
                 if FOREIGN_TEXT.search(line)])


# ---- size --------------------------------------------------------------------------------------------------

def size_violations(module):
    """A function or class beyond its limit holds a concept that deserves a name."""
    violations = []
    for node in nodes(module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
        limit = MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES
        length = node.end_lineno - node.lineno + 1
        if length > limit:
            violations.append(f"line {node.lineno}: {node.name} has {length} lines, the limit is {limit}")
    return violations


@every_module
def test_no_function_and_no_class_outgrows_its_idea(module):
    assert_none(size_violations(module))


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *(path for folder in ("tests", "examples", "benchmarks")
                                                               for path in ROOT.glob(f"{folder}/**/*.py"))]),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_fit_and_no_definition_hides_another_of_the_same_name(path):
    text = path.read_text(encoding="utf-8")
    assert not [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 130]
    definitions, names = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), []
    for node in ast.parse(text).body:
        if isinstance(node, definitions):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
                      and isinstance(name.ctx, ast.Store)]
    assert not [name for name in set(names) if names.count(name) > 1]


# ---- the rules themselves ----------------------------------------------------------------------------------

@pytest.mark.parametrize("rule, source", [
    (import_violations, "import requests"),
    (import_violations, "from requests.adapters import HTTPAdapter"),
    (import_violations, "from flowcoro import run"),
    (import_violations, "from . import flowcoro"),
    (import_violations, "import flowcoro, os"),
    (import_violations, "def late():\n    import flowcoro"),
    (import_violations, "import flowcoro_os"),
    (import_violations, "import flowcoro_http"),
    (import_violations, "import importlib\nimportlib.import_module('flowcoro_os')"),
    (private_use_violations, "import flowcoro as fc\nfc._kernel"),
    (private_use_violations, "import flowcoro\nflowcoro.no_such_name"),
    (trap_violations, "import types\n@types.coroutine\ndef wait():\n    yield"),
    (trap_violations, "import flowcoro\n@flowcoro.coroutine\ndef wait():\n    return (yield 1)"),
    (trap_violations, "class Future:\n    def __await__(self):\n        yield self"),
    (trap_violations, "from types import coroutine\ndef _wait():\n    yield\nwait = coroutine(_wait)"),
    (size_violations, "def long():\n" + "    pass\n" * MAX_FUNCTION_LINES),
    (size_violations, "class Long:\n" + "    pass\n" * MAX_CLASS_LINES),
])
def test_a_snippet_that_breaks_the_rule_is_found(rule, source):
    assert len(rule(Module.from_source("flowcoro_net", source))) == 1


@pytest.mark.parametrize("source", [
    "import os, sys\nfrom collections import deque\nimport flowcoro\nimport flowcoro_observe as observe",
    "import flowcoro\nflowcoro.run\nflowcoro.__version__\ndef close(self):\n    self._state = 0",
    "async def lines():\n    yield b''",
    "import flowcoro\n@flowcoro.coroutine\ndef wait():\n    yield from flowcoro.sleep(1)",
    "def long():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1),
])
def test_a_snippet_that_keeps_the_rules_passes(source):
    module = Module.from_source("flowcoro_net", source)
    for rule in (import_violations, private_use_violations, trap_violations, size_violations):
        assert_none(rule(module))


def test_a_private_attribute_of_the_kernel_is_found_in_other_modules():
    private = min(private_names_bound_in(MODULES["flowcoro"]))
    snippet = Module.from_source("flowcoro_net", f"def wake(task):\n    task.{private}()")
    assert len(private_use_violations(snippet)) == 1


def test_the_header_is_read_as_a_person_would():
    docstring = textwrap.dedent("""\
        flowcoro_net 0.1.0: sockets.

        To vendor, copy: flowcoro.py, flowcoro_net.py
        For `python -m flowcoro` copy flowcoro_cli.py too.

        Example:

            import flowcoro_net

            print(1)

        Contents
            sockets
        """)
    assert copy_list(docstring) == {"flowcoro.py", "flowcoro_net.py"}
    assert header_example(docstring) == "import flowcoro_net\n\nprint(1)"


# ---- how the tests are run ---------------------------------------------------------------------------------

SUITE = {"test_a.py": """
def test_one():
    note("a1")
    while os.environ["FLOWCORO_PROCESSES"] != "1" and not re.search(" [cd]", pathlib.Path("notes").read_text()):
        time.sleep(0.01)

def test_two():
    note("a2")
    assert 0, "as it should"
""", "test_b.py": """
import pytest

@pytest.mark.parametrize("number", range(30))
def test_many(number):
    note(f"b{number}")
    time.sleep(0.01)
""", "test_c.py": """
import pytest

def test_skipped():
    pytest.skip("as it should")

def test_last():
    note("c")
"""}

NOTE = """
import os, pathlib, re, time

def note(text):
    with open("notes", "a") as file:
        file.write(f"{os.getpid()} {text}\\n")
"""


def suite(folder, files, **environment):
    """Run a suite with our conftest.py: the exit status, the output, and what its tests noted, as {text: process}."""
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    for name, text in files.items():
        (folder / name).write_text(NOTE + text)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"], cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "FLOWCORO_MANY": "2", **environment}, timeout=60,
        capture_output=True, text=True)
    notes = [line.split() for line in (folder / "notes").read_text().splitlines()]
    assert len({text for _, text in notes}) == len(notes), "a test has run twice"
    return done.returncode, done.stdout + done.stderr, {text: process for process, text in notes}


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_run_each_test_once_and_tell_as_one(tmp_path, processes):
    if processes == 2 and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one processor")
    status, output, notes = suite(tmp_path, SUITE, FLOWCORO_PROCESSES=str(processes))
    assert status == 1 and "1 failed, 32 passed, 1 skipped" in output and "as it should" in output, output
    assert len(notes) == 33 and len(set(notes.values())) == processes


def test_a_helping_process_that_dies_is_a_failure(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one processor")
    status, output, notes = suite(tmp_path, {**SUITE, "test_d.py": "def test_end():\n    note('d')\n    os._exit(3)\n"},
                                  FLOWCORO_PROCESSES="2")
    assert status == 1 and "the helping process 1 has not come to its end" in output and "d" in notes, output
