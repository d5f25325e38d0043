"""train_amp.py as a user runs it: files, flags, data folders, bad images, processes, mistakes."""

import argparse
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from models import ms_resnet18, sma_ms_resnet18, sma_ms_resnet34
from tests.conftest import SCRIPTS, parse, rows, same_weights
from train_amp import SETTINGS
from utils.checkpoint import load_weights
from utils.errors import UserError
from utils.image_args import batch_of_process
from utils.networks import settings_of_weights

# The smallest network and input that the script takes.
SMALL = [
    "-T", "2", "--width", "0.0625", "--image-size", "32", "--device", "cpu", "--num-workers", "0", "-b", "6",
]  # fmt: skip
CLASSES = ("n01440764", "n01443537", "n02102040")


def write_image(path, seed, mode="RGB", size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_images(root, train=6, test=3):
    for label, name in enumerate(CLASSES):
        for number in range(train):
            write_image(root / f"train/{name}/{name}_{number}.JPEG", 100 * label + number)
        for number in range(test):
            write_image(root / f"val/{name}/ILSVRC2012_val_{label}{number}.JPEG", 100 * label + 50 + number)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes, 18 training and 9 test images."""
    return write_images(tmp_path_factory.mktemp("images"))


def test_a_run_writes_everything_that_is_promised_and_its_weights_evaluate(script, images, tmp_path):
    output = tmp_path / "run"
    command = ["-net", "resnet18", "-lr", 0.05, "--data-dir", images, "--output-dir", output, "--epochs", 2, "--AZO"]
    code, out, err = script("imagenet", *SMALL, *command)
    assert code == 0, err
    header = ("data:", "samples:", "input:", "network:", "neurons:", "precision:", "batch:", "versions:", "deviations:")
    assert all(any(line.startswith(fact) for line in out.splitlines()) for fact in header)
    assert "(not all of ImageNet-1K)" in out and "18 training, 9 test" in out
    assert "batch_size 6 instead of 256" in out and "lr 0.05 instead of 0.1" in out and "AZO on instead of off" in out
    assert re.search(
        r"^epoch 2/2  train .* test \d+\.\d\d % top5 100\.00 % loss", out, re.MULTILINE
    )  # three classes: always among the first five

    with (output / "metrics.csv").open() as file:
        assert file.readline().strip() == "epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds"
    assert [row["epoch"] for row in rows(output)] == ["1", "2"]
    assert json.loads((output / "args.json").read_text())["args"]["net"] == "resnet18"
    assert list(output.glob("events.out.tfevents.*"))
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert (evaluation["count"], evaluation["correct5"], evaluation["acc5"]) == (9, 9, 100.0)
    assert evaluation["acc1"] == 100 * evaluation["correct"] / 9
    weights = torch.load(output / "last.pt", weights_only=True)["model"]
    assert list(weights) == list(ms_resnet18(T=2, width=0.0625, num_classes=3, sma_blocks="first-two").state_dict())

    # No other flag than the data: depth, T, width, blocks and the image size are told from the file.
    again = tmp_path / "evaluated"
    arguments = ["--evaluate", "--weights", output / "last.pt", "--data-dir", images, "--output-dir", again]
    code, out, err = script("imagenet", *arguments, "--device", "cpu", "--batch-size", 4)
    assert code == 0, err
    assert "T = 2, 32x32 pixels" in out
    assert re.search(r"^AZO: +training only$", out, re.MULTILINE) and re.search(
        r"^epoch: +2 of 2, the final", out, re.M
    )
    repeated = json.loads((again / "evaluation.json").read_text())
    assert [repeated[k] for k in ("correct", "correct5", "count")] == [
        evaluation[k] for k in ("correct", "correct5", "count")
    ]
    assert repeated["loss"] == pytest.approx(evaluation["loss"], rel=1e-6)
    assert not (again / "last.pt").exists()


def test_a_run_without_sma_evaluates_without_further_flags(script, images, tmp_path):
    command = ["--sma-blocks", "none", "--data-dir", images, "--epochs", 1, "--output-dir", tmp_path / "a"]
    assert script("imagenet", *SMALL, *command)[0] == 0
    reported = json.loads((tmp_path / "a/evaluation.json").read_text())
    arguments = ["--evaluate", "--weights", tmp_path / "a/last.pt", "--data-dir", images, "--device", "cpu", "-b", 9]
    code, out, err = script("imagenet", *arguments, "--output-dir", tmp_path / "b")
    assert code == 0, err
    assert "T = 2" in out and "SMA in blocks none" in out
    repeated = json.loads((tmp_path / "b/evaluation.json").read_text())
    assert repeated["correct"] == reported["correct"]
    assert repeated["loss"] == pytest.approx(reported["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("factory", "net", "places"),
    [
        (sma_ms_resnet18, "resnet18", {"none": "none", "first-two": None, "all": None}),
        (sma_ms_resnet34, "resnet34", {"none": "none", "first-two": "first-two", "all": "all"}),
    ],
)
def test_the_network_is_inferred_from_its_weights(factory, net, places):
    for given, found in places.items():
        weights = factory(T=4, width=0.125, num_classes=7, sma_blocks=given).state_dict()
        expected = {"num_classes": 7, "width": 0.125, "net": net}
        expected |= {"sma_blocks": found} if found else {}  # in ResNet-18 first-two and all are the same network
        expected |= {"timesteps": 4, "branch_groups": 1} if given != "none" else {}
        assert settings_of_weights(weights) == settings_of_weights(weights, "ms_resnet") == expected
    depthwise = factory(T=4, width=0.125, branch_groups="channel").state_dict()
    assert settings_of_weights(depthwise)["branch_groups"] == "channel"


def test_evaluation_needs_no_training_images(script, images, tmp_path):
    shutil.copytree(images / "val", tmp_path / "d/test")
    torch.manual_seed(0)
    torch.save(sma_ms_resnet18(T=2, width=0.0625, num_classes=3).state_dict(), tmp_path / "w.pth")
    counts = []
    for data in (images, tmp_path / "d"):
        arguments = ["--evaluate", "--weights", tmp_path / "w.pth", "--data-dir", data, "--output-dir", tmp_path / "o"]
        code, _, err = script("imagenet", *arguments, "--image-size", 32, "--device", "cpu", "-b", 9)
        assert code == 0, err
        counts.append(json.loads((tmp_path / "o/evaluation.json").read_text())["correct"])
    assert counts[0] == counts[1]


def test_every_option_at_once_trains_and_continues_bit_exactly(launch, images, tmp_path):
    """EMA, Mixup, micro-batches, warm-up, channels-last, AZO: stopped after two epochs of four, then continued."""
    options = ["--ema", 0.5, "--mixup", "--micro-batches", 2, "--warm-up", 1, "--channels-last", "--AZO", "-b", 12]
    command = [SCRIPTS["imagenet"], *SMALL, "--data-dir", images, *options, "--epochs", 4]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = launch([*command, "--output-dir", whole])
    assert done.returncode == 0, done.stderr
    assert "12 per process, 12 global, in 2 parts" in done.stdout
    assert "options:     mixup, channels last, EMA 0.5" in done.stdout
    assert [float(row["lr"]) for row in rows(whole)] == pytest.approx([0.05, 0.075, 0.025, 0])

    stop_after_two = (
        "import sys, runpy; from utils.checkpoint import Checkpoints as C; save = C.save\n"
        "def stopping(self, epoch, acc1):\n    save(self, epoch, acc1)\n    if epoch == 2: raise KeyboardInterrupt\n"
        "C.save = stopping; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert launch(["-c", stop_after_two, *command, "--output-dir", stopped]).returncode == 130
    assert len(rows(stopped)) == 2
    done = launch([*command, "--output-dir", stopped])
    assert done.returncode == 0, done.stderr
    assert same_weights(whole / "last.pt", stopped / "last.pt")
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (whole, stopped)]
    assert all(torch.equal(states[0]["trained"][k], v) for k, v in states[1]["trained"].items())
    assert not torch.equal(states[0]["trained"]["fc.weight"], states[0]["model"]["fc.weight"])  # the average is another
    assert rows(stopped) == rows(whole)


def test_a_batch_of_more_images_than_there_are_is_a_smaller_one_as_published(script, images, tmp_path):
    code, out, err = script("imagenet", *SMALL, "--data-dir", images, "-b", 19, "-N", 1, "--output-dir", tmp_path)
    assert code == 0 and "19 per process, 19 global" in out and len(rows(tmp_path)) == 1, err


def test_the_averaged_weights_are_those_that_are_reported(script, images, tmp_path):
    command = ["--data-dir", images, "--ema", 0.9, "--epochs", 1, "--output-dir", tmp_path / "a"]
    assert script("imagenet", *SMALL, *command)[0] == 0
    reported = json.loads((tmp_path / "a/evaluation.json").read_text())
    arguments = ["--evaluate", "--weights", tmp_path / "a/last.pt", "--data-dir", images, "--device", "cpu", "-b", 9]
    assert script("imagenet", *arguments, "--output-dir", tmp_path / "b")[0] == 0
    repeated = json.loads((tmp_path / "b/evaluation.json").read_text())
    assert repeated["correct"] == reported["correct"]
    assert repeated["loss"] == pytest.approx(reported["loss"], rel=1e-6)


def test_fine_tuning_from_weights_with_another_rate_decay_and_length(script, images, tmp_path):
    torch.manual_seed(3)
    start = sma_ms_resnet18(T=2, width=0.0625, num_classes=3)
    torch.save({"state_dict": {"module." + k: v for k, v in start.state_dict().items()}}, tmp_path / "start.pth")
    # No -net, -T, --width: the file tells them.
    code, out, err = script(
        "imagenet", "--data-dir", images, "--weights", tmp_path / "start.pth", "--AZO", "--epochs", 1, "-lr", "1e-12",
        "--weight-decay", "1e-5", "--image-size", 32, "-b", 6, "--device", "cpu", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "weight_decay 1e-05 instead of 0.0001" in out and "AZO with RCR 4, RTR 2" in out
    trained = sma_ms_resnet18(T=2, width=0.0625, num_classes=3)
    load_weights(trained, tmp_path / "out/last.pt")
    for a, b in zip(trained.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("net", ["resnet34", "resnet104"])
def test_the_deeper_networks_train(net, script, images, tmp_path):
    command = ["-net", net, "--data-dir", images, "--epochs", 1, "--output-dir", tmp_path, "--sma-blocks", "first-two"]
    code, out, err = script("imagenet", *SMALL, *command)
    assert code == 0, err
    assert f"SMA-MS-ResNet-{net[6:]}" in out
    code, out, err = script(
        "imagenet", "--evaluate", "--weights", tmp_path / "last.pt", "--data-dir", images, "-b", 9, "--device", "cpu",
        "--output-dir", tmp_path / "e",
    )  # fmt: skip
    assert code == 0 and f"SMA-MS-ResNet-{net[6:]}" in out, err


# Images -------------------------------------------------------------------------------------------------------------


def test_an_unreadable_training_image_stops_or_is_left_out_by_name(script, images, tmp_path):
    data = tmp_path / "d"
    shutil.copytree(images, data)
    cut = data / f"train/{CLASSES[1]}/{CLASSES[1]}_2.JPEG"
    cut.write_bytes(cut.read_bytes()[:400])
    page = data / f"train/{CLASSES[0]}/{CLASSES[0]}_0.JPEG"
    page.write_text("<html>")
    command = ["--data-dir", data, "--epochs", 1, "-b", 18]
    code, _, err = script("imagenet", *SMALL, *command, "--output-dir", tmp_path / "a", "--num-workers", 2)
    lines = [line for line in err.splitlines() if line]
    assert code == 2 and len(lines) == 1
    assert re.match(rf"train_amp.py: error: image ({cut}|{page}) cannot be read \(", lines[0])

    code, _, err = script("imagenet", *SMALL, *command, "--on-bad-image", "skip", "--output-dir", tmp_path / "b")
    assert code == 0, err
    lines = sorted(line for line in err.splitlines() if line.startswith("image "))
    assert [line.split()[1] for line in lines] == sorted([str(cut), str(page)])
    assert {line.rsplit("; ", 1)[1] for line in lines} == {"left out, 1 so far", "left out, 2 so far"}


def test_an_unreadable_test_image_always_stops(script, images, tmp_path):
    data = tmp_path / "d"
    shutil.copytree(images, data)
    bad = data / f"val/{CLASSES[2]}/ILSVRC2012_val_20.JPEG"
    bad.write_bytes(b"")
    command = ["--data-dir", data, "--epochs", 1, "--on-bad-image", "skip", "--output-dir", tmp_path / "a"]
    code, _, err = script("imagenet", *SMALL, *command)
    assert code == 2 and f"image {bad} cannot be read" in err


# A user's mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-net", "resnet50"], "argument -net/--net: invalid choice: 'resnet50'"),
        (["--data-dir", "nowhere"], "--data-dir nowhere does not exist; tools/prepare_imagenet.py makes it"),
        (["--data-dir", "empty"], "--data-dir empty has no folder test/ or val/ with one folder a class"),
        (["--data-dir", "no_train"], "--data-dir no_train has no folder train/"),
        (["--data-dir", "hollow"], f"class folder hollow/train/{CLASSES[1]} has no images"),
        (["--data-dir", "missing"], f"class {CLASSES[0]} of missing/train is not in missing/val"),
        (["--data-dir", "extra"], "class n99999999 of extra/val is not in extra/train"),
        (["--data-dir", "both"], "--data-dir both has class folders in both test/ and val/"),
        (["-b", "0"], "argument -b/--batch-size: '0' must be a whole number from 1 to 1000000"),
        (
            ["--micro-batches", "4"],
            "--batch-size 6 cannot be shared out evenly to 1 process(es) in 4 parts; use 4 or 8",
        ),
        (["--micro-batches", "7"], "use at least 7"),
        (["-lr", "nan"], "argument -lr/--lr/--learning-rate: 'nan' must be a number above 0 and at most 1e+06"),
        (["--image-size", "16"], "argument --image-size: '16' must be a whole number from 32 to 4096"),
        (["--ema", "1.5"], "argument --ema: '1.5' must be a number of at least 0 and below 1"),
        (["--warm-up", "200"], "--warm-up 200 must be less than the 200 epochs"),
        (["-gpu"], "-gpu asks for a GPU and --device cpu for none"),
        (["--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["-T", "1"], "T_reduction=1.5 leaves no unit for time=1"),
        (["--AZO", "--RTR", "3"], "RTR=3 leaves AZO no step of time=2; use 1 to 2"),
        (["--demo"], "--demo makes its own data"),
        (["--evaluate"], "--evaluate needs --weights FILE"),
        (["--weights", "T4.pth"], "--timesteps 2 does not fit weights file T4.pth, which was trained with 4"),
        (
            ["--weights", "w.pth", "-net", "resnet34"],
            "-net resnet34 does not fit weights file w.pth, which was trained",
        ),
        (["--weights", "classes.pth"], "2 of another shape: fc.weight [7, 32] instead of [3, 32]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, script, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    folder = next((a for a in arguments if a in ("no_train", "hollow", "missing", "extra", "both")), None)
    if folder:
        shutil.copytree(images, folder)
        changed = {"no_train": "train", "hollow": f"train/{CLASSES[1]}", "missing": f"val/{CLASSES[0]}"}
        if folder in changed:
            shutil.rmtree(tmp_path / folder / changed[folder])
        if folder == "hollow":
            (tmp_path / f"hollow/train/{CLASSES[1]}/.ipynb_checkpoints").mkdir(parents=True)
        if folder == "extra":
            write_image(tmp_path / "extra/val/n99999999/a.JPEG", 1)
        if folder == "both":
            shutil.copytree("both/val", "both/test")
    for name, changes in {"T4": {"T": 4}, "classes": {"num_classes": 7}, "w": {}}.items():
        net = sma_ms_resnet18(**{"T": 2, "width": 0.0625, "num_classes": 3, **changes})
        torch.save(net.state_dict(), f"{name}.pth")
    before = sorted(path.name for path in tmp_path.iterdir())

    code, _, err = script("imagenet", *SMALL, "--data-dir", images, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("train_amp.py: error: "), err
    assert sentence in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing was written


def test_the_published_spellings_are_kept(images, monkeypatch):
    args = parse("imagenet", "-net", "resnet18", "-b", 384, "-lr", 0.1, "--local-rank=3")
    assert (args.net, args.batch_size, args.lr, args.local_rank) == ("resnet18", 384, 0.1, 3)
    assert (args.timesteps, args.epochs, args.weight_decay, args.label_smoothing, args.seed) == (6, 200, 1e-4, 0.1, 445)
    assert (args.AZO, args.RCR, args.RTR, args.sma_blocks, args.mixup) == (False, 4, 2, "first-two", False)
    assert (args.image_size, args.test_crop) == (224, None)
    assert set(SETTINGS.deviations(args)) <= {"batch_size", "amp"}  # fp16 where there is a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse("imagenet", "-gpu").device == "cuda"


def test_the_global_batch_is_shared_out_evenly_in_training_only():
    def args(**changes):
        return argparse.Namespace(**{"batch_size": 384, "micro_batches": 1, "evaluate": False, **changes})

    assert batch_of_process(args(), 6) == 64
    assert batch_of_process(args(micro_batches=4), 6) == 64
    assert batch_of_process(args(batch_size=256, evaluate=True), 6) == 42
    assert batch_of_process(args(batch_size=2, evaluate=True), 6) == 1
    with pytest.raises(
        UserError, match=r"--batch-size 256 cannot be shared out evenly to 6 process\(es\); use 252 or 258"
    ):
        batch_of_process(args(batch_size=256), 6)


# Real processes -----------------------------------------------------------------------------------------------------


def test_one_and_two_processes_evaluate_to_the_same_counts(launch, images, tmp_path):
    torch.manual_seed(0)
    torch.save(sma_ms_resnet18(T=2, width=0.0625, num_classes=3).state_dict(), tmp_path / "w.pth")
    results = []
    for count in (1, 2):
        output = tmp_path / str(count)
        arguments = ["--data-dir", images, "--output-dir", output, "--image-size", 32, "--device", "cpu", "-b", 4]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count] if count > 1 else []
        done = launch([*launcher, SCRIPTS["imagenet"], "--evaluate", "--weights", tmp_path / "w.pth", *arguments])
        assert done.returncode == 0, done.stderr
        results.append(json.loads((output / "evaluation.json").read_text()))
    assert results[0]["count"] == 9
    assert all(results[0][k] == results[1][k] for k in ("correct", "correct5", "count"))
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


def test_the_published_command_trains_one_run_in_two_processes(launch, images, tmp_path):
    launcher = ["-m", "torch.distributed.launch", "--master_port=29518", "--nproc_per_node=2"]
    command = [*launcher, SCRIPTS["imagenet"], "-net", "resnet18", *SMALL, "-lr", 0.1, "--data-dir", images]
    done = launch([*command, "--output-dir", tmp_path, "--epochs", 1, "--micro-batches", 3])
    assert done.returncode == 0, done.stderr
    assert "2 on CPU" in done.stdout and "3 per process, 6 global, in 3 parts" in done.stdout
    assert done.stdout.count("epoch 1/1") == 1 and len(rows(tmp_path)) == 1
    assert json.loads((tmp_path / "evaluation.json").read_text())["count"] == 9


def test_a_batch_smaller_than_the_number_of_processes_is_one_sentence(launch, images, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = launch([*launcher, SCRIPTS["imagenet"], *SMALL, "-b", 1, "--data-dir", images, "--output-dir", tmp_path])
    sentences = [line for line in done.stderr.splitlines() if "train_amp.py: error:" in line]
    assert done.returncode != 0 and len(sentences) == 1
    assert "--batch-size 1 cannot be shared out evenly to 2 process(es); use at least 2" in sentences[0]
