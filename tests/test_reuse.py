"""SMA in other people's networks: the one file alone, torch.hub, exported weights and programs."""

import hashlib
import json
import re
import shutil
import sys

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hubconf
import models
from models import VGG8
from models.neurons import reset_net
from tests.conftest import ROOT, SMALL
from tools import export
from utils.checkpoint import load_weights, read_weights
from utils.errors import UserError, exit_with_sentence
from utils.exported import read_exported, write_exported
from utils.networks import describe_network

PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/modules.md")]

ALONE = """
import pathlib, sys
import torch
import sma

assert pathlib.Path(sma.__file__).parent == pathlib.Path.cwd()
sys.path = [path for path in sys.path if path != {repository!r}]
for number in range(3):
    torch.manual_seed(0)
    space = {"__name__": "example"}
    exec(pathlib.Path(f"example{number}.py").read_text(), space)
    net, x = space["net"], space["x"]
    released = torch.load(f"weights{number}.pth", weights_only=True)["net"]
    part = {k.removeprefix("module.block1.1."): v for k, v in released.items() if k.startswith("module.block1.1.")}
    (module,) = [module for module in net.modules() if isinstance(module, sma.SMA)]
    module.load_state_dict(part, strict=True)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in part.items())
    labels = torch.tensor([0, 1])
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(net(x) if number == 2 else net(x).mean(0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number < 2:
            space["functional"].reset_net(net)
        losses.append(loss.item())
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, part[name])]
    assert len(moved) == len(part), sorted(set(part) - set(moved))
    assert losses[-1] < losses[0], losses
    print(number, "learns")
"""


def test_the_file_alone_works_in_the_three_networks_of_the_docs(tmp_path, launch):
    shutil.copy(ROOT / "models" / "sma.py", tmp_path)
    blocks = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)]
    examples = [block for block in blocks if "from models.sma import SMA" in block]
    assert len(examples) == 3
    for number, block in enumerate(examples):
        (tmp_path / f"example{number}.py").write_text(block.replace("from models.sma", "from sma"))
        torch.manual_seed(number)
        activation = "relu" if number == 2 else "lif"
        vgg = VGG8(T=4, num_classes=3, sma_blocks=[1], branch_activation=activation, C_reduction=4)
        torch.nn.init.ones_(vgg.block1[1].T_before_attention_conv.bias)  # its one unit, a ReLU, learns
        weights = {"module." + name: value for name, value in vgg.state_dict().items() if name.startswith("block1.")}
        torch.save({"net": weights, "epoch": 1}, tmp_path / f"weights{number}.pth")
    (tmp_path / "alone.py").write_text(ALONE.replace("{repository!r}", repr(str(ROOT))))
    command = f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_path('alone.py')"
    result = launch(["-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {command}"])
    lines = [line for line in result.stdout.splitlines() if line.endswith("learns")]
    assert lines == ["0 learns", "1 learns", "2 learns"], result.stderr


def small(**changes):
    torch.manual_seed(0)
    return VGG8(**{"T": 4, "num_classes": 11, "width": 0.125, **changes}).eval()


FACTS = {"data": {"title": "D"}, "split": {"fingerprint": "S"}}


