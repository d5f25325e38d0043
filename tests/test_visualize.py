"""tools/visualize.py on a small network: what it draws, where it puts it, and mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from docs.figures import draw_sma
from models import VGG8
from tests.conftest import write_events
from tests.test_operations import lively, run_tool
from tools import visualize
from utils.data.splits import RULES
from utils.errors import UserError


@pytest.fixture
def run_dir(tmp_path):
    """A folder with weights of a small network with SMA in block 2."""
    torch.manual_seed(0)
    net = VGG8(T=4, num_classes=11, width=0.125, sma_blocks=[2])
    lively(net)
    (tmp_path / "run").mkdir()
    torch.save(net.state_dict(), tmp_path / "run" / "weights.pt")
    return tmp_path / "run"


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_spike_maps_are_the_share_of_channels_that_spike():
    torch.manual_seed(0)
    net = VGG8(T=4, num_classes=3, width=0.125, sma_blocks=[2]).eval()
    lively(net)
    x = torch.rand(4, 1, 2, 32, 32)
    seen = []
    handle = net.block1[2].register_forward_hook(lambda _m, _i, spikes: seen.append(spikes))
    maps = visualize.spike_maps(net, x, None)
    handle.remove()
    assert list(maps) == ["block1.2", "block2.3", "block3.2", "block4.2", "block5.2"]
    assert np.allclose(maps["block1.2"], seen[0][:, 0].mean(1)) and 0 < maps["block1.2"].mean() < 1
    assert list(visualize.spike_maps(net, x, ["block2.1.S_Convs.3.lif"])) == ["block2.1.S_Convs.3.lif"]
    with pytest.raises(UserError, match=r"--layers others\.3 is no layer of neurons with a map"):
        visualize.spike_maps(net, x, ["others.3"])
    assert not any(module._forward_hooks for module in net.modules())


def test_spikes_and_attention_of_a_weights_file_go_into_its_run(run_dir, gesture_data, monkeypatch, capsys):
    common = ["--weights", run_dir / "weights.pt", "--data-dir", gesture_data, "--frame-size", 32, "--device", "cpu"]
    code, out, err = run_tool(monkeypatch, capsys, visualize.main, "spikes", *common, "--sample", "2/user24_0")
    assert code == 0, err
    assert "block5.2" in out and size_of(run_dir / "figures/spikes_3.png")[0] <= 1400  # class "10" sorts before "2"
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, "attention", *common, "-b", 4)
    assert code == 0, err
    names = {path.name for path in (run_dir / "figures").glob("attention*")}
    assert names == {f"attention_block2.1.{suffix}" for suffix in ("png", "pdf", "svg")}


def test_one_sample_as_strip_gif_and_frames(gesture_data, tmp_path, monkeypatch, capsys):
    arguments = ["frames", "--data-dir", gesture_data, "-T", 4, "--sample", 0, "--scale", 2, "--output-dir", tmp_path]
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, *arguments)
    assert code == 0, err
    names = {path.name for path in (tmp_path / "0/user24_0").iterdir()}
    assert names == {"strip.png", "strip.pdf", "strip.svg", "frames.gif", *(f"user24_0_{t}.png" for t in range(4))}
    assert size_of(tmp_path / "0/user24_0/user24_0_3.png") == (256, 256)


def test_a_demo_sample_is_titled_by_its_gesture(tmp_path, monkeypatch, capsys):
    made = {"dvs128": tmp_path / "dvs128", "ncaltech101": tmp_path / "ncaltech101"}
    for number, part in ((2, "train"), (2, "test"), (10, "train"), (10, "test")):
        write_events(made["dvs128"] / f"events_np/{part}/{number}/{part}.npz", number + 20 * (part == "test"))
    for number, name in enumerate(("pull", "wave")):
        for sample in ("train", "test"):
            write_events(made["ncaltech101"] / f"events_np/{name}/{sample}.npz", 50 + number, 180, 240)
    write_events(made["ncaltech101"] / "events_np/wave/test.npz", 60, 180, 240)
    (made["ncaltech101"] / "split.csv").write_text("test,wave/test\ntrain,*\n")
    titles = []
    draw = visualize.draw_frames
    monkeypatch.setattr(visualize, "draw_frames", lambda x, title, full: titles.append(title) or draw(x, title, full))
    for data_set, sample in (("dvs128", "10/test"), ("dvs128", "2/test"), ("ncaltech101", "wave/test")):
        monkeypatch.setattr("utils.data.events.write_demo", lambda *_, data_set=data_set: made[data_set])
        arguments = ["frames", "--data-set", data_set, "--demo", "-T", 2, "--sample", sample]
        code, _, err = run_tool(monkeypatch, capsys, visualize.main, *arguments, "--output-dir", tmp_path / "out")
        assert code == 0, err
    assert titles == ["10/test (wave)", "2/test (pull)", "wave/test"]


def test_pictures_of_another_t_go_into_another_folder_or_are_refused(gesture_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["frames", "--data-dir", gesture_data]
    for T in (4, 2):
        code, out, err = run_tool(monkeypatch, capsys, visualize.main, *common, "-T", T, "--all")
        assert code == 0 and f"{33 * T} pictures made" in out, err
        assert len(list((tmp_path / f"output/frames_dvs128_T{T}").rglob("*.png"))) == 33 * T
    for how in ([], ["--all"]):
        arguments = [*common, *how, "-T", 2, "--output-dir", "output/frames_dvs128_T4"]
        code, _, err = run_tool(monkeypatch, capsys, visualize.main, *arguments)
        assert code == 2 and len(err.splitlines()) == 1 and "T 4, scale 1, full 1.0 there, T 2" in err


def test_the_steps_of_the_spikes_are_chosen(run_dir, gesture_data, monkeypatch, capsys):
    common = ["spikes", "--weights", run_dir / "weights.pt", "--data-dir", gesture_data, "--frame-size", 32]
    narrow = [*common, "--device", "cpu", "--steps", 2, 4]
    assert run_tool(monkeypatch, capsys, visualize.main, *narrow)[0] == 0
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, *narrow, 5)
    assert code == 2 and "--steps 5 is none of the 4 time steps; give numbers from 1 to 4" in err


def test_a_figure_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.csv").write_text("epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds\n1,1,1,1,1,1,1\n")
    (tmp_path / "figures").touch()
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, "curves", tmp_path)
    assert code == 2 and f"figure {tmp_path}/figures/curves.png cannot be written" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frames"], "either --data-dir DIR or --demo"),
        (["azo", "nowhere"], "has no record of AZO"),
        (["curves", "nowhere"], "file nowhere/metrics.csv does not exist; give the --output-dir of a run"),
        (["spikes", "--weights", "nowhere.pt"], "nowhere.pt does not exist"),
        (["wrong"], "invalid choice"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, *arguments)
    assert code == 2 and words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_command_of_the_readme_s_figure_is_one_line(monkeypatch, capsys):
    code, _, err = run_tool(monkeypatch, capsys, draw_sma.main, "--outptu", "x.png")
    assert code == 2 and len(err.splitlines()) == 1 and "--outptu" in err


def test_the_help_names_every_rule_of_a_split(monkeypatch, capsys):
    _, out, _ = run_tool(monkeypatch, capsys, visualize.main, "spikes", "--help")
    assert f"--split {'|'.join(RULES)}|FILE" in out


def test_a_run_without_a_finished_epoch_has_no_curves(tmp_path, monkeypatch, capsys):
    (tmp_path / "args.json").write_text(json.dumps({}))
    (tmp_path / "metrics.csv").write_text("epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds\n")
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, "curves", tmp_path)
    assert code == 2 and "has not finished an epoch" in err
