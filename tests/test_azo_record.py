"""What AZO replaced is counted exactly, and lies in the run directory epoch by epoch, through stops and resumes."""

import shutil

import numpy as np
import pytest
import torch

from models import VGG8
from models.neurons import reset_net
from tests.conftest import SMALL, same_weights
from utils.analysis.azo_record import AZORecord, read_azo_record
from utils.errors import UserError


def train(net, batches, seed=0):
    torch.manual_seed(seed)
    net.train()
    for _ in range(batches):
        net(torch.rand(4, 2, 2, 32, 32))
        reset_net(net)


def small_net(**keywords):
    torch.manual_seed(0)
    return VGG8(T=4, num_classes=3, width=0.125, **{"AZO": True, "RCR": 4, "RTR": 2, **keywords})


def test_every_replacement_is_counted_where_azo_made_it(tmp_path):
    net = small_net()
    record = AZORecord(net)
    counted = np.zeros((4, 4, 16), int)
    count = net.block2[1].observer

    def also(w_time, w_channel, replaced):
        counted[...] += replaced.numpy()
        count(w_time, w_channel, replaced)

    net.block2[1].observer = also
    train(net, 3)
    record.write(tmp_path, 1)
    epochs, kernels, shares = read_azo_record(tmp_path)
    assert (epochs, kernels, sorted(shares)) == ([1], [1, 3, 5, 7], ["block2.1", "block3.1"])
    assert np.allclose(shares["block2.1"][0] * 3, counted) and counted.sum() > 0
    # Two of four steps, less where step 0 is among them, in a quarter of the channels.
    per_scale = shares["block2.1"][0].sum((1, 2))
    assert (per_scale <= 2 * 16 / 4 + 1e-9).all() and (per_scale >= 1 * 16 / 4 - 1e-9).all()
    assert (shares["block2.1"][0, :, 0] == 0).all()


def test_evaluation_counts_nothing_and_a_network_without_azo_has_no_record():
    net = small_net()
    record = AZORecord(net)
    net.eval()
    net(torch.rand(4, 1, 2, 32, 32))
    assert record and not any(count.any() for count in record.state_dict()["counts"].values())
    assert not AZORecord(small_net(AZO=False))


def test_the_counts_of_an_unfinished_epoch_go_on_from_their_state(tmp_path):
    net = small_net()
    record = AZORecord(net)
    train(net, 2)
    state = record.state_dict()
    train(net, 1, seed=1)
    (tmp_path / "whole").mkdir()
    record.write(tmp_path / "whole", 1)

    net = small_net()
    train(net, 2)  # the first part, whose record was lost
    record = AZORecord(net)
    record.load_state_dict(state)
    train(net, 1, seed=1)
    (tmp_path / "again").mkdir()
    record.write(tmp_path / "again", 1)
    (_, _, one), (_, _, other) = (read_azo_record(tmp_path / name) for name in ("whole", "again"))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_run_writes_one_file_an_epoch_where_it_is_asked_to(script, gesture_data, tmp_path):
    common = [*SMALL, "--data-dir", gesture_data, "--epochs", 2, "--keep-every", 1]
    whole, without, later = (tmp_path / name for name in ("whole", "without", "later"))
    assert script("dvs128", *common, "--record-azo", "--output-dir", whole)[0] == 0
    assert sorted(path.name for path in (whole / "azo").iterdir()) == ["epoch_0001.npz", "epoch_0002.npz"]
    _, _, shares = read_azo_record(whole)
    # In the first epoch and the second: RTR 4 of T 4 is one step, RCR 10 of 16 channels is one.
    assert (shares["block2.1"].sum((2, 3)) <= 1 + 1e-9).all() and shares["block2.1"].any()

    assert script("dvs128", *common, "--output-dir", without)[0] == 0
    assert not (without / "azo").exists()
    assert same_weights(whole / "last.pt", without / "last.pt")
    for source in (whole, without):  # continued, and begun in the middle of a run
        command = [*common, "--record-azo", "--resume", source / "epoch_0001.pt", "--output-dir", later]
        code, _, err = script("dvs128", *command)
        assert code == 0, err
        epochs, _, again = read_azo_record(later)
        assert epochs == [2] and all((again[name][0] == shares[name][1]).all() for name in shares)
        shutil.rmtree(later)


def test_a_missing_or_damaged_record_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="train with --AZO --record-azo"):
        read_azo_record(tmp_path)
    (tmp_path / "azo").mkdir()
    (tmp_path / "azo/epoch_0001.npz").write_bytes(b"PK cut off")
    with pytest.raises(UserError, match=r"epoch_0001\.npz cannot be read"):
        read_azo_record(tmp_path)
