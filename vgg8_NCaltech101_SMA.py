"""SMA-VGG8 with Attention ZoneOut on N-Caltech101: training and evaluation.

Try it without data:   python vgg8_NCaltech101_SMA.py --demo
One GPU, or the CPU:   python vgg8_NCaltech101_SMA.py --data-dir DIR
4 GPUs, as published:  torchrun --nproc_per_node 4 vgg8_NCaltech101_SMA.py --data-dir DIR
2 machines of 4 GPUs:  see "Several machines" in docs/training.md
Evaluate weights:      python vgg8_NCaltech101_SMA.py --data-dir DIR --evaluate --weights FILE

Reported by the authors on 4 GPUs (not measured here): 82.9 % with SMA (--no-AZO), 83.7 % with ReLU branches
(--no-AZO --branch-activation relu), 84.6 % with SMA and AZO (quoted by another paper), best test epoch, a split that
was not published.
"""

from __future__ import annotations

import argparse

import torch

from models import VGG8, sma_vgg8_ncaltech101
from utils.data.events import load_event_data
from utils.data.loaders import make_loaders
from utils.engine import evaluate, train_one_epoch
from utils.errors import exit_with_sentence, user_input
from utils.event_args import event_settings, parse_event_args
from utils.losses import tet
from utils.run import start_run

DATA_SET = "ncaltech101"
RECIPE = {
    "timesteps": 14,
    "RCR": 24,
    "RTR": 4,
    "batch_size": 6,  # per process; published with 4 processes
    "epochs": 300,  # and the period of the cosine
    "lr": 1e-3,
    "weight_decay": 0.0,  # of NAdam
    "momentum_decay": 1e-3,
    "seed": 3402,
    "split": "random",
    "split_seed": 3402,
}
# What --demo changes: small enough to learn in minutes on a CPU.
DEMO = {"width": 0.25, "frame_size": [32, 32], "num_workers": 0}
DEMO |= {"batch_size": 16, "epochs": 16, "lr": 1e-3}
SETTINGS = event_settings(RECIPE, DEMO)


def build_model(args: argparse.Namespace, num_classes: int) -> VGG8:
    """The network of the recipe, with the changes that the user asks for."""
    return sma_vgg8_ncaltech101(
        T=args.timesteps,
        num_classes=num_classes,
        width=args.width,
        sma_blocks=args.sma_blocks,
        branch_activation=args.branch_activation,
        branch_groups=args.branch_groups,
        recompute=args.recompute,
        AZO=args.AZO,
        RCR=args.RCR,
        RTR=args.RTR,
    )


def main() -> None:
    """Train, or evaluate, as the command line says."""
    args = parse_event_args(SETTINGS, __doc__, DATA_SET)
    with start_run(args, SETTINGS) as run:
        data = load_event_data(
            DATA_SET,
            args.data_dir,
            args.timesteps,
            split=args.split,
            split_seed=args.split_seed,
            sensor_size=args.sensor_size,
            frame_size=args.frame_size,
            demo=args.demo,
            frames=args.frames,
            on_bad_sample=args.on_bad_sample,
            num_classes=args.num_classes,
            val=args.val,
        )
        train_batches, val_batches, test_batches = make_loaders(
            data, args.batch_size, args.num_workers, args.seed, run.process
        )
        torch.manual_seed(args.seed)  # the same first weights in every process
        with user_input():
            net = build_model(args, len(data.classes)).to(run.device)
        run.describe(net, data, DATA_SET)

        if args.evaluate:
            run.report(evaluate(net, run.watch(test_batches, "test"), tet, run.device, amp=args.eval_amp))
            return

        optimizer = torch.optim.NAdam(
            net.parameters(), lr=args.lr, weight_decay=args.weight_decay, momentum_decay=args.momentum_decay
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.decay)
        scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
        trained = run.for_training(net)
        torch.manual_seed(args.seed + run.process.rank)  # dropout differs between the processes
        run.resume(net, optimizer, scheduler=scheduler, scaler=scaler)

        for _ in run.epochs(train_batches):
            train = train_one_epoch(
                trained, run.watch(train_batches, "train"), tet, optimizer, scaler, run.device, args.amp,
                micro_batches=args.micro_batches, progress=run.progress,
            )  # fmt: skip
            found = evaluate(net, run.watch(val_batches, "val"), tet, run.device, amp=args.eval_amp)
            scheduler.step()
            run.save(train, found)

        run.select()
        run.finish(evaluate(net, run.watch(test_batches, "test"), tet, run.device, amp=args.eval_amp))


if __name__ == "__main__":
    exit_with_sentence(main)