@pytest.fixture
def checkpoint(tmp_path):
    """A run's folder as far as an export needs it: one epoch of one, 3 of 4 correct."""
    recipe = {"timesteps": 4, "frame_size": [32, 32], "epochs": 1}
    best = {"acc1": 75.0, "epoch": 1}
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"model": small().state_dict(), "epoch": 1, "best": best, "recipe": recipe}, run / "last.pt")
    evaluation = {"acc1": 75.0, "correct": 3, "count": 4, "loss": 0.5, "epoch": 1, "selection": "final", **FACTS}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run / "last.pt"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run tools/export.py in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        try:
            exit_with_sentence(export.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_weights_go_to_safetensors_and_back_bit_equal_and_metadata_survive(checkpoint, tmp_path, tool):
    exported, back = tmp_path / "zoo" / "a.safetensors", tmp_path / "b.pt"
    assert tool("weights", checkpoint, "--output", exported)[0] == 0
    expected = small().state_dict()
    stored = load_file(exported)
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in expected)
    digest = hashlib.sha256(exported.read_bytes()).hexdigest()
    assert (tmp_path / "zoo" / "a.safetensors.sha256").read_text() == f"{digest}  a.safetensors\n"

    assert tool("back", exported, "--output", back)[0] == 0
    for path in (exported, back):
        weights, known = read_weights(path)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert known["recipe"] == {"timesteps": 4, "frame_size": [32, 32], "epochs": 1} and known["epoch"] == 1
        accuracy = {"acc1": 75.0, "correct": 3, "count": 4, "loss": 0.5}
        assert known["accuracy"] == accuracy and known["facts"] == FACTS
        assert (known["epochs"], known["selection"]) == (1, "final and best")
        assert known["network"] == {"name": "VGG8", "T": 4, "num_classes": 11, "width": 0.125, "sma_blocks": [2, 3],
                                     "branch_activation": "lif", "branch_groups": 1}  # fmt: skip
        net = small(num_classes=11)
        torch.nn.init.zeros_(net.others[8].weight)
        load_weights(net, path)
        assert torch.equal(net.others[8].weight, expected["others.8.weight"])
    code, out, _ = tool("show", back)
    assert code == 0 and json.loads(out)["accuracy"] == accuracy


def test_best_epochs_are_told_apart_and_released_files_have_no_accuracy(checkpoint, tmp_path, tool):
    state = torch.load(checkpoint, weights_only=True)
    state["recipe"]["epochs"] = 5  # the epoch of the file is not the final one, and it was the best
    torch.save(state, checkpoint)
    assert tool("weights", checkpoint, "--output", tmp_path / "a.safetensors")[0] == 0
    content = read_exported(tmp_path / "a.safetensors")
    assert (content["accuracy"], content["epoch"], content["selection"]) == ({"acc1": 75.0}, 1, "best")

    released = tmp_path / "released.pth"
    torch.save({"module." + name: value for name, value in state["model"].items()}, released)
    code, out, _ = tool("weights", released, "--output", tmp_path / "b.safetensors")
    assert code == 0 and "no accuracy known" in out
    content = read_exported(tmp_path / "b.safetensors")
    assert "accuracy" not in content and "block1.0.0.weight" in content["model"]
    evaluation = checkpoint.with_name("evaluation.json")
    assert tool("weights", released, "--output", tmp_path / "c.safetensors", "--evaluation", evaluation)[0] == 0
    content = read_exported(tmp_path / "c.safetensors")
    assert (content["accuracy"]["correct"], content["epoch"], content["selection"]) == (3, None, "unknown")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["final", "best"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["acc1", "epoch", "data"]), inner),
    max_leaves=3,
)
METADATA = ["recipe", "epoch", "epochs", "steps", "seed", "selection", "accuracy", "facts", "best", "processes"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(metadata={"recipe": None, "epoch": None, "epochs": None, "selection": "best"})
@given(metadata=st.dictionaries(st.sampled_from(METADATA), ANY, max_size=5))
def test_any_metadata_are_shown_or_a_sentence(metadata, tmp_path, tool):
    for path in tmp_path.iterdir():
        path.unlink()
    write_exported(small(width=0.0625, sma_blocks=[]).state_dict(), metadata, tmp_path / "a.safetensors")
    for command in (["show"], ["weights", "--output", tmp_path / "b.safetensors"]):
        code, out, err = tool(command[0], tmp_path / "a.safetensors", *command[1:])
        assert (code == 0 and out) or (code == 2 and len(err.splitlines()) == 1)


def test_an_exported_file_evaluates_to_the_same_counts(tmp_path, gesture_data, script, tool):
    script("dvs128", "--data-dir", gesture_data, *SMALL, "--RCR", "4", "--epochs", "1", "--output-dir", tmp_path / "r")
    tool("weights", tmp_path / "r" / "last.pt", "--output", tmp_path / "a.safetensors")
    counts = {}
    for file in ("r/last.pt", "a.safetensors"):
        arguments = ["--data-dir", gesture_data, "--evaluate", "--weights", tmp_path / file, "--device", "cpu"]
        code, _, error = script("dvs128", *arguments, "--num-workers", "0", "--output-dir", tmp_path / f"{file}.out")
        assert code == 0, error
        result = json.loads((tmp_path / f"{file}.out" / "evaluation.json").read_text())
        counts[file] = result["acc1"], result["correct"], result["count"], result["loss"]
    assert counts["r/last.pt"] == counts["a.safetensors"] and counts["a.safetensors"][2] == 11


@pytest.mark.parametrize("damage", ["a flipped byte", "cut off", "another checksum", "no checksum in its file"])
def test_a_file_with_a_wrong_checksum_is_refused_by_name(damage, tmp_path, tool):
    path, beside = tmp_path / "zoo.safetensors", tmp_path / "zoo.safetensors.sha256"
    write_exported({"w": torch.arange(8.0)}, {}, path)
    content = bytearray(path.read_bytes())
    if damage == "a flipped byte":
        content[-1] ^= 1
    path.write_bytes(content[:-4] if damage == "cut off" else content)
    if damage == "another checksum":
        beside.write_text("0" * 64 + "  zoo.safetensors\n")
    if damage == "no checksum in its file":
        beside.write_text("")
    code, _, error = tool("back", path, "--output", tmp_path / "back.pt")
    assert code == 2 and str(path) in error and str(beside) in error and len(error.splitlines()) == 1
    assert not (tmp_path / "back.pt").exists()


def test_a_file_without_checksum_is_read_and_damage_still_found(tmp_path):
    path = tmp_path / "hub.safetensors"
    save_file({"w": torch.arange(8.0)}, path, {"note": "plain text of another program", "epoch": "3"})
    weights, known = read_weights(path)
    assert torch.equal(weights["w"], torch.arange(8.0))
    assert known == {"note": "plain text of another program", "epoch": 3}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"hub\.safetensors is damaged"):
        read_weights(path)
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / "absent.safetensors")


