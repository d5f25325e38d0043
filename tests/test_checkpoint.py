"""Reading weights from anywhere, safely; saving whole files; continuing a run."""

import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

import utils.checkpoint
from models import VGG8, sma_vgg8_ncaltech101
from tests.reliability.runs import damages
from utils.checked import write_checked
from utils.checkpoint import Checkpoints, load_weights, read_weights
from utils.distributed import Process
from utils.engine import Progress
from utils.errors import UserError
from utils.networks import settings_of_weights

ALONE = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def small(**changes):
    return VGG8(**{"T": 4, "num_classes": 3, "width": 0.125, **changes})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return small().state_dict()


@pytest.mark.parametrize(
    "dress",
    [
        lambda w: w,
        lambda w: {"module." + k: v for k, v in w.items()},
        lambda w: {"_orig_mod.module." + k: v for k, v in w.items()},
        lambda w: {"model": w, "epoch": 3, "max_test_acc": 0.5},
        lambda w: {"net": {"module." + k: v for k, v in w.items()}},
        lambda w: {"state_dict": w, "optimizer": {"state": {}, "param_groups": []}},
        lambda w: {k.replace("block1.1.0.", "block1.0.1."): v for k, v in w.items()},
    ],
    ids=["bare", "DDP", "compiled DDP", "in model", "in net", "in state_dict", "N-Caltech101 names"],
)
def test_released_and_own_forms_load_all_weights(dress, weights, tmp_path):
    torch.save(dress(weights), tmp_path / "w.pth")
    torch.manual_seed(1)
    net = small()
    assert not same(net.state_dict(), weights)
    load_weights(net, tmp_path / "w.pth")
    assert same(net.state_dict(), weights)


def test_a_released_ncaltech101_file_loads_under_its_own_names(tmp_path):
    net = sma_vgg8_ncaltech101(width=0.125, AZO=False)
    released = {"module." + k.replace("block1.1.0.", "block1.0.1."): v for k, v in net.state_dict().items()}
    assert sum("block1.0.1." in name for name in released) == 5
    torch.save({"net": released}, tmp_path / "w.pth")
    other = sma_vgg8_ncaltech101(width=0.125, AZO=False)
    load_weights(other, tmp_path / "w.pth")
    assert same(other.state_dict(), net.state_dict())


def test_the_old_format_of_torch_loads(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "w.pth")[0], weights)


def test_another_length_is_refused_with_both(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(UserError, match="T=4 and the network is built for T=5"):
        load_weights(small(T=5), tmp_path / "w.pth")


def test_a_mismatch_names_missing_unexpected_and_shapes_and_loads_nothing(weights, tmp_path):
    weights["extra.weight"] = torch.zeros(1)
    del weights["block4.0.0.bias"]
    weights["others.8.weight"] = torch.zeros(7, 128)
    torch.save(weights, tmp_path / "w.pth")
    net = small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(net, tmp_path / "w.pth")
    message = str(caught.value)
    assert "1 missing: block4.0.0.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of another shape: others.8.weight [7, 128] instead of [3, 128]" in message
    assert same(net.state_dict(), before)


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


def write_hostile(path):
    torch.save({"model": Hostile()}, path)


def write_whole_module(path):
    torch.save(nn.Linear(1, 1), path)


def write_truncated(path):
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_text("<!DOCTYPE html><html>quota exceeded</html>"), "is a web page"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"\0" * 5000), "is damaged or is no weights file"),
        (write_truncated, "is damaged or is no weights file"),
        (write_zip, "is damaged or is no weights file"),
        (lambda p: torch.save([1, 2], p), "holds a list and no state dict"),
        (lambda p: torch.save({"epoch": 1}, p), r"holds no weights: its entries are \['epoch'\]"),
        (write_hostile, "can run code"),
        (write_whole_module, "can run code"),
        (lambda p: p.write_bytes(pickle.dumps(Hostile(), protocol=2)), "can run code"),
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is a folder and no file"),
    ],
    ids=["html", "empty", "zeros", "cut", "zip", "list", "none", "hostile", "module", "pickle", "missing", "folder"],
)
def test_what_is_no_weights_file_is_refused_in_one_sentence(write, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        read_weights(tmp_path / "w.pth")
    assert "w.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {},
            {"num_classes": 3, "width": 0.125, "sma_blocks": [2, 3], "timesteps": 4, "branch_activation": "lif",
             "branch_groups": 1},
        ),
        (
            {"T": 6, "sma_blocks": [1, 4], "branch_activation": "relu", "width": 0.25, "num_classes": 7,
             "branch_groups": "channel"},
            {"num_classes": 7, "width": 0.25, "sma_blocks": [1, 4], "timesteps": 6, "branch_activation": "relu",
             "branch_groups": "channel"},
        ),
        ({"sma_blocks": []}, {"num_classes": 3, "width": 0.125, "sma_blocks": []}),
    ],
)  # fmt: skip
def test_the_network_is_inferred_from_the_shapes(arguments, expected):
    weights = small(**arguments).state_dict()
    assert settings_of_weights(weights, "vgg8") == settings_of_weights(weights) == expected
    with pytest.raises(UserError, match="not the weights of an SMA-MS-ResNet-18, 34 or 104; the names begin with bl"):
        settings_of_weights(weights, "ms_resnet")


