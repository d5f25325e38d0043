"""README.md and docs/ stay true: commands parse, examples run, links lead somewhere, messages exist."""

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
import tomllib

import pytest

from docs.study import study
from tests.conftest import ROOT, SCRIPTS
from tools import (
    benchmark,
    check_gpu,
    compare,
    export,
    ledger,
    plan,
    prepare_data,
    prepare_imagenet,
    report,
    visualize,
)
from utils import pictures

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
}
README = PAGES["README.md"]
PARSERS = {path.name: importlib.import_module(path.stem).SETTINGS.parser("") for path in SCRIPTS.values()} | {
    "tools/prepare_data.py": prepare_data.make_parser(),
    "tools/prepare_imagenet.py": prepare_imagenet.make_parser(),
    "tools/benchmark.py": benchmark.make_parser(),
    "tools/check_gpu.py": check_gpu.make_parser(),
    "tools/plan.py": plan.make_parser(),
    "tools/report.py": report.make_parser(),
    "tools/visualize.py": visualize.make_parser(),
    "tools/compare.py": compare.make_parser(),
    "tools/ledger.py": ledger.make_parser(),
    "tools/export.py": export.make_parser(),
    "docs/study/study.py": study.make_parser(),
}


def code(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_the_two_commands_stand_alone_on_one_line():
    lines = README.splitlines()
    assert lines.count("pip install -r requirements.txt && python vgg8_dvs128_SMA.py --demo") == 1
    assert lines.count("pip install -r requirements-dev.txt && python -m pytest") == 1
    assert lines.count("python train_amp.py --demo") == 1


def commands_of(page):
    """Those of bash blocks and those inside a line that run one of the scripts: (script, arguments)."""
    lines = [line for block in code(page, "bash") for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", page)
    for line in lines:
        words = shlex.split(line.partition("&& ")[2] or line)
        script = next((word for word in words if word in PARSERS), None)
        if script is not None and "..." not in words:
            yield script, words[words.index(script) + 1 :]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_a_script_parses(name):
    for script, arguments in commands_of(PAGES[name]):
        if script == "tools/plan.py":  # the rest is of the script that it plans
            own, arguments = PARSERS[script].parse_known_args(arguments)
            script = own.script.name
        PARSERS[script].parse_args(arguments)


def test_every_script_has_a_command():
    assert {script for page in PAGES.values() for script, _ in commands_of(page)} >= {
        name for name in PARSERS if not name.startswith(("tests/", "tools/benchmark"))
    }


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_every_flag_that_is_named_exists(name):
    parsers = [*PARSERS.values()]
    for parser in PARSERS.values():
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    launcher = {"--nproc_per_node", "--max-restarts", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    launcher |= {"--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"} | {"--logdir", "--project"}  # of the trackers
    page = re.sub(r"#SBATCH.*", "", PAGES[name])  # flags of Slurm
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page))
    assert named <= known | launcher | {"--help"}


EXAMPLES = [block for name in ("README.md", "docs/modules.md") for block in code(PAGES[name], "python")]


@pytest.mark.parametrize("example", [block for block in EXAMPLES if "print(y.shape)" in block])
def test_an_example_runs_and_prints_what_its_comment_says(example):
    expected = re.search(r"print\(y.shape\)  # (.*)", example).group(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {"__name__": "example"})
    assert printed.getvalue().strip() == expected


def test_the_calls_that_make_pictures_fit_the_functions():
    (example,) = (block for block in code(PAGES["docs/tools.md"], "python") if "utils.pictures" in block)
    calls = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    assert {call.func.id for call in calls} == {"save_as_pic", "save_every_frame_of_an_entire_DVS_dataset"}
    for call in calls:
        signature = inspect.signature(getattr(pictures, call.func.id))
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


def anchors(page):
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_inside_the_repository_exist(name):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    if name == "CHANGELOG.md":
        return
    for path in re.findall(r"`((?:models|utils|tools|tests|docs)/[\w./]+)`", PAGES[name]):
        assert (ROOT / path).exists(), path


def test_what_a_docstring_says_of_a_page_is_there():
    named = [
        (path.name, page, heading)
        for path in SCRIPTS.values()
        for heading, page in re.findall(r'see "([^"]+)" in ([\w./]+\.md)', path.read_text(encoding="utf-8"))
    ]
    assert len(named) >= len(SCRIPTS)
    for script, page, heading in named:
        assert re.search(rf"^#+ {heading}$", PAGES[page], flags=re.MULTILINE), (script, page, heading)


@functools.cache
def texts():
    """All constant pieces of text in the sources; those between the values of an f-string are pieces of their own."""
    trees = (
        ast.parse(path.read_text(encoding="utf-8"))
        for room in ("models", "utils", "tools")
        for path in ROOT.glob(f"{room}/**/*.py")
    )
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


FAILURES = (
    README.partition("## If something fails")[2].partition("\n## ")[0]
    + PAGES["docs/faq.md"].partition("## Questions")[0]
)
MESSAGES = re.findall(r"^\| `([^`]+)` \|", FAILURES, flags=re.MULTILINE)


@pytest.mark.parametrize("message", [one for one in MESSAGES if "torchvision::nms" not in one])
def test_a_message_of_the_troubleshooting_is_one_of_the_program(message):
    for piece in message.split("..."):
        assert any(piece.strip(" :;") in text for text in texts()), piece


def test_the_newest_section_of_the_changelog_is_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.search(r"^## (\S+)", PAGES["CHANGELOG.md"], flags=re.MULTILINE).group(1) == project["version"]