def test_exported_files_have_the_usual_mode(checkpoint, tmp_path, tool):
    (tmp_path / "usual").touch()
    assert tool("weights", checkpoint, "--output", tmp_path / "a.safetensors")[0] == 0
    for name in ("a.safetensors", "a.safetensors.sha256"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    ("command", "suffix"),
    [("weights", ".safetensors"), ("back", ".pt"), pytest.param("program", ".pt2", marks=pytest.mark.slow)],
)
def test_an_output_that_cannot_be_written_is_a_sentence(command, suffix, checkpoint, tmp_path, tool):
    (tmp_path / f".a{suffix}.partial").mkdir()  # stands in for a folder without the right to write, which root has
    code, _, error = tool(command, checkpoint, "--output", tmp_path / f"a{suffix}")
    assert code == 2 and f"{tmp_path}/a{suffix} cannot be written" in error and len(error.splitlines()) == 1
    (tmp_path / "file").touch()
    code, _, error = tool(command, checkpoint, "--output", tmp_path / "file" / f"a{suffix}")
    assert code == 2 and f"file/a{suffix} cannot be written" in error and len(error.splitlines()) == 1


def test_a_full_disk_ends_the_export_of_a_program_in_a_sentence(checkpoint, tmp_path, launch):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"  # stands in for the disk
    arguments = ["export.py", "program", str(checkpoint), "--output", str(tmp_path / "a.pt2")]
    tool = "import sys; sys.argv = {}; import runpy; runpy.run_path('tools/export.py', run_name='__main__')"
    result = launch(["-c", f"{limit}; {tool.format(arguments)}"])
    assert result.returncode == 2 and "a.pt2 cannot be written: File too large; make room" in result.stderr
    assert not (tmp_path / "a.pt2").exists()


