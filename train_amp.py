"""SMA-MS-ResNet-18/34/104 on ImageNet-1K: training and evaluation.

Try it without data:   python train_amp.py --demo
One GPU, or the CPU:   python train_amp.py -net resnet18 --data-dir DIR
6 GPUs, as published:  python -m torch.distributed.launch --master_port=1234 --nproc_per_node=6 train_amp.py
                       -net resnet18 -b 384 -lr 0.1 --data-dir DIR
2 machines of 4 GPUs:  see "Several machines" in docs/training.md
Evaluate weights:      python train_amp.py --data-dir DIR --evaluate --weights FILE
ResNet-104 with AZO:   see "ImageNet-1K" in docs/training.md: 50 more epochs with --AZO, from trained weights

Reported by the authors on 10 GPUs (not measured here): 77.1 % top-1 with SMA-AZO-ResNet104.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from models import MSResNet
from utils.data.demo_images import write_demo_images
from utils.data.images import Mixup, load_image_data, normalized, readable, to_channels_last
from utils.data.loaders import make_loaders
from utils.engine import evaluate, train_one_epoch
from utils.errors import exit_with_sentence, user_input
from utils.image_args import batch_of_process, image_settings, parse_image_args
from utils.losses import cross_entropy
from utils.networks import RESNETS
from utils.optim import averaged, cosine_one_epoch_late
from utils.run import start_run

RECIPE = {
    "net": "resnet18",
    "timesteps": 6,
    "RCR": 4,
    "RTR": 2,
    "image_size": 224,
    "batch_size": 256,  # of all processes together; the published command has -b 384
    "epochs": 200,  # and the period of the cosine
    "lr": 0.1,
    "weight_decay": 1e-4,  # of SGD
    "label_smoothing": 0.1,
    "seed": 445,
}
# What --demo changes: small enough to learn in two minutes on two CPU cores.
DEMO = {"timesteps": 2, "width": 0.25, "image_size": 48, "batch_size": 24, "epochs": 10, "num_workers": 0}
SETTINGS = image_settings(RECIPE, DEMO)


def build_model(args: argparse.Namespace, num_classes: int) -> MSResNet:
    """The network of the recipe, with the changes that the user asks for."""
    return RESNETS[args.net](
        T=args.timesteps,
        num_classes=num_classes,
        sma_blocks=args.sma_blocks,
        branch_groups=args.branch_groups,
        recompute=args.recompute,
        width=args.width,
        AZO=args.AZO,
        RCR=args.RCR,
        RTR=args.RTR,
    )


def main() -> None:
    """Train, or evaluate, as the command line says."""
    args = parse_image_args(SETTINGS, __doc__)
    with start_run(args, SETTINGS) as run:
        batch_size = batch_of_process(args, run.process.world_size)
        data = load_image_data(
            write_demo_images(args.data_dir) if args.demo else args.data_dir,
            args.image_size,
            args.test_crop,
            decoder=args.decoder,
            seed=args.seed,
            leave_out=args.on_bad_image == "skip",
            for_training=not args.evaluate,
            val=args.val,
        )
        train_batches, val_batches, test_batches = make_loaders(
            data, batch_size, args.num_workers, args.seed, run.process, collate=readable, drop_last=False
        )
        torch.manual_seed(args.seed)  # the same first weights in every process
        with user_input():
            net = build_model(args, len(data.classes)).to(run.device)
        if run.device.type == "cuda" and run.process.world_size > 1:
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        run.describe(net, data, "imagenet")
        if args.channels_last:
            to_channels_last(net)
        prepare = normalized(args.channels_last)
        test_loss = cross_entropy()
        test_on = partial(evaluate, criterion=test_loss, device=run.device, prepare=prepare, top=5, amp=args.eval_amp)

        if args.evaluate:
            run.report(test_on(net, run.watch(test_batches, "test")))
            return

        optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
        scheduler = cosine_one_epoch_late(optimizer, args.epochs, args.warm_up)
        scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
        train_loss = cross_entropy(args.label_smoothing)
        evaluated = averaged(net, args.ema, optimizer) if args.ema else net
        mixup = Mixup(prepare, len(data.classes), args.seed, run.process.rank) if args.mixup else None
        trained = run.for_training(net)
        torch.manual_seed(args.seed + run.process.rank)  # dropout differs between the processes
        run.resume(evaluated, optimizer, scheduler=scheduler, scaler=scaler, trained=net if args.ema else None)

        for epoch in run.epochs(train_batches):
            if mixup is not None:
                mixup.set_epoch(epoch, run.progress.step * args.micro_batches)
            train = train_one_epoch(
                trained, run.watch(train_batches, "train"), train_loss, optimizer, scaler, run.device, args.amp,
                mixup or prepare, args.micro_batches, run.progress,
            )  # fmt: skip
            found = test_on(evaluated, run.watch(val_batches, "val"))
            scheduler.step()
            run.save(train, found)

        run.select()
        run.finish(test_on(evaluated, run.watch(test_batches, "test")))


if __name__ == "__main__":
    exit_with_sentence(main)