def test_foreign_weights_are_no_network_of_this_project():
    with pytest.raises(UserError, match="an SMA-VGG8 or an SMA-MS-ResNet-18, 34 or 104; the names begin with weight"):
        settings_of_weights(nn.Linear(2, 2).state_dict())


def make(directory, recipe=None, seed=0):
    torch.manual_seed(seed)
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    return (
        Checkpoints(
            directory, recipe or {"lr": 0.1, "epochs": 5}, ALONE, net, Progress(ALONE.device), optimizer=optimizer
        ),
        net,
        optimizer,
    )


def step(net, optimizer):
    net(torch.randn(4, 2)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_run_continues_bit_exactly(tmp_path):
    saved, net, optimizer = make(tmp_path)
    step(net, optimizer)
    saved.save(1, acc1=40.0)
    step(net, optimizer)  # the uninterrupted run goes on
    expected = {k: v.clone() for k, v in net.state_dict().items()}

    continued, net, optimizer = make(tmp_path, seed=9)
    assert continued.resume("auto") == 1
    assert continued.best == {"acc1": 40.0, "epoch": 1}
    step(net, optimizer)
    assert same(net.state_dict(), expected)


def test_best_is_kept_apart_from_last(tmp_path):
    checkpoints, net, optimizer = make(tmp_path)
    for epoch, acc1 in [(1, 10.0), (2, 30.0), (3, 20.0)]:
        step(net, optimizer)
        checkpoints.save(epoch, acc1)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (best["epoch"], last["epoch"]) == (2, 3)
    assert last["best"] == {"acc1": 30.0, "epoch": 2}
    assert same(last["model"], net.state_dict()) and not same(best["model"], last["model"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]
    assert torch.load(tmp_path / "previous.pt", weights_only=True)["epoch"] == 2


def test_every_n_th_checkpoint_is_kept(tmp_path):
    _, net, optimizer = make(tmp_path)
    checkpoints = Checkpoints(tmp_path, {}, ALONE, net, Progress(ALONE.device), keep_every=2, optimizer=optimizer)
    for epoch in range(1, 6):
        checkpoints.save(epoch, 10.0 * epoch)
    kept = {p.name: torch.load(p, weights_only=True)["epoch"] for p in tmp_path.glob("*.pt")}
    assert kept == {"last.pt": 5, "best.pt": 5, "previous.pt": 4, "epoch_0002.pt": 2, "epoch_0004.pt": 4}


def test_a_damaged_last_checkpoint_is_told_and_the_previous_one_continues(tmp_path, capsys):
    checkpoints, net, optimizer = make(tmp_path)
    expected = []
    for epoch in (1, 2):
        step(net, optimizer)
        checkpoints.save(epoch, 10.0 * epoch)
        expected.append({k: v.clone() for k, v in net.state_dict().items()})
    whole = (tmp_path / "last.pt").read_bytes()
    previous = (tmp_path / "previous.pt").read_bytes()
    (tmp_path / "best.pt").unlink()  # it is the same as last.pt here
    count = 0
    for damaged in damages(whole):
        (tmp_path / "last.pt").unlink()
        (tmp_path / "last.pt").write_bytes(damaged)
        continued, net, optimizer = make(tmp_path, seed=9)
        assert continued.resume("auto") == 1
        assert same(net.state_dict(), expected[0])
        told = capsys.readouterr().err
        assert f"file {tmp_path / 'last.pt'} is" in told and "continuing from" in told and told.count("\n") == 1
        assert (tmp_path / "previous.pt").read_bytes() == previous
        count += 1
    assert count == 33
    # The next save replaces the damaged file; the whole one stays until the save after that.
    continued.save(2, 20.0)
    assert (tmp_path / "previous.pt").read_bytes() == previous
    assert make(tmp_path)[0].resume("auto") == 2


def test_no_whole_checkpoint_is_one_sentence(tmp_path):
    make(tmp_path)[0].save(1, 10.0)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint of the run in --output-dir .* can be read \(.*is empty"):
        make(tmp_path)[0].resume("auto")


def test_what_a_killed_save_left_is_cleaned_up(tmp_path):
    (tmp_path / ".last.pt.partial").write_bytes(b"half")
    assert make(tmp_path)[0].resume("auto") == 0
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_stays_a_plain_file_of_torch(tmp_path):
    make(tmp_path)[0].save(1, 10.0)
    with zipfile.ZipFile(tmp_path / "last.pt") as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    mapped = torch.load(tmp_path / "last.pt", weights_only=True, mmap=True)
    assert set(mapped["model"]) == {"weight", "bias"}


def test_weights_with_a_changed_byte_are_refused(tmp_path):
    _, net, _ = make(tmp_path)
    make(tmp_path)[0].save(1, 10.0)
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"changed\.pt is damaged: its checksum is another"):
        load_weights(net, tmp_path / "changed.pt")


def test_another_recipe_is_refused_with_the_differing_fields(tmp_path):
    make(tmp_path)[0].save(1, 10.0)
    with pytest.raises(UserError, match=r"lr is 0\.1 there and 0\.2 here; give the same"):
        make(tmp_path, {"lr": 0.2, "epochs": 5})[0].resume("auto")


def test_never_refuses_to_write_over_a_run(tmp_path):
    assert make(tmp_path)[0].resume("never") == 0
    make(tmp_path)[0].save(1, 10.0)
    with pytest.raises(UserError, match="already holds a run"):
        make(tmp_path)[0].resume("never")


def test_a_named_checkpoint_continues_elsewhere_but_not_over_another_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    make(tmp_path / "a")[0].save(2, 10.0)
    assert make(tmp_path / "b")[0].resume(str(tmp_path / "a" / "last.pt")) == 2
    make(tmp_path / "b")[0].save(1, 10.0)
    with pytest.raises(UserError, match="would overwrite the run"):
        make(tmp_path / "b")[0].resume(str(tmp_path / "a" / "last.pt"))


def test_bare_weights_are_no_checkpoint(tmp_path):
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"it lacks .*weights alone are loaded with --weights"):
        make(tmp_path)[0].resume(str(tmp_path / "w.pt"))


def test_a_failed_save_leaves_the_previous_file(tmp_path, monkeypatch):
    checkpoints, _, _ = make(tmp_path)
    checkpoints.save(1, 10.0)
    before = (tmp_path / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        checkpoints.save(2, 5.0)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    checkpoints, net, _ = make(tmp_path)
    checkpoints.save(1, 10.0)
    before = (tmp_path / "last.pt").read_bytes()
    net.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"last\.pt stays as it was: .* is not finite"):
        checkpoints.save(2, 20.0)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_an_optimiser_that_is_not_finite_is_never_saved(tmp_path):
    checkpoints, net, optimizer = make(tmp_path)
    step(net, optimizer)
    checkpoints.save(1, 10.0)
    before = (tmp_path / "last.pt").read_bytes()
    optimizer.state[net.bias]["exp_avg_sq"][0] = float("inf")
    with pytest.raises(UserError, match="or the optimiser is not finite"):
        checkpoints.save(2, 20.0)
    assert (tmp_path / "last.pt").read_bytes() == before


def everything(checkpoints, net, optimizer):
    values = [*net.state_dict().values(), torch.get_rng_state()]
    values += [value for state in optimizer.state.values() for value in state.values()]
    return [value.clone() for value in values], checkpoints.progress.step, checkpoints.best


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("optimizer", lambda state: {}),
        ("optimizer", lambda state: {**state, "param_groups": []}),
        ("processes", lambda state: []),
        ("processes", lambda state: [{"progress": state[0]["progress"]}]),
        ("processes", lambda state: [{**state[0], "rng": {"cpu": torch.zeros(3, dtype=torch.uint8)}}]),
        ("best", lambda state: {}),
        ("model", lambda state: {**state, "weight": torch.zeros(3, 3)}),
    ],
    ids=["no optimiser", "groups", "no process", "no random state", "random state", "best", "weights"],
)
def test_a_checkpoint_of_which_a_part_does_not_fit_changes_nothing(tmp_path, name, spoil):
    """Its checksum is right: it comes from another program, or a later version of this one."""
    checkpoints, net, optimizer = make(tmp_path)
    step(net, optimizer)
    checkpoints.save(1, 10.0)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    other = tmp_path / "other.pt"
    write_checked({**content, name: spoil(content[name])}, other)
    checkpoints, net, optimizer = make(tmp_path, seed=9)
    step(net, optimizer)
    before = everything(checkpoints, net, optimizer)
    with pytest.raises(UserError, match=r"other\.pt"):
        checkpoints.resume(str(other))
    after = everything(checkpoints, net, optimizer)
    assert all(map(torch.equal, before[0], after[0])) and before[1:] == after[1:]


