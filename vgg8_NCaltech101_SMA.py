"""SMA-VGG8 with Attention ZoneOut on N-Caltech101: training and evaluation.

Try it without data:   python vgg8_NCaltech101_SMA.py --demo
One GPU, or the CPU:   python vgg8_NCaltech101_SMA.py --data-dir DIR
4 GPUs, as published:  torchrun --nproc_per_node 4 vgg8_NCaltech101_SMA.py --data-dir DIR
2 machines of 4 GPUs:  see "Several machines" in README.md
Evaluate weights:      python vgg8_NCaltech101_SMA.py --data-dir DIR --evaluate --weights FILE

Reported by the authors on 4 GPUs (not measured here): 82.9 % with SMA (--no-AZO), 83.7 % with ReLU branches
(--no-AZO --branch-activation relu), 84.6 % with SMA and AZO (quoted by another paper), best test epoch, a split that
was not published.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from models import VGG8, sma_vgg8_ncaltech101
from models.neurons import select_backend
from utils.checkpoint import Checkpoints, load_weights
from utils.data.events import load_event_data
from utils.data.loaders import make_loaders, set_epoch
from utils.describe import describe_event_run
from utils.distributed import start
from utils.engine import Progress, evaluate, train_one_epoch
from utils.errors import exit_with_sentence, user_input
from utils.event_args import deviations, parse_event_args, recipe_of
from utils.logger import RunLog, check_output, one_run, write_evaluation
from utils.losses import tet
from utils.signals import StopSignal

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
    "split_seed": 3402,
}
# What --demo changes: small enough to learn in minutes on a CPU.
DEMO = {"width": 0.25, "frame_size": [32, 32], "num_workers": 0}
DEMO |= {"batch_size": 16, "epochs": 16, "lr": 1e-3}


def build_model(args: argparse.Namespace, num_classes: int) -> VGG8:
    """The network of the recipe, with the changes that the user asks for."""
    return sma_vgg8_ncaltech101(
        T=args.timesteps,
        num_classes=num_classes,
        width=args.width,
        sma_blocks=args.sma_blocks,
        branch_activation=args.branch_activation,
        branch_groups=args.branch_groups,
        recompute=args.checkpoint_activations,
        AZO=args.AZO,
        RCR=args.RCR,
        RTR=args.RTR,
    )


def main() -> None:
    """Train, or evaluate, as the command line says."""
    args = parse_event_args(__doc__, DATA_SET, RECIPE, DEMO)
    check_output(args.output_dir)
    with (
        start(args.device, args.local_rank, args.timeout, args.deterministic) as process,
        one_run(args.output_dir, process, args.evaluate),
    ):
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
        )
        train_batches, test_batches = make_loaders(data, args.batch_size, args.num_workers, args.seed, process)
        torch.manual_seed(args.seed)  # the same first weights in every process
        with user_input():
            net = build_model(args, len(data.classes)).to(process.device)
            backend = select_backend(net, args.backend, process.device)
        if args.weights is not None:
            load_weights(net, args.weights)
        log = RunLog(args.output_dir, process, args.log_dir, net)
        facts = describe_event_run(args, data, net, backend, process)
        log.header(facts, deviations(args, RECIPE, process.world_size))

        if args.evaluate:
            result = evaluate(net, log.progress(test_batches, "test"), tet, process.device, amp=args.eval_amp)
            write_evaluation(args.output_dir, process, result, **facts)
            return

        optimizer = torch.optim.NAdam(
            net.parameters(), lr=args.lr, weight_decay=args.weight_decay, momentum_decay=args.momentum_decay
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.decay)
        scaler = torch.amp.GradScaler(process.device.type, enabled=args.amp == "fp16")
        trained = DistributedDataParallel(net) if process.world_size > 1 else net
        torch.manual_seed(args.seed + process.rank)  # dropout differs between the processes
        parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "azo": log.azo}
        progress = Progress(process.device)
        recipe = recipe_of(args, data.fingerprint)
        checkpoints = Checkpoints(args.output_dir, recipe, process, net, progress, args.keep_every, **parts)
        done = checkpoints.resume(args.resume)
        log.open(vars(args), facts, done, data.manifest)

        with StopSignal() as stop:
            for epoch in range(done + 1, args.epochs + 1):
                began, lr = time.monotonic(), optimizer.param_groups[0]["lr"]
                set_epoch(train_batches, epoch, progress.step)
                with checkpoints.saved_on_stop(epoch):
                    batches = stop.watch(log.progress(train_batches, f"train {epoch}/{args.epochs}"))
                    train = train_one_epoch(
                        trained, batches, tet, optimizer, scaler, process.device, args.amp,
                        accumulate=args.accumulate, epoch=epoch, progress=progress, nan_limit=args.nan_limit,
                        agree=stop.agree,
                    )  # fmt: skip
                    batches = stop.watch(log.progress(test_batches, f"test {epoch}/{args.epochs}"))
                    test = evaluate(net, batches, tet, process.device, amp=args.eval_amp)
                scheduler.step()
                log.epoch(epoch, args.epochs, train, test, lr, time.monotonic() - began)
                checkpoints.save(epoch, test["acc1"])

        final = evaluate(net, log.progress(test_batches, "test"), tet, process.device, amp=args.eval_amp)
        log.finish(final, checkpoints.best, facts)


if __name__ == "__main__":
    exit_with_sentence(main)
