"""SMA-MS-ResNet-18/34/104 on ImageNet-1K: training and evaluation.

Try it without data:   python train_amp.py --demo
One GPU, or the CPU:   python train_amp.py -net resnet18 --data-dir DIR
6 GPUs, as published:  python -m torch.distributed.launch --master_port=1234 --nproc_per_node=6 train_amp.py
                       -net resnet18 -b 384 -lr 0.1 --data-dir DIR
2 machines of 4 GPUs:  see "Several machines" in README.md
Evaluate weights:      python train_amp.py --data-dir DIR --evaluate --weights FILE
ResNet-104 with AZO:   see "ImageNet-1K" in README.md: training, then 50 epochs with --AZO from its weights

Reported by the authors on 10 GPUs (not measured here): 77.1 % top-1 with SMA-AZO-ResNet104.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from models import MSResNet, sma_ms_resnet18, sma_ms_resnet34, sma_ms_resnet104
from models.neurons import select_backend
from utils.checkpoint import Checkpoints, load_weights
from utils.data.demo_images import write_demo_images
from utils.data.images import Mixup, load_image_data, normalized, readable, to_channels_last
from utils.data.loaders import make_loaders, set_epoch
from utils.describe import describe_image_run
from utils.distributed import start
from utils.engine import Progress, evaluate, train_one_epoch
from utils.errors import exit_with_sentence, user_input
from utils.image_args import batch_of_process, deviations, parse_image_args, recipe_of
from utils.logger import RunLog, check_output, one_run, write_evaluation
from utils.losses import cross_entropy
from utils.optim import averaged, cosine_one_epoch_late
from utils.signals import StopSignal

NETS = {"resnet18": sma_ms_resnet18, "resnet34": sma_ms_resnet34, "resnet104": sma_ms_resnet104}
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


def build_model(args: argparse.Namespace, num_classes: int) -> MSResNet:
    """The network of the recipe, with the changes that the user asks for."""
    return NETS[args.net](
        T=args.timesteps,
        num_classes=num_classes,
        sma_blocks=args.sma_blocks,
        branch_groups=args.branch_groups,
        recompute=args.checkpoint_activations,
        width=args.width,
        AZO=args.AZO,
        RCR=args.RCR,
        RTR=args.RTR,
    )


def main() -> None:
    """Train, or evaluate, as the command line says."""
    args = parse_image_args(__doc__, RECIPE, DEMO)
    check_output(args.output_dir)
    with (
        start(args.device, args.local_rank, args.timeout, args.deterministic) as process,
        one_run(args.output_dir, process, args.evaluate),
    ):
        batch_size = batch_of_process(args, process.world_size)
        data = load_image_data(
            write_demo_images(args.data_dir) if args.demo else args.data_dir,
            args.image_size,
            args.test_crop,
            decoder=args.decoder,
            seed=args.seed,
            leave_out=args.on_bad_image == "skip",
            for_training=not args.evaluate,
        )
        train_batches, test_batches = make_loaders(
            data, batch_size, args.num_workers, args.seed, process, collate=readable, drop_last=False
        )
        torch.manual_seed(args.seed)  # the same first weights in every process
        with user_input():
            net = build_model(args, len(data.classes)).to(process.device)
            if process.device.type == "cuda" and process.world_size > 1:
                net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
            backend = select_backend(net, args.backend, process.device)
        if args.weights is not None:
            load_weights(net, args.weights)
        if args.channels_last:
            to_channels_last(net)
        prepare, device = normalized(args.channels_last), process.device
        tested = {"criterion": cross_entropy(), "device": device, "prepare": prepare, "top": 5, "amp": args.eval_amp}
        log = RunLog(args.output_dir, process, args.log_dir, net)
        facts = describe_image_run(args, data, net, backend, process)
        log.header(facts, deviations(args, RECIPE))

        if args.evaluate:
            result = evaluate(net, log.progress(test_batches, "test"), **tested)
            write_evaluation(args.output_dir, process, result, **facts)
            return

        optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
        scheduler = cosine_one_epoch_late(optimizer, args.epochs, args.warm_up)
        scaler = torch.amp.GradScaler(process.device.type, enabled=args.amp == "fp16")
        evaluated = averaged(net, args.ema, optimizer) if args.ema else net
        train_loss = cross_entropy(args.label_smoothing)
        mixup = Mixup(prepare, len(data.classes), args.seed, process.rank) if args.mixup else None
        trained = DistributedDataParallel(net) if process.world_size > 1 else net
        torch.manual_seed(args.seed + process.rank)  # dropout differs between the processes
        parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "azo": log.azo}
        parts |= {"trained": net if args.ema else None}
        progress = Progress(process.device)
        checkpoints = Checkpoints(
            args.output_dir, recipe_of(args, data.fingerprint), process, evaluated, progress, args.keep_every, **parts
        )
        done = checkpoints.resume(args.resume)
        log.open(vars(args), facts, done)

        with StopSignal() as stop:
            for epoch in range(done + 1, args.epochs + 1):
                began, lr = time.monotonic(), optimizer.param_groups[0]["lr"]
                set_epoch(train_batches, epoch, progress.step)
                if mixup is not None:
                    mixup.set_epoch(epoch, progress.step * args.accumulate)
                with checkpoints.saved_on_stop(epoch):
                    batches = stop.watch(log.progress(train_batches, f"train {epoch}/{args.epochs}"))
                    train = train_one_epoch(
                        trained, batches, train_loss, optimizer, scaler, process.device, args.amp, mixup or prepare,
                        args.accumulate, epoch, progress, args.nan_limit, stop.agree,
                    )  # fmt: skip
                    batches = stop.watch(log.progress(test_batches, f"test {epoch}/{args.epochs}"))
                    test = evaluate(evaluated, batches, **tested)
                scheduler.step()
                log.epoch(epoch, args.epochs, train, test, lr, time.monotonic() - began)
                checkpoints.save(epoch, test["acc1"])

        final = evaluate(evaluated, log.progress(test_batches, "test"), **tested)
        log.finish(final, checkpoints.best, facts)


if __name__ == "__main__":
    exit_with_sentence(main)
