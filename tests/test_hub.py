"""export.py hub: a folder that models.load and torch.hub read back, and its model card."""

import json
import re

import pytest
import torch

import models
from models import VGG8
from tests.conftest import ROOT
from tests.test_report import run_as_user
from tools import export


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as a run leaves it, with the path of its data in it."""
    torch.manual_seed(0)
    net = VGG8(T=4, num_classes=3, width=0.125, sma_blocks=[2], branch_activation="relu").eval()
    recipe = {"epochs": 5, "seed": 17, "timesteps": 4, "weights": "/home/me/start.pt"}
    facts = {"data": {"title": "my gestures", "folder": "/home/me/data"}}
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    torch.save({"model": net.state_dict(), "epoch": 5, "recipe": recipe, "facts": facts}, path)
    evaluation = {"acc1": 75.0, "correct": 6, "count": 8, "loss": 0.1, "selection": "final"}
    (path.parent / "evaluation.json").write_text(json.dumps(evaluation))
    head = "epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds\n"
    (path.parent / "metrics.csv").write_text(head + "1,1,1,1,1,1,1\n2,1,1,1,1,1,1\n")
    return net, path


def test_a_folder_is_read_back_by_models_and_by_torch_hub(checkpoint, tmp_path):
    net, path = checkpoint
    folder = tmp_path / "hub"
    code, _, err = run_as_user(export.main, "hub", path, "--output", folder, "--license", "cc-by-4.0")
    assert code == 0, err
    x = torch.rand(4, 2, 2, 32, 32)
    loaded = models.load(folder)
    hub = torch.hub.load(str(ROOT), "sma_vgg8_dvs128", source="local", weights=folder, AZO=False).eval()
    assert not loaded.training
    outputs = []
    for one in (net, loaded, hub):
        outputs.append(one(x))
        models.neurons.reset_net(one)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert models.load(folder, AZO=True).block2[1].AZO
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: pytorch\nlicense: cc-by-4.0\n")
    assert "75.00 % (6 of 8; 95 % interval" in card and "Epoch 5 of 5, the final one; seed 17" in card
    assert (folder / "curves.png").exists() and "my gestures" in card
    for file in folder.iterdir():
        assert b"/home/me" not in file.read_bytes(), file
    weights = re.search(r'weights="(\w+)"', card)
    assert weights and weights[1] == "FOLDER"
    code, _, err = run_as_user(export.main, "hub", path, "--output", folder)
    assert code == 2 and "exists already and is not empty" in err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "FileNotFoundError"),
        ("[]", "TypeError"),
        ('{"network": "os.system", "keywords": {}}', "KeyError: 'os.system'"),
        ('{"network": "VGG8", "keywords": {"T": 4, "num_classes": 3}}', "model.safetensors"),
    ],
)
def test_a_folder_in_another_layout_is_a_sentence(config, words, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"is no folder of tools/export\.py hub") as found:
        models.load(tmp_path)
    assert words in str(found.value)


def test_a_network_whose_t_nobody_knows_is_not_exported(tmp_path):
    torch.save(VGG8(T=4, num_classes=3, width=0.125, sma_blocks=[]).state_dict(), tmp_path / "w.pt")
    code, _, err = run_as_user(export.main, "hub", tmp_path / "w.pt", "--output", tmp_path / "hub")
    assert code == 2 and "is unknown: the network has no SMA" in err and not (tmp_path / "hub").exists()
