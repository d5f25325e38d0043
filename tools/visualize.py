"""Pictures of data, networks and runs.

python tools/visualize.py frames --data-set dvs128 --data-dir data/dvs128 -T 16            one sample: strip, GIF
python tools/visualize.py frames --data-set dvs128 --data-dir data/dvs128 -T 16 --all      every frame as a PNG
python tools/visualize.py spikes --weights output/dvs128/last.pt                           heat maps over the input
python tools/visualize.py attention --weights output/dvs128/last.pt                        weights of SMA over T
python tools/visualize.py azo output/dvs128                                                what AZO replaced
python tools/visualize.py curves output/dvs128 output/other                                learning curves
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import SMA
from utils.analysis.attention import watch_attention
from utils.analysis.azo_record import kernel_sizes, read_azo_record
from utils.analysis.figures import draw_attention, draw_azo, draw_curves, draw_frames, draw_spikes, save
from utils.analysis.inspection import Inspected, add_inspection, load_inspected
from utils.analysis.labels import layer_labels, sma_label
from utils.analysis.predictions import sample_path
from utils.analysis.runs import read_metrics
from utils.analysis.spikes import in_grey, predict, spike_maps
from utils.args import above_zero, size, whole
from utils.data.demo import GESTURES
from utils.data.events import EventFrames, load_event_data
from utils.data.images import ImageSet
from utils.distributed import Process, start, sum_over_processes
from utils.errors import SentenceParser, UserError, exit_with_sentence
from utils.logger import check_output, progress_bar
from utils.pictures import Kind, save_as_gif, save_as_pic, save_every_frame_of_an_entire_DVS_dataset
from utils.prepare.datasets import DATA_SETS, sample_name

__all__ = ["make_parser", "mean_attention", "spike_maps"]


def find_sample(test: EventFrames | ImageSet, wanted: str) -> int:
    """The number of a test sample from its number or its name ``<class>/<sample>``.

    Raises:
        UserError: there is none.
    """
    if wanted.isdecimal() and int(wanted) < len(test):
        return int(wanted)
    names = [sample_name(sample_path(test, index)) for index in range(len(test))]
    if wanted not in names:
        raise UserError(
            f"--sample {wanted} is no test sample; give a number from 0 to {len(names) - 1} or a name, for instance "
            f"{names[0]}"
        )
    return names.index(wanted)


def show_frames(args: argparse.Namespace) -> None:
    """The frames of one sample as PNG files, a strip and a GIF; with --all, of a whole data set as PNG files."""
    if (args.data_dir is None) == (not args.demo):
        raise UserError("give either --data-dir DIR or --demo")
    demo = "_demo" if args.demo else ""
    output = args.output_dir or Path("output") / f"frames_{args.data_set}_T{args.timesteps}{demo}"
    check_output(output)
    data_dir = output / "demo_data" if args.demo else args.data_dir
    look = {"scale": args.scale, "full": args.full}
    if args.all:
        if args.demo:
            raise UserError("--all is for recordings; give their --data-dir")
        made = save_every_frame_of_an_entire_DVS_dataset(
            args.data_set, data_dir, args.timesteps, output, args.threads, sensor_size=args.sensor_size, **look
        )
        print(f"{made} pictures made, those that were there kept; all are in {output}")
        return
    kind = Kind(args.timesteps, args.scale, args.full)
    kind.check(output)
    data = load_event_data(
        args.data_set, data_dir, args.timesteps, split=args.split,
        split_seed=DATA_SETS[args.data_set].split_seed if args.split_seed is None else args.split_seed,
        sensor_size=args.sensor_size, demo=args.demo, frames="npz",
    )  # fmt: skip
    index = find_sample(data.test, args.sample)
    path, _ = data.test.files[index]
    frames = data.test[index][0].numpy()
    # This folder's name is the gesture's number (labels are ranks of sorted text: "10" < "2"), elsewhere its name.
    gesture = f" ({GESTURES[int(path.parent.name)]})" if args.demo and args.data_set == "dvs128" else ""
    folder = output / sample_name(path)
    kind.write(output)
    save_as_pic(frames, folder, path.stem, **look)
    save(draw_frames(frames, f"{sample_name(path)}{gesture}", args.full), folder / "strip.png")
    save_as_gif(frames, folder / "frames.gif", max(args.scale, 256 // frames.shape[3]), args.full)
    print(f"strip.png, frames.gif and {len(frames)} frames are in {folder}")


def show_spikes(args: argparse.Namespace) -> None:
    """Spike heat maps of one sample per layer and time step, over the input."""
    output = args.output_dir or args.weights.parent
    with start(args.device, args.local_rank) as process:
        check_output(output)
        inspected = load_inspected(args, process)
        index = find_sample(inspected.test, args.sample)
        sample, label, inputs = inspected.sample(index, process.device)
        maps = spike_maps(inspected.net, inputs, args.layers)
        T = len(next(iter(maps.values())))
        predicted = predict(inspected.net, inputs)
        labels = layer_labels(inspected.net)
        name = sample_name(sample_path(inspected.test, index))
        title = f"{name}; true: {inspected.classes[label]}, predicted: {inspected.classes[predicted]}"
        path = output / "figures" / f"spikes_{index}.png"
        labelled = {labels[name]: values for name, values in maps.items()}
        save(draw_spikes(in_grey(sample, T), labelled, title, args.over_input, args.steps), path)
        print(f"{path} shows {', '.join(maps)}")


def mean_attention(inspected: Inspected, process: Process) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The weights of every SMA over the test set: name to mean ``w_T [S, T]``, its standard deviation, mean
    ``w_C [S, T, C]``; sums only, of all processes.
    """
    sums: dict[str, list[Tensor]] = {}

    def see(name: str, w_time: Tensor, w_channel: Tensor) -> None:
        new = [w_time.sum(2), w_time.square().sum(2), w_channel.sum(2)]
        sums[name] = [old + more for old, more in zip(sums[name], new, strict=True)] if name in sums else new

    batches = progress_bar(inspected.batches, "test", process)
    count = watch_attention(inspected.net, batches, inspected.prepare, process.device, see)
    (total,) = sum_over_processes([count])
    result = {}
    for name, parts in sums.items():
        time, square, channel = (
            np.reshape(sum_over_processes(part.flatten().tolist()), part.shape) / total for part in parts
        )
        result[name] = (time, np.sqrt(np.maximum(square - time**2, 0)), channel)
    return result


