"""tools/visualize.py on a small network: what it draws, where it puts it, and mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models import VGG8
from tests.test_operations import lively, run_tool
from tools import visualize
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
    assert [path.name for path in (run_dir / "figures").glob("attention*")] == ["attention_block2.1.png"]


def test_one_sample_as_strip_gif_and_frames(gesture_data, tmp_path, monkeypatch, capsys):
    arguments = ["frames", "--data-dir", gesture_data, "-T", 4, "--sample", 0, "--scale", 2, "--output-dir", tmp_path]
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, *arguments)
    assert code == 0, err
    names = {path.name for path in (tmp_path / "0/user24_0").iterdir()}
    assert names == {"strip.png", "frames.gif", *(f"user24_0_{t}.png" for t in range(4))}
    assert size_of(tmp_path / "0/user24_0/user24_0_3.png") == (256, 256)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frames"], "either --data-dir DIR or --demo"),
        (["azo", "nowhere"], "has no record of AZO"),
        (["curves", "nowhere"], "cannot be read as the metrics of a run"),
        (["spikes", "--weights", "nowhere.pt"], "nowhere.pt does not exist"),
        (["wrong"], "invalid choice"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, *arguments)
    assert code == 2 and words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_finished_epoch_has_no_curves(tmp_path, monkeypatch, capsys):
    (tmp_path / "args.json").write_text(json.dumps({}))
    (tmp_path / "metrics.csv").write_text("epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds\n")
    code, _, err = run_tool(monkeypatch, capsys, visualize.main, "curves", tmp_path)
    assert code == 2 and "has not finished an epoch" in err
