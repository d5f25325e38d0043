"""The settings of the scripts: a table gives parser, help, recipe and deviations; limits; what a weights file says."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import sma_ms_resnet18, sma_vgg8_dvs128
from tests.conftest import SCRIPTS, load_script, parse
from utils.args import words
from utils.errors import UserError
from utils.logger import print_header

SETTINGS = {name: load_script(name).SETTINGS for name in SCRIPTS}
EVENTS = ["dvs128", "cifar10dvs", "ncaltech101"]

# What others call the scripts with.
PROMISED = (
    "--data-dir d --output-dir o --device cpu --amp bf16 --backend torch -b 4 -T 4 --lr 0.1 --epochs 3 --num-workers 0 "
    "--seed 1 --resume never --AZO --RCR 2 --RTR 2 --local-rank 0 --width 0.5 --keep-every 2"
)
PROMISED_OF = dict.fromkeys(EVENTS, (
    "-N 3 --decay 7 --learning-rate 0.1 --model-output-dir o --log-dir l --local_rank 0 --epoch 3 --timesteps 4 "
    "--batch-size 4 --sma-blocks none --sensor-size 34x34 --frame-size 48 --no-AZO --amp off --backend cupy "
    "--resume auto"
)) | {
    "imagenet": "-net resnet34 -b 4 -lr 0.1 --image-size 48 --sma-blocks none --warm-up 1 --amp off --backend auto"
}  # fmt: skip
GONE = {
    "--accumulate": "--micro-batches", "--checkpoint-activations": "--recompute", "--on-nan": "--lr",
    "--nan-limit": "--on-nan", "--keep-frames": "packed frames", "--branch-groups": "SMA(groups='channel')",
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_promised_flag_is_taken(name):
    args = parse(name, *PROMISED.split(), *PROMISED_OF[name].split())
    assert (args.batch_size, args.timesteps, args.lr, args.epochs, args.seed, args.RCR, args.RTR) == (
        4,
        4,
        0.1,
        3,
        1,
        2,
        2,
    )
    assert (str(args.data_dir), str(args.output_dir), args.device, args.local_rank) == ("d", "o", "cpu", 0)
    assert (args.width, args.keep_every, args.num_workers, args.amp) == (0.5, 2, 0, "off")
    if name == "imagenet":
        assert (args.net, args.image_size, args.sma_blocks, args.warm_up, args.AZO) == ("resnet34", 48, "none", 1, True)
    else:
        assert (args.decay, str(args.log_dir), args.sma_blocks, args.AZO) == (7, "l", [], False)
        assert (args.sensor_size, args.frame_size) == ([34, 34], [48, 48])
    assert parse(name, "--demo").demo and parse(name).resume == "auto" and not parse(name).evaluate


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flag_that_is_gone_says_in_one_sentence_what_to_use(name, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = GONE | ({"--decay": "--weight-decay"} if name == "imagenet" else {})
    for flag, new in gone.items():
        for words_ in ([flag], [flag, "2"], [f"{flag}=1e-4"]):
            code, _, err = script(name, *words_)
            assert code == 2 and f"error: {flag} is " in err and new in err and len(err.splitlines()) == 1, err
        assert flag not in SETTINGS[name].parser("").format_help()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_has_every_flag_and_its_default(name):
    table = SETTINGS[name]
    text = " ".join(table.parser("").format_help().split())
    for one in table.table:
        for flag in one.flags.split():
            assert flag in text or not flag.startswith("-")
        if one.flags.startswith("-") and one.shown is None and table.published[one.name] is not None:
            assert f"{one.help} (default: {words(table.published[one.name])})" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_recipe_has_no_deviation_and_is_plain_values(name):
    table, args = SETTINGS[name], parse(name)
    assert set(table.deviations(args)) <= {"amp"}  # fp16 where there is a GPU
    recipe = table.recipe_of(args)
    assert json.loads(json.dumps(recipe)) == recipe
    assert {key: recipe[key] for key in table.recipe} == table.recipe
    assert not {"data_dir", "output_dir", "num_workers", "device", "resume", "backend", "keep_every"} & recipe.keys()


CHANGES = {  # one change of each kind of setting: the command line, the name, what the header says
    "dvs128": [("--lr 0.5", "lr", "lr 0.5 instead of 0.0001"), ("--no-AZO", "AZO", "AZO off instead of on"),
               ("--sma-blocks", "sma_blocks", "sma_blocks none instead of 2 3"),
               ("--frame-size 48", "frame_size", "frame_size 48 48 instead of unset"),
               ("--decay 7", "decay", "decay 7 instead of 200"),
               ("--micro-batches 3", "micro_batches", "micro_batches 3 instead of 1")],
    "cifar10dvs": [("--no-flip", "flip", "flip off instead of on"),
                   ("--split first90", "split", "split first90 instead of random"),
                   ("--split-seed 1", "split_seed", "split_seed 1 instead of 3404")],
    "ncaltech101": [("--momentum-decay 0", "momentum_decay", "momentum_decay 0 instead of 0.001"),
                    ("--branch-activation relu", "branch_activation", "branch_activation relu instead of lif")],
    "imagenet": [("--mixup", "mixup", "mixup on instead of off"), ("--ema 0.5", "ema", "ema 0.5 instead of 0"),
                 ("--label-smoothing 0", "label_smoothing", "label_smoothing 0 instead of 0.1"),
                 ("--test-crop 288", "test_crop", "test_crop 288 instead of unset")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in CHANGES for change in CHANGES[name]])
def test_a_change_is_in_the_recipe_the_deviations_and_the_header(name, change, capsys):
    arguments, key, line = change
    table, args = SETTINGS[name], parse(name, *arguments.split())
    deviations = table.deviations(args)
    assert set(deviations) - {"amp"} == {key}
    assert table.recipe_of(args)[key] == deviations[key][1] != table.recipe_of(parse(name))[key]
    print_header({}, deviations)
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_evaluation_deviates_in_data_and_network_only(name, tmp_path):
    net = (sma_ms_resnet18 if name == "imagenet" else sma_vgg8_dvs128)(T=4, width=0.125)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    args = parse(
        name, "--evaluate", "--weights", tmp_path / "w.pt", "--lr", 9, "-b", 3, "--seed", 1, "--eval-amp", "bf16"
    )
    assert set(SETTINGS[name].deviations(args)) == {"timesteps", "width", "eval_amp"}


# Limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("dvs128", ["--seed", str(2**62 + 1)], f"--seed: '{2**62 + 1}' must be a whole number from 0 to {2**62}"),
        ("imagenet", ["--seed", "-1"], "--seed: '-1' must be a whole number from 0 to"),
        ("cifar10dvs", ["--seed=--"], "argument --seed=--: '--' is no value"),
        ("imagenet", ["-b--"], "argument -b--: '--' is no value"),
        ("dvs128", ["--num-workers", "1" + "0" * 23], "must be a whole number from 0 to 1024"),
        (
            "imagenet",
            ["--label-smoothing", "1.5"],
            "--label-smoothing: '1.5' must be a number of at least 0 and below 1",
        ),
        ("imagenet", ["--ema", "nan"], "--ema: 'nan' must be a number of at least 0 and below 1"),
        ("ncaltech101", ["--frame-size", "100000"], "must be N or HxW in whole pixels from 32 to 4096"),
        ("ncaltech101", ["--sensor-size", "180x"], "--sensor-size: '180x' must be N or HxW"),
        ("dvs128", ["-T", "9" * 5000], "must be a whole number from 1 to 1000"),
        ("dvs128", ["--lr", "1e400"], "--lr/--learning-rate: '1e400' must be a number above 0"),
        ("dvs128", ["--timeout", "0"], "--timeout: '0' must be a number above 0"),
        ("dvs128", ["--resume", ""], "--resume: (nothing) is no file; give auto, never or a checkpoint of a run"),
        ("imagenet", ["-net", ""], "-net/--net: invalid choice: ''"),
        ("imagenet", ["--micro"], "unrecognized arguments: --micro"),  # no abbreviations
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_value_out_of_its_range_is_one_sentence(name, arguments, sentence, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = script(name, *arguments)
    assert code == 2 and sentence in err and len(err.splitlines()) == 1 and len(err) < 300, err
    assert not list(tmp_path.iterdir())


# What a weights file says -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_weights():
    torch.manual_seed(0)
    return sma_vgg8_dvs128(T=4, width=0.0625, sma_blocks=[]).state_dict()


def test_a_value_is_that_of_the_user_then_the_file_then_the_demo_then_the_recipe(small_weights, tmp_path):
    recipe = {"timesteps": 5, "frame_size": [40, 48], "demo": True, "lr": 0.7, "split": "random"}
    torch.save({"model": small_weights, "recipe": recipe}, tmp_path / "w.pt")
    args = parse("dvs128", "--weights", tmp_path / "w.pt")
    assert (args.timesteps, args.frame_size, args.width, args.sma_blocks, args.demo) == (5, [40, 48], 0.0625, [], True)
    demo = load_script("dvs128").DEMO
    assert (args.epochs, args.lr, args.seed) == (demo["epochs"], demo["lr"], 3401)  # of the demo; of the recipe
    args = parse("dvs128", "--weights", tmp_path / "w.pt", "-T", 6, "--frame-size", 32, "--data-dir", "d", "--lr", 0.2)
    assert (args.timesteps, args.frame_size, args.demo, args.lr, args.epochs) == (6, [32, 32], False, 0.2, 200)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["first90", "tebn", "180x240", 32, [32, 32], [], [2, 3], 2**70, "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=4,
)  # fmt: skip
STORED = [one.name for one in SETTINGS["cifar10dvs"].table if one.stored]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=ANY | st.dictionaries(st.sampled_from(STORED), ANY, max_size=4))
def test_any_recipe_in_a_weights_file_is_settings_in_their_ranges_or_a_sentence(recipe, small_weights, tmp_path):
    torch.save({"model": small_weights, "recipe": recipe}, tmp_path / "w.pt")
    try:
        args = parse("cifar10dvs", "--evaluate", "--weights", tmp_path / "w.pt")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    assert 1 <= args.timesteps <= 1000 and isinstance(args.demo, bool) and isinstance(args.split, str)
    for size in (args.frame_size, args.sensor_size):
        assert size is None or (len(size) == 2 and all(type(side) is int and 1 <= side <= 4096 for side in size))
    assert type(args.split_seed) is int and args.split_seed >= 0