def show_attention(args: argparse.Namespace) -> None:
    """The time and channel weights of every SMA, per scale over T, averaged over the test set."""
    output = args.output_dir or args.weights.parent
    with start(args.device, args.local_rank) as process:
        check_output(output)
        inspected = load_inspected(args, process)
        modules = dict(inspected.net.named_modules())
        if not any(isinstance(module, SMA) for module in modules.values()):
            raise UserError(f"the network of {args.weights} has no SMA")
        weights = mean_attention(inspected, process)
        if not process.is_first:
            return
        for name, (time, spread, channel) in weights.items():
            kernels = kernel_sizes(modules[name])
            title = f"{sma_label(name)}: weights of the scales, mean of {len(inspected.test)} test samples"
            path = output / "figures" / f"attention_{name}.png"
            save(draw_attention(time, spread, channel, kernels, title), path)
            print(path)


def show_azo(args: argparse.Namespace) -> None:
    """Which steps and channels AZO replaced in every epoch of a run, per scale."""
    output = args.output_dir or args.run
    check_output(output)
    epochs, kernels, shares = read_azo_record(args.run)
    for name, share in shares.items():
        path = output / "figures" / f"azo_{name}.png"
        title = f"{sma_label(name)}: replaced by Attention ZoneOut in training (step 1 has no step before it and stays)"
        save(draw_azo(epochs, share, kernels, title), path)
        print(path)


def show_curves(args: argparse.Namespace) -> None:
    """Accuracy and loss of one or several runs over the epochs."""
    output = args.output_dir or args.runs[0]
    check_output(output)
    runs: dict[str, Mapping[str, list[float]]] = {}
    for run in args.runs:
        name = run.resolve().name
        runs[name if name not in runs else str(run)] = read_metrics(run)
    path = output / "figures" / "curves.png"
    save(draw_curves(runs), path)
    print(path)


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, show: object, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=show.__doc__, description=show.__doc__, epilog=f"example: python tools/visualize.py {example}"
        )
        added.set_defaults(show=show)
        return added

    frames = command("frames", show_frames, "frames --data-set dvs128 --demo -T 8")
    add = frames.add_argument
    add("--data-set", choices=DATA_SETS, default="dvs128", help="its layout (default: dvs128)")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the data set")
    add("--demo", action="store_true", help="the built-in demo data")
    add("-T", "--timesteps", type=whole(1), default=16, metavar="T", help="frames per sample (default: 16)")
    add("--sensor-size", type=size(1), metavar="HxW", help="of another camera")
    add("--split", default="random", metavar="random|first90|tebn|FILE", help="of the test samples (default: random)")
    add("--split-seed", type=whole(0), metavar="N", help="of the random split (default: the recipe's)")
    add("--sample", default="0", metavar="N|NAME", help="test sample, by number or <class>/<sample> (default: 0)")
    add("--all", action="store_true", help="every frame of the data set; a second run makes what is missing")
    add("--threads", type=whole(1), default=4, metavar="N", help="with --all (default: 4)")
    add("--scale", type=whole(1), default=1, metavar="N", help="picture pixels per sensor pixel (default: 1)")
    add("--full", type=above_zero, default=1.0, metavar="X", help="count of events at full brightness (default: 1)")
    add("--output-dir", type=Path, metavar="DIR", help="default: output/frames_<data set>_T<T>")

    spikes = command("spikes", show_spikes, "spikes --weights output/dvs128/last.pt --sample 3")
    add_inspection(spikes)
    add = spikes.add_argument_group("picture").add_argument
    add("--sample", default="0", metavar="N|NAME", help="test sample, by number or <class>/<sample> (default: 0)")
    add("--layers", nargs="+", metavar="NAME", help="neurons to show (default: six outside SMA, evenly spread)")
    add("--steps", type=whole(1), nargs="+", metavar="N",
        help="time steps to show, from 1 (default: all; of more than eight, eight evenly spread)")  # fmt: skip
    add("--over-input", action=argparse.BooleanOptionalAction, default=True, help="lay the maps over the input")

    add_inspection(command("attention", show_attention, "attention --weights output/dvs128/last.pt"))

    azo = command("azo", show_azo, "azo output/dvs128")
    azo.add_argument("run", type=Path, metavar="RUN", help="output directory of a training with AZO")
    azo.add_argument("--output-dir", type=Path, metavar="DIR", help="default: the run")

    curves = command("curves", show_curves, "curves output/dvs128 output/dvs128_no_azo")
    curves.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output directories")
    curves.add_argument("--output-dir", type=Path, metavar="DIR", help="default: the first run")
    return parser


def main() -> None:
    """Draw what the command line says."""
    args = make_parser().parse_args()
    args.show(args)


if __name__ == "__main__":
    exit_with_sentence(main, "every file that is there is whole, and the same command makes the others")
