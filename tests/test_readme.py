"""README.md stays true: its commands parse, its example runs, its files exist."""

import argparse
import ast
import contextlib
import inspect
import io
import re
import shlex

import pytest

from docs.study import study
from tests.conftest import ROOT, SCRIPTS
from tools import (
    benchmark,
    compare,
    export,
    prepare_data,
    prepare_imagenet,
    report,
    visualize,
)
from utils import pictures
from utils.event_args import event_parser
from utils.image_args import image_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = {
    "timesteps": 1, "RCR": 1, "RTR": 1, "batch_size": 1, "epochs": 1, "lr": 1.0, "weight_decay": 1.0,
    "momentum_decay": 1.0, "seed": 0, "split_seed": 0, "flip": True, "net": "", "image_size": 1, "label_smoothing": 0.0,
}  # fmt: skip
PARSERS = {path.name: event_parser("", RECIPE) for path in SCRIPTS.values()} | {
    "train_amp.py": image_parser("", RECIPE),
    "tools/prepare_data.py": prepare_data.make_parser(),
    "tools/prepare_imagenet.py": prepare_imagenet.make_parser(),
    "tools/benchmark.py": benchmark.make_parser(),
    "tools/report.py": report.make_parser(),
    "tools/visualize.py": visualize.make_parser(),
    "tools/compare.py": compare.make_parser(),
    "tools/export.py": export.make_parser(),
    "docs/study/study.py": study.make_parser(),
}


def code(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_stand_alone_on_one_line():
    lines = README.splitlines()
    assert lines.count("pip install -r requirements.txt && python vgg8_dvs128_SMA.py --demo") == 1
    assert lines.count("pip install -r requirements-dev.txt && python -m pytest") == 1


def test_every_command_of_a_script_parses():
    commands = [line for block in code("bash") for line in block.splitlines()] + re.findall(r"`(python [^`]*)`", README)
    found = []
    for command in commands:
        words = shlex.split(command.partition("&& ")[2] or command)
        script = next((word for word in words if word in PARSERS), None)
        if script is not None:
            PARSERS[script].parse_args(words[words.index(script) + 1 :])
            found.append(script)
    assert set(found) == set(PARSERS) and len(found) >= 14


def test_every_flag_that_is_named_exists():
    parsers = [*PARSERS.values()]
    for parser in PARSERS.values():
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    launchers = {
        "--nproc_per_node",
        "--max-restarts",
        "--nnodes",
        "--node_rank",
        "--master_addr",
        "--master_port",
    }
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", README)) <= known | launchers | {"--help"}


@pytest.mark.parametrize("number", range(3))
def test_an_example_runs_and_prints_what_its_comment_says(number):
    examples = [example for example in code("python") if "print(y.shape)" in example]
    assert len(examples) == 3
    expected = re.search(r"print\(y.shape\)  # (.*)", examples[number]).group(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(examples[number], {"__name__": "example"})
    assert printed.getvalue().strip() == expected


def test_the_calls_that_make_pictures_fit_the_functions():
    (example,) = (block for block in code("python") if "utils.pictures" in block)
    calls = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    assert {call.func.id for call in calls} == {"save_as_pic", "save_every_frame_of_an_entire_DVS_dataset"}
    for call in calls:
        signature = inspect.signature(getattr(pictures, call.func.id))
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


def test_files_and_links_inside_the_repository_exist():
    named = set(re.findall(r"\]\((?!http)([^)]+)\)", README)) | {"LICENSE", "CITATION.cff", "requirements-dev.txt"}
    named |= set(re.findall(r"`((?:models|tools|tests)/[\w./]+)`", README))
    assert len(named) >= 6
    assert all((ROOT / name).exists() for name in named), [name for name in named if not (ROOT / name).exists()]
