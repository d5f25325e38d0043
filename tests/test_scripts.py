"""The event scripts as a user runs them: every promised file and flag, mistakes, processes, interruption."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from models import sma_vgg8_cifar10dvs, sma_vgg8_dvs128, sma_vgg8_ncaltech101
from tests.conftest import ROOT, SCRIPTS, SMALL, rows, same_weights, write_events
from utils.checkpoint import load_weights
from utils.versions import code, machine

OTHER = {"dvs128": [], "cifar10dvs": ["--RCR", "4"], "ncaltech101": ["--RCR", "4"]}


@pytest.fixture(scope="module")
def cifar_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    for label, name in enumerate(("bird", "frog")):
        for number in range(10):
            write_events(root / f"events_np/{name}/cifar10_{name}_{number}.npz", 10 * label + number)
    return root


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_run_writes_everything_that_is_promised_and_its_weights_evaluate(
    name, script, gesture_data, folder_data, cifar_data, tmp_path
):
    data = {"dvs128": gesture_data, "cifar10dvs": cifar_data, "ncaltech101": folder_data}[name]
    output = tmp_path / "run"
    code, out, err = script(
        name, *SMALL, *OTHER[name], "--data-dir", data, "--output-dir", output, "--epochs", 2, "--RTR", 2
    )
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith(("epoch 1/2", "epoch 2/2"))]
    header = ("data:", "split:", "network:", "neurons:", "precision:", "batch:", "versions:", "output:", "deviations:")
    assert all(any(line.startswith(fact) for line in out.splitlines()) for fact in header)
    assert "timesteps 4 instead of" in out and "width 0.125 instead of 1" in out
    assert "processes 1 instead of 4" in out

    assert [row["epoch"] for row in rows(output)] == ["1", "2"]
    columns = "epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds"
    assert (output / "metrics.csv").read_text().splitlines()[0] == columns
    assert json.loads((output / "args.json").read_text())["args"]["timesteps"] == 4
    assert list(output.glob("events.out.tfevents.*"))
    assert torch.backends.cudnn.allow_tf32
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert evaluation["acc1"] == 100 * evaluation["correct"] / evaluation["count"]
    assert float(rows(output)[-1]["test_loss"]) == pytest.approx(evaluation["loss"], rel=1e-6)
    assert float(rows(output)[-1]["test_acc1"]) == pytest.approx(evaluation["acc1"])
    for file in ("last.pt", "best.pt"):
        assert all(key.startswith(("block", "others")) for key in torch.load(output / file, weights_only=True)["model"])

    # No other flag than the data: T, width, classes, blocks and the frame size are known from the file.
    again = tmp_path / "evaluated"
    arguments = ["--evaluate", "--weights", output / "last.pt", "--data-dir", data, "--output-dir", again]
    code, out, err = script(name, *arguments, "--device", "cpu", "--batch-size", 3, "--no-tf32")
    assert code == 0, err
    assert not torch.backends.cudnn.allow_tf32 and "tf32 off instead of on" in out
    assert re.search(r"^AZO: +training only$", out, re.MULTILINE) and "AZO with" not in out
    assert re.search(r"^epoch: +2 of 2, the final one", out, re.MULTILINE)
    repeated = json.loads((again / "evaluation.json").read_text())
    assert (repeated["correct"], repeated["count"]) == (evaluation["correct"], evaluation["count"])
    assert repeated["loss"] == pytest.approx(evaluation["loss"], rel=1e-6)
    assert repeated["split"] == evaluation["split"] and repeated["data"] == evaluation["data"]
    assert repeated["precision"] == {"evaluation": "off", "tf32": None}
    assert repeated["AZO"] is True and (repeated["epoch"], repeated["seed"]) == (2, evaluation["seed"])
    assert not (again / "last.pt").exists()


def test_facts_are_values(script, gesture_data, tmp_path):
    command = [*SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path, "--epochs", 1, "--seed", 7]
    assert script("dvs128", *command)[0] == 0
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    described = json.loads((tmp_path / "args.json").read_text())
    best = {"acc1": evaluation["acc1"], "epoch": 1}
    assert [evaluation[key] for key in ("epoch", "selection", "seed", "best")] == [1, "final", 7, best]
    for facts in (evaluation, described, torch.load(tmp_path / "last.pt", weights_only=True)["facts"]):
        assert facts["data"]["name"] == "dvs128" and facts["data"]["size"] == [32, 32]
        assert facts["batch"] == {"per_process": 4, "processes": 1, "global": 4, "micro_batches": 1}
        assert (facts["split"]["rule"], facts["split"]["train"], facts["split"]["test"]) == ("own", 22, 11)
        assert re.fullmatch("[0-9a-f]{8}", facts["split"]["fingerprint"])
        network = facts["network"]
        assert (network["timesteps"], network["width"], network["sma_blocks"], network["AZO"]) == (
            4,
            0.125,
            [2, 3],
            True,
        )
        assert network["parameters"] == sum(p.numel() for p in sma_vgg8_dvs128(T=4, width=0.125).parameters())
        assert facts["neurons"]["name"] == "torch" and "torch" in facts["versions"]
        assert facts["deviations"]["seed"] == [3401, 7] and "lr" not in facts["deviations"]
        (start,) = facts["starts"]
        assert start == {**code(), "machine": machine(torch.device("cpu")), "threads": torch.get_num_threads()}


def test_an_evaluation_never_replaces_that_of_a_training(script, gesture_data, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    command = [*SMALL, "--data-dir", gesture_data, "--output-dir", run, "--epochs", 1]
    assert script("dvs128", *command)[0] == 0
    before = (run / "evaluation.json").read_bytes()
    arguments = ["--evaluate", "--weights", run / "best.pt", "--data-dir", gesture_data, "--device", "cpu", "-b", 4]
    for more, path in (
        ([], run / "evaluation_of_best.json"),  # next to the weights
        (["--output-dir", run], run / "evaluation_of_best.json"),
        (["--output-dir", elsewhere], elsewhere / "evaluation.json"),
    ):
        path.unlink(missing_ok=True)
        code, out, err = script("dvs128", *arguments, *more)
        assert code == 0 and f"written to {path}" in out, err
        assert json.loads(path.read_text())["weights"] == str(run / "best.pt")
        assert (run / "evaluation.json").read_bytes() == before
    assert [path.name for path in elsewhere.iterdir()] == ["evaluation.json"]


def test_released_weights_are_evaluated_without_a_word_on_what_is_unknown(script, gesture_data, tmp_path):
    torch.save(sma_vgg8_dvs128(T=4, width=0.125).state_dict(), tmp_path / "w.pth")
    arguments = ["--evaluate", "--weights", tmp_path / "w.pth", "--data-dir", gesture_data, "--frame-size", 32]
    code, out, err = script("dvs128", *arguments, "--device", "cpu")
    assert code == 0 and "AZO" not in out and re.search("^epoch: +unknown, perhaps selected", out, re.MULTILINE), err
    found = json.loads((tmp_path / "evaluation_of_w.json").read_text())
    assert [found[key] for key in ("AZO", "epoch", "seed", "selection")] == [None, None, None, "unknown"]


def test_t_of_a_network_without_sma_is_told_by_the_run_s_file(script, gesture_data, tmp_path):
    command = ["--data-dir", gesture_data, "--epochs", 1, "--sma-blocks", "--output-dir", tmp_path / "a"]
    assert script("dvs128", *SMALL, *command)[0] == 0
    reported = json.loads((tmp_path / "a/evaluation.json").read_text())
    arguments = ["--evaluate", "--weights", tmp_path / "a/last.pt", "--data-dir", gesture_data, "--device", "cpu"]
    code, out, err = script("dvs128", *arguments, "--output-dir", tmp_path / "b")
    assert code == 0 and "T = 4" in out, err
    repeated = json.loads((tmp_path / "b/evaluation.json").read_text())
    assert repeated["correct"] == reported["correct"]


def test_recomputation_changes_no_weights_and_the_parts_of_a_batch_belong_to_the_recipe(script, gesture_data, tmp_path):
    command = [*SMALL, "--data-dir", gesture_data, "--epochs", 1, "--micro-batches", 2]
    for name, more in (("a", []), ("b", ["--recompute"])):
        code, out, err = script("dvs128", *command, *more, "--output-dir", tmp_path / name)
        assert code == 0 and "4 per process, 4 global, in 2 parts" in out, err
    assert same_weights(tmp_path / "a/last.pt", tmp_path / "b/last.pt")
    code, _, err = script("dvs128", *command[:-2], "--output-dir", tmp_path / "a")
    assert code == 2 and "micro_batches is 2 there and 1 here" in err
    code, _, err = script("dvs128", *command, "--micro-batches", 3)
    assert code == 2 and "--micro-batches 3 does not divide --batch-size 4" in err


def test_depthwise_branches_are_inferred_from_the_weights(script, gesture_data, tmp_path):
    torch.manual_seed(0)
    torch.save(sma_vgg8_dvs128(T=4, width=0.125, branch_groups="channel").state_dict(), tmp_path / "w.pt")
    command = ["--weights", tmp_path / "w.pt", "--data-dir", gesture_data, "--device", "cpu", "-b", 4]
    code, out, err = script("dvs128", "--evaluate", *command)
    assert code == 0 and "lif branches, depthwise, width 0.125" in out, err
    code, out, err = script("dvs128", *command, "--epochs", 1, "--output-dir", tmp_path / "run")  # trains on from them
    assert code == 0 and "lif branches, depthwise, AZO with RCR 10, RTR 4" in out, err


def test_the_same_command_on_a_finished_run_evaluates_it_again(script, gesture_data, tmp_path):
    command = ["dvs128", *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path, "--epochs", 1]
    assert script(*command)[0] == 0
    before = (tmp_path / "last.pt").read_bytes(), rows(tmp_path)
    code, out, err = script(*command)
    assert code == 0 and "epoch 1/1" not in out, err
    assert ((tmp_path / "last.pt").read_bytes(), rows(tmp_path)) == before


def test_published_spellings_are_kept(script, gesture_data, tmp_path):
    code, _, err = script(
        "dvs128", *SMALL, "--data-dir", gesture_data, "-N", 1, "--learning-rate", "0.01", "--decay", "7",
        "--weight-decay", "0.1",
        "--model-output-dir", tmp_path / "out", "--log-dir", tmp_path / "log", "--local_rank", 0, "--no-AZO",
    )  # fmt: skip
    assert code == 0, err
    args = json.loads((tmp_path / "out/args.json").read_text())["args"]
    assert (args["epochs"], args["lr"], args["decay"], args["weight_decay"], args["AZO"]) == (1, 0.01, 7, 0.1, False)
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))


def test_training_can_start_from_weights(script, gesture_data, tmp_path):
    torch.manual_seed(3)
    start = sma_vgg8_dvs128(T=4, width=0.125, AZO=False)
    torch.save({"net": {"module." + k: v for k, v in start.state_dict().items()}}, tmp_path / "start.pth")
    code, _, err = script(
        "dvs128", *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path / "out", "--epochs", 1, "--lr", "1e-12",
        "--weights", tmp_path / "start.pth",
    )  # fmt: skip
    assert code == 0, err
    trained = sma_vgg8_dvs128(T=4, width=0.125)
    load_weights(trained, tmp_path / "out/last.pt")
    for a, b in zip(trained.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


# A user's mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data-dir", "nowhere"], "DVS128 Gesture is not in --data-dir nowhere; download DvsGesture.tar.gz"),
        (["--data-dir", "empty"], "DVS128 Gesture is not in --data-dir empty; download DvsGesture.tar.gz"),
        (["--batch-size", "0"], "argument -b/--batch-size: '0' must be a whole number from 1 to 1000000"),
        (
            ["--batch-size", "100"],
            "--batch-size: a step takes 100 training samples (100 for each of 1 process(es)) and there are 22",
        ),
        (["--lr", "nan"], "argument --lr/--learning-rate: 'nan' must be a number above 0 and at most 1e+06"),
        (["--lr", "0"], "argument --lr/--learning-rate: '0' must be a number above 0 and at most 1e+06"),
        (["--decay", "1e-3"], "argument --decay: '1e-3' must be a whole number from 1 to 1000000"),
        (["--weight-decay", "-1"], "argument --weight-decay: '-1' must be a number from 0 to 1e+06"),
        (["-T", "0"], "argument -T/--timesteps: '0' must be a whole number from 1 to 1000"),
        (["-T", "2"], "T_reduction=4 leaves no unit for time=2; use 1 to 2"),
        (["--RTR", "5"], "RTR=5 leaves AZO no step of time=4; use 1 to 4"),
        (["--RTR", "0"], "argument --RTR: '0' must be a whole number from 1 to 1000000"),
        (["--RCR", "99"], "RCR=99 leaves AZO no channel of channel=16; use 1 to 16"),
        (["--sma-blocks", "6"], "argument --sma-blocks: '6' must be a whole number from 1 to 5"),
        (["--width", "1000"], "width=1000.0 must be above 0 and at most 16"),
        (["--width", "0.01"], "C_reduction=4 leaves no unit for channel=1"),
        (["--frame-size", "16"], "argument --frame-size: '16' must be N or HxW in whole pixels from 32 to 4096"),
        (["--device", "tpu9"], "--device 'tpu9' is unknown; use cpu, cuda or cuda:N"),
        (["--backend", "cupy"], "--backend cupy cannot be used"),
        (["--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--eval-amp", "fp16"], "--eval-amp fp16 needs a GPU"),
        (["--demo"], "--demo makes its own data; leave out either --demo or --data-dir"),
        (["--evaluate"], "--evaluate needs --weights FILE"),
        (["--resume", "nothing.pt"], "--resume: nothing.pt does not exist; give auto, never or a checkpoint of a run"),
        (["--weights", "page.pth"], "file page.pth is a web page, not weights"),
        (["--weights", "cut.pth"], "file cut.pth is damaged or is no weights file"),
        (["--weights", "T5.pth"], "--timesteps 4 does not fit weights file T5.pth, which was trained with 5"),
        (
            ["--weights", "classes.pth"],
            "has 11 classes and the network 12; give the data that the weights were trained on",
        ),
        (["--weights", "foreign.pth"], "these are not the weights of an SMA-VGG8; the names begin with weight, bias"),
        (["--output-dir", "file"], "--output-dir file cannot be used: file is a file"),
        (["--epochs", "1.5"], "argument -N/--epochs/--epoch: '1.5' must be a whole number from 1 to 1000000"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, script, gesture_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    for name, changes in {"T5": {"T": 5}, "classes": {"num_classes": 12}}.items():
        torch.save(sma_vgg8_dvs128(**{"T": 4, "width": 0.125, **changes}).state_dict(), f"{name}.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "T5.pth").read_bytes()[:9999])
    torch.save(torch.nn.Linear(1, 1).state_dict(), "foreign.pth")
    before = sorted(path.name for path in tmp_path.iterdir())

    common = [*SMALL, "--data-dir", gesture_data, "--RTR", "2"]
    code, _, err = script("dvs128", *common, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("vgg8_dvs128_SMA.py: error: "), err
    assert sentence in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing was written


def test_a_run_of_another_recipe_is_not_written_over(script, gesture_data, tmp_path):
    command = ["dvs128", *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path, "--epochs", 1]
    assert script(*command)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = script(*command, "--lr", "0.5", "--no-AZO")
    assert code == 2 and "AZO is True there and False here; lr is 0.0001 there and 0.5 here" in err
    assert script(*command, "--resume", "never")[0] == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_full_disk_is_one_sentence(script, gesture_data, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.logger.RunLog._chart", full)
    code, _, err = script("dvs128", *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path, "--epochs", 1)
    assert code == 2 and "Traceback" not in err
    assert f"the log in --output-dir {tmp_path} cannot be written: No space left on device; make room" in err


def test_a_damaged_frame_file_is_named_by_a_loader_process(script, gesture_data, tmp_path):
    assert script("dvs128", *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path / "a", "--epochs", 1)[0] == 0
    for part in ("frames_number_4_split_by_number", "packed_T4_128x128_to_32x32"):
        shutil.copytree(gesture_data / part, tmp_path / "d" / part)
    arguments = ["--data-dir", tmp_path / "d", "--output-dir", tmp_path / "b", "--epochs", 1, "--num-workers", 2]
    (packed,) = (tmp_path / "d").glob("packed_*/*_train.b2nd")
    content = bytearray(packed.read_bytes())
    behind_samples = int.from_bytes(content[-40:-32], "little") + 40
    content[-behind_samples - 3] ^= 1  # in the last sample
    packed.write_bytes(content)
    code, _, err = script("dvs128", *SMALL, *arguments)
    lines = [line for line in err.splitlines() if line]
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"vgg8_dvs128_SMA.py: error: packed frames {packed} are damaged (checksum of sample 21)")


def test_training_on_bad_files_lists_them_all_or_leaves_them_out(script, gesture_data, tmp_path):
    assert script("dvs128", *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path / "a", "--epochs", 1)[0] == 0
    shutil.copytree(gesture_data / "frames_number_4_split_by_number", tmp_path / "d/frames_number_4_split_by_number")
    broken = [
        tmp_path / f"d/frames_number_4_split_by_number/{name}.npz" for name in ("train/5/user01_0", "test/7/user24_0")
    ]
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    np.savez(broken[1], frames=np.full((4, 2, 128, 128), np.nan))
    command = ["dvs128", *SMALL, "--data-dir", tmp_path / "d", "--output-dir", tmp_path / "b", "--epochs", 1]
    code, _, err = script(*command)
    assert code == 2 and "error: 2 bad files" in err
    assert f"\n  {broken[0]}: cannot be read" in err and f"\n  {broken[1]}: holds NaN" in err
    assert not (tmp_path / "b").exists()
    code, out, err = script(*command, "--on-bad-sample", "skip", "--num-workers", 0)
    assert code == 0 and "left out: 2 bad files" in out and "21 training, 10 test" in out, err
    split = (tmp_path / "b/split.txt").read_text()
    assert "train,5/user01_1," in split and "5/user01_0" not in split
    fingerprint = re.search("fingerprint ([0-9a-f]{8})", split)[1]
    (header,) = (line for line in out.splitlines() if line.startswith("split:"))
    (final,) = (line for line in out.splitlines() if line.startswith("final epoch"))
    assert header.endswith(f"fingerprint {fingerprint}") and final.endswith(f"split {fingerprint}")
    code, _, err = script("dvs128", *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path / "b", "--epochs", 1)
    assert code == 2 and "have changed: test,7/user24_0 is new, train,5/user01_0 is new; restore them" in err


def test_a_run_that_is_stopped_inside_an_epoch_continues_to_the_bit(script, gesture_data, tmp_path):
    command = ["dvs128", *SMALL, "--data-dir", gesture_data, "--epochs", 2]
    steps = itertools.count(1)

    def stop(*_):
        if next(steps) == 7:  # of 5 an epoch; the run stops after the next one
            os.kill(os.getpid(), signal.SIGINT)

    handle = register_optimizer_step_post_hook(stop)
    try:
        code, _, err = script(*command, "--output-dir", tmp_path / "stopped")
    finally:
        handle.remove()
    assert code == 130 and "stopped by SIGINT; every step is saved" in err
    code, out, err = script(*command, "--output-dir", tmp_path / "stopped")
    assert code == 0 and "continuing after epoch 1, step 3 of the next" in out, err
    assert script(*command, "--output-dir", tmp_path / "whole")[0] == 0
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "stopped/last.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "stopped")


# Real processes -----------------------------------------------------------------------------------------------------


def test_one_two_and_three_processes_evaluate_to_the_same_counts(launch, gesture_data, tmp_path):
    torch.manual_seed(0)
    torch.save(sma_vgg8_dvs128(T=4, width=0.125).state_dict(), tmp_path / "w.pth")
    results = []
    for count in (1, 2, 3):
        output = tmp_path / str(count)
        arguments = ["--data-dir", gesture_data, "--output-dir", output, "--frame-size", 32, "--device", "cpu"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count] if count > 1 else []
        done = launch(
            [*launcher, SCRIPTS["dvs128"], "--evaluate", "--weights", tmp_path / "w.pth", *arguments, "-b", 5]
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads((output / "evaluation.json").read_text()))
    assert len({(r["correct"], r["count"]) for r in results}) == 1 and results[0]["count"] == 11
    for result in results[1:]:
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run", "--standalone"], ["torch.distributed.launch", "--master_port=29517"]],
    ids=["torchrun", "launch"],
)  # fmt: skip
def test_two_processes_train_one_run(launcher, launch, gesture_data, tmp_path):
    command = ["-m", *launcher, "--nproc_per_node=2", SCRIPTS["dvs128"], *SMALL, "--data-dir", gesture_data]
    done = launch([*command, "--output-dir", tmp_path, "--epochs", 1])
    assert done.returncode == 0, done.stderr
    assert "2 on CPU" in done.stdout and "4 per process, 8 global" in done.stdout
    assert done.stdout.count("epoch 1/1") == 1
    assert len(rows(tmp_path)) == 1
    assert json.loads((tmp_path / "evaluation.json").read_text())["count"] == 11


@pytest.mark.slow
def test_ctrl_c_ends_with_a_sentence(gesture_data, tmp_path):
    command = [sys.executable, SCRIPTS["dvs128"], *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and this test may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT; every step is saved" in err and "Traceback" not in err


def test_the_factories_are_the_recipes():
    for factory, T, classes, RCR in (
        (sma_vgg8_dvs128, 16, 11, 10), (sma_vgg8_cifar10dvs, 10, 10, 4), (sma_vgg8_ncaltech101, 14, 101, 24),
    ):  # fmt: skip
        net = factory()
        sma = net.block2[1]
        assert (net.T, net.num_classes, sma.RCR, sma.RTR, sma.AZO) == (T, classes, RCR, 4, True)
        assert net.sma_blocks == (2, 3)