def test_processes_that_find_different_checkpoints_do_not_start(tmp_path, monkeypatch):
    """Several machines without a shared folder: the second process finds nothing."""
    make(tmp_path)[0].save(1, 10.0)
    monkeypatch.setattr(utils.checkpoint, "gather", lambda value: [value, None])
    with pytest.raises(UserError, match=r"different checkpoints .* \(epoch 1, step 0; none\); give all of them one"):
        make(tmp_path)[0].resume("auto")


def test_another_number_of_processes_is_told(tmp_path, capsys):
    make(tmp_path)[0].save(1, 10.0)
    checkpoints, _, _ = make(tmp_path)
    checkpoints.process = Process(0, 0, 2, ALONE.device)
    assert checkpoints.resume("auto") == 1
    assert "had 1 process(es) and has 2 now" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_left_for_the_previous_one(tmp_path, monkeypatch, capsys):
    checkpoints, _, _ = make(tmp_path)
    checkpoints.save(1, 10.0)
    checkpoints.save(2, 5.0)

    def broken_disk(path, *arguments, before=os.open, **keywords):
        if os.path.basename(path) == "last.pt":
            raise OSError(5, "Input/output error")
        return before(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", broken_disk)
    assert make(tmp_path)[0].resume("auto") == 1
    assert "last.pt cannot be read: Input/output error; continuing from" in capsys.readouterr().err


def test_going_back_needs_another_folder(tmp_path):
    _, net, optimizer = make(tmp_path / "a")

    def run(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        progress = Progress(ALONE.device)
        return Checkpoints(tmp_path / folder, {}, ALONE, net, progress, keep_every=1, optimizer=optimizer)

    first = run("a")
    for epoch in (1, 2, 3):
        first.save(epoch, 10.0 * epoch)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    source = str(tmp_path / "a" / "epoch_0001.pt")
    with pytest.raises(UserError, match=r"epoch_0001\.pt would go back in --output-dir .*a, which holds later checkp"):
        run("a").resume(source)
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    again = run("b")
    assert again.resume(source) == 1
    assert again.best == {"acc1": 10.0, "epoch": 1}
    again.save(2, 5.0)
    kept = {path.name: torch.load(path, weights_only=True)["epoch"] for path in (tmp_path / "b").iterdir()}
    assert kept == {"last.pt": 2, "previous.pt": 1, "best.pt": 1, "epoch_0002.pt": 2}
    assert run("a").resume(str(tmp_path / "a" / "last.pt")) == 3  # where it stands is not back


def test_a_checkpoint_from_inside_an_epoch_is_not_taken_for_the_best_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stopped, net, optimizer = make(tmp_path / "a")
    stopped.save(1, 10.0)
    step(net, optimizer)
    stopped.progress.step = 2
    stopped.save_inside(1)
    continued, net, _ = make(tmp_path / "b", seed=9)
    assert continued.resume(str(tmp_path / "a" / "last.pt")) == 1
    assert not (tmp_path / "b" / "best.pt").exists()
    continued.save(2, 5.0)
    assert same(torch.load(tmp_path / "b" / "best.pt", weights_only=True)["model"], net.state_dict())
    with pytest.raises(UserError, match="would go back"):  # what was saved inside epoch 2 is later
        make(tmp_path / "a")[0].resume(str(tmp_path / "a" / "best.pt"))


def test_without_last_and_previous_the_newest_of_the_others_continues(tmp_path, capsys):
    _, net, optimizer = make(tmp_path)
    checkpoints = Checkpoints(tmp_path, {}, ALONE, net, Progress(ALONE.device), keep_every=2, optimizer=optimizer)
    for epoch, acc1 in [(1, 10.0), (2, 20.0), (3, 30.0), (4, 5.0), (5, 5.0)]:
        checkpoints.save(epoch, acc1)
    (tmp_path / "last.pt").unlink()
    (tmp_path / "previous.pt").unlink()  # also epoch 4, which epoch_0004.pt is too
    assert Checkpoints(tmp_path, {}, ALONE, net, Progress(ALONE.device)).resume("auto") == 4
    assert f"{tmp_path / 'last.pt'} is not there; continuing from" in capsys.readouterr().err
    (tmp_path / "epoch_0004.pt").unlink()
    assert Checkpoints(tmp_path, {}, ALONE, net, Progress(ALONE.device)).resume("auto") == 3  # the best one


def test_other_versions_of_the_libraries_are_told(tmp_path, monkeypatch, capsys):
    make(tmp_path)[0].save(1, 10.0)
    now = utils.checkpoint.versions()
    monkeypatch.setattr(utils.checkpoint, "versions", lambda: {**now, "torch": "99"})
    assert make(tmp_path)[0].resume("auto") == 1
    assert f"was made with torch {now['torch']}: the last digits may differ" in capsys.readouterr().err


def test_a_continued_run_has_the_code_of_all_its_starts(tmp_path):
    def checkpoints(commit):
        _, net, optimizer = make(tmp_path)
        starts = {"starts": [{"commit": commit, "changed": False}]}
        return Checkpoints(tmp_path, {}, ALONE, net, Progress(ALONE.device), facts=starts, optimizer=optimizer)

    checkpoints("a").save(1, 10.0)
    for epoch, commit in enumerate("aba", 1):
        continued = checkpoints(commit)
        assert continued.resume("auto") == epoch
        continued.save(epoch + 1, 10.0)
    assert [one["commit"] for one in continued.facts["starts"]] == ["a", "b"]
