"""Importing any module does nothing else: no seed, no device, no files, no GPU or CuPy needed."""

import subprocess
import sys

from tests.conftest import ROOT

CHECK = """
import builtins, os, random, sys
import numpy, torch
import torchvision  # sets an environment variable of its own

blocked = builtins.__import__
def no_cupy(name, *args, **keywords):
    if name.split(".")[0] == "cupy":
        raise ImportError("blocked by the test")
    return blocked(name, *args, **keywords)
builtins.__import__ = no_cupy

before = torch.get_rng_state().clone(), random.getstate(), str(numpy.random.get_state()), dict(os.environ)
sys.argv = ["program", "--not-an-argument"]
for module in {modules}:
    __import__(module)
after = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state()), dict(os.environ)
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
print("nothing happened")
"""


def test_importing_any_module_has_no_side_effect(tmp_path):
    paths = [
        *ROOT.glob("*.py"),
        *(path for room in ("models", "utils", "tools", "docs") for path in ROOT.glob(f"{room}/**/*.py")),
    ]
    modules = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    modules = [name.removesuffix(".__init__") for name in modules]
    assert {"models.sma", "utils.engine", "vgg8_dvs128_SMA", "docs.figures.draw_sma"} <= set(modules)
    result = subprocess.run(
        [sys.executable, "-c", CHECK.replace("{modules}", repr(modules))],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.strip() == "nothing happened", result.stderr
    assert not list(tmp_path.iterdir())


def test_models_import_neither_utils_nor_tools_and_nothing_imports_a_script():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in (path for room in ("models", "utils", "tools") for path in ROOT.glob(f"{room}/**/*.py")):
        imported = {
            line.split()[1].split(".")[0]
            for line in path.read_text().splitlines()
            if line.strip().startswith(("import ", "from "))
        }
        assert not imported & scripts, path
        if path.relative_to(ROOT).parts[0] == "models":
            assert not imported & {"utils", "tools"}, path
        if path.name == "sma.py":
            # "" is "from .fast import fast_forward", which may be missing where the file is copied.
            assert imported <= {"__future__", "collections", "typing", "", "torch", "einops", "spikingjelly"}