def test_an_evaluation_is_that_of_the_weights_by_their_checksum(checkpoint, tmp_path, tool):
    evaluation = {"acc1": 25.0, "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "weights": "anywhere"}
    file = checkpoint.with_name("evaluation_of_last.json")
    file.write_text(json.dumps(evaluation))
    assert tool("weights", checkpoint, "--output", tmp_path / "a.safetensors")[0] == 0
    assert read_exported(tmp_path / "a.safetensors")["accuracy"] == {"acc1": 25.0}
    # The run went on: that evaluation is of weights that are gone.
    torch.save({**torch.load(checkpoint, weights_only=True), "more": 1}, checkpoint)
    assert tool("weights", checkpoint, "--output", tmp_path / "b.safetensors")[0] == 0
    assert read_exported(tmp_path / "b.safetensors")["accuracy"]["acc1"] == 75.0  # of the final epoch
    code, _, err = tool("weights", checkpoint, "--output", tmp_path / "c.safetensors", "--evaluation", file)
    assert code == 2 and f"--evaluation {file} is of other weights (anywhere); give that of {checkpoint}" in err


def test_an_existing_file_is_not_written_over(checkpoint, tmp_path, tool):
    for command, name in (("weights", "a.safetensors"), ("back", "a.pt"), ("program", "a.pt2")):
        (tmp_path / name).write_text("mine")
        code, _, error = tool(command, checkpoint, "--output", tmp_path / name)
        assert code == 2 and f"{tmp_path / name} exists already" in error
        assert (tmp_path / name).read_text() == "mine"
    assert tool("weights", checkpoint, "--output", tmp_path / "a.pt3")[0] == 2


@pytest.mark.parametrize("name", ["VGG8", pytest.param("sma_ms_resnet18", marks=pytest.mark.slow)])
def test_a_program_gives_the_logits_of_the_network_for_any_batch(name, tmp_path, tool):
    keywords = {"sma_blocks": "none"} if name == "sma_ms_resnet18" else {}  # with SMA the export takes a minute
    torch.manual_seed(0)
    net = getattr(models, name)(T=4, num_classes=5, width=0.125, AZO=False, **keywords).eval()
    size = {"frame_size": [32, 32]} if name == "VGG8" else {"image_size": 32}
    torch.save({"model": net.state_dict(), "recipe": {"timesteps": 4, **size}}, tmp_path / "w.pth")
    code, out, error = tool("program", tmp_path / "w.pth", "--output", tmp_path / "w.pt2")
    assert code == 0 and "from the network's: 0\n" in out, error
    program = torch.export.load(tmp_path / "w.pt2").module()
    for batch in (1, 4):
        x = torch.rand(4, batch, 2, 32, 32) if name == "VGG8" else torch.rand(batch, 3, 32, 32)
        with torch.no_grad():
            expected = net(x)
            reset_net(net)
            assert torch.equal(program(x), expected) and torch.equal(program(x), expected)


def test_a_program_needs_a_size_and_weights_of_this_project(tmp_path, tool):
    torch.save(small().state_dict(), tmp_path / "w.pth")
    torch.save({"other": torch.zeros(1)}, tmp_path / "o.pth")
    assert "--size" in tool("program", tmp_path / "w.pth", "--output", tmp_path / "w.pt2")[2]
    assert "not the weights of" in tool("program", tmp_path / "o.pth", "--output", tmp_path / "w.pt2")[2]
    assert not (tmp_path / "w.pt2").exists()


def test_torch_hub_has_the_six_networks_and_builds_that_of_the_file(tmp_path):
    factories = {name for name in models.__all__ if name.startswith("sma_")}
    listed = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert listed == factories and len(factories) == 6  # as torch.hub.list sees it
    net = torch.hub.load(str(ROOT), "sma_ms_resnet18", source="local", T=2, num_classes=7, width=0.125)
    assert (net.T, net.num_classes) == (2, 7)

    trained = small(sma_blocks=[3], branch_activation="relu")
    torch.save({"model": trained.state_dict()}, tmp_path / "w.pt")
    loaded = torch.hub.load(str(ROOT), "sma_vgg8_dvs128", source="local", weights=tmp_path / "w.pt", AZO=False)
    expected = trained.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(UserError, match="does not fit this network"):
        torch.hub.load(str(ROOT), "sma_ms_resnet18", source="local", weights=tmp_path / "w.pt", width=0.125)


@pytest.mark.parametrize("blocks", ["none", "first-two"])
def test_a_network_is_inferred_from_its_weights(blocks):
    net = models.sma_ms_resnet34(T=2, num_classes=5, width=0.125, sma_blocks=blocks)
    name, keywords = describe_network(net.state_dict(), {"recipe": {"timesteps": 2}})
    again = getattr(models, name)(**keywords)
    assert name == "sma_ms_resnet34" and again.T == 2
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
