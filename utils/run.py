"""One run of a script: the plumbing that is the same for all recipes.

A script makes data, network and optimiser, and trains; its :class:`Run` has the processes, the output folder, the
header, checkpoints, signals and the log.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from models.neurons import select_backend
from utils.analysis.azo_record import AZORecord
from utils.args import Settings
from utils.checkpoint import Checkpoints, put_weights, read_weights
from utils.data.events import EventData
from utils.data.images import ImageData
from utils.data.loaders import set_epoch
from utils.distributed import Process, start
from utils.engine import Progress
from utils.errors import StopRequested, user_input
from utils.exported import sha256_of
from utils.facts import facts_of_run, header, training_facts
from utils.logger import (
    RunLog,
    check_output,
    evaluation_in_words,
    one_run,
    print_epoch,
    print_header,
    progress_bar,
    write_json,
)
from utils.signals import StopSignal

__all__ = ["Run", "start_run"]


@dataclass
class _Training:
    """What a run that trains has, and an evaluation has not."""

    checkpoints: Checkpoints
    log: RunLog
    optimizer: torch.optim.Optimizer
    done: int  # epochs
    lr: float = 0.0  # of the epoch
    is_over: bool = False


class Run:
    """See the top of this file; made by :func:`start_run`.

    Attributes:
        process: rank, world size and device of this process.
        device: where it computes.
        progress: of the epoch that is trained.
    """

    def __init__(self, args: Namespace, settings: Settings, process: Process, until_the_end: ExitStack):
        self.args, self.settings, self.process, self._until_the_end = args, settings, process, until_the_end
        self.device = process.device
        self.stop = StopSignal()
        self.progress = Progress(process.device, agree=self.stop.agree)
        self.facts: dict[str, Any] = {}
        self._manifest: str | None = None
        self._azo: AZORecord | None = None
        self._training: _Training | None = None  # None in an evaluation
        self._began = self._epoch_began = time.monotonic()

    def describe(self, net: nn.Module, data: EventData | ImageData, data_set: str) -> None:
        """Choose the backend of the neurons, load ``--weights``, and print the header.

        Args:
            net: the network itself, on the device.
            data: what is trained or evaluated on.
            data_set: the name of its layout.

        Raises:
            UserError: the backend cannot be used, or the weights do not fit.
        """
        with user_input():
            backend = select_backend(net, self.args.backend, self.device)
        self.facts = facts_of_run(self.args, data, data_set, net, backend, self.process)
        if self.args.weights is not None:
            weights, known = read_weights(self.args.weights)
            put_weights(net, weights, self.args.weights)
            if self.args.evaluate:
                self.facts |= training_facts(known)
        self._manifest = data.manifest
        if self.args.record_azo and self.process.is_first:
            self._azo = AZORecord(net) or None
        deviations = self.settings.deviations(self.args)
        processes, published = self.process.world_size, self.settings.published.get("processes")
        if published not in (None, processes) and not self.args.evaluate:
            deviations["processes"] = (published, processes)  # the batch is that of one process
        self.facts["deviations"] = {name: list(values) for name, values in deviations.items()}
        if self.process.is_first:
            print_header(header(self.args, self.facts), deviations)

    @property
    def _part(self) -> str:
        """What selects the best epoch."""
        return "val" if self.facts["split"]["val"] else "test"

    def watch(self, batches: DataLoader, what: str) -> Iterable:
        """The batches under a progress bar; a signal stops the run after the step that is being computed."""
        done = self.progress.step if what == "train" else 0
        what = self._part if what == "val" else what
        epoch = "" if self._training is None else f" {self.progress.epoch}/{self.args.epochs}"
        return self.stop.watch(progress_bar(batches, f"{what}{epoch}", self.process, done=done))

    def for_training(self, net: nn.Module) -> nn.Module:
        """``net`` as it is trained: compiled with ``--compile``, and wrapped where there are several processes.

        Evaluation and checkpoints take ``net`` itself. The last batch of an epoch, if it is smaller, has another graph.
        """
        trained = cast(nn.Module, torch.compile(net, dynamic=False)) if self.args.compile else net
        return DistributedDataParallel(trained) if self.process.world_size > 1 else trained

    def resume(self, net: nn.Module, optimizer: torch.optim.Optimizer, **parts: Any) -> None:
        """Continue the run in the output directory, if there is one, and open the log.

        Args:
            net: the network that is evaluated (itself, not its wrapper).
            optimizer: of the training.
            parts: everything else with a state: schedule, scaler, ...; None is left out.

        Raises:
            UserError: see :meth:`utils.checkpoint.Checkpoints.resume`.
        """
        args, split = self.args, self.facts["split"]
        recipe = self.settings.recipe_of(args)
        recipe |= {"split_fingerprint": split["fingerprint"], "samples": split["contents"]}
        checkpoints = Checkpoints(
            args.output_dir, recipe, self.process, net, self.progress, args.keep_every, self.facts,
            self._manifest, optimizer=optimizer, azo=self._azo, **parts,
        )  # fmt: skip
        self._until_the_end.enter_context(one_run(args.output_dir, self.process))
        done = checkpoints.resume(args.resume)
        self.facts = checkpoints.facts  # with the earlier starts
        if self.process.is_first and (done or self.progress.step):
            print(f"continuing after epoch {done}, step {self.progress.step} of the next", flush=True)
        log = RunLog(args.output_dir, self.process, args.log_dir, self._azo, self._part, args.tracker)
        earlier = None if args.resume in ("auto", "never") else Path(args.resume).parent
        self._until_the_end.callback(log.close)
        log.open(vars(args), self.facts, done, self._manifest, earlier)
        self._training = _Training(checkpoints, log, optimizer, done)

    def epochs(self, train_batches: DataLoader) -> Iterator[int]:
        """The numbers of the epochs that are left, from 1; the batches of each are in its own order."""
        assert self._training is not None, "call resume() first"
        self._until_the_end.enter_context(self.stop)  # not before: until now a signal ends the program at once
        for epoch in range(self._training.done + 1, self.args.epochs + 1):
            self.progress.epoch = epoch
            self._epoch_began = time.monotonic() - self.progress.seconds
            self._training.lr = self._training.optimizer.param_groups[0]["lr"]
            set_epoch(train_batches, epoch, self.progress.step)
            yield epoch

    def save(self, train: Mapping[str, float], found: Mapping[str, float]) -> None:
        """Record a finished epoch, save its checkpoint, and print its line.

        Args:
            train: of the training.
            found: on the samples that select the best epoch.
        """
        assert self._training is not None, "call resume() first"
        epoch, seconds = self.progress.epoch, time.monotonic() - self._epoch_began
        self._training.log.epoch(epoch, train, found, self._training.lr, seconds)
        self._training.checkpoints.save(epoch, found["acc1"])
        self._training.done = epoch
        if self.process.is_first:
            print_epoch(epoch, self.args.epochs, train, found, self._training.lr, seconds, self._part)

    def select(self) -> None:
        """Take the weights that are tested: with ``--val`` those of ``best.pt``, else those that are there.

        Raises:
            UserError: ``best.pt`` cannot be read.
        """
        assert self._training is not None, "call resume() first"
        if self._part == "val":
            self._training.is_over = True  # what is in the network now must not become last.pt
            checkpoints = self._training.checkpoints
            weights, _ = read_weights(checkpoints.best_file)
            put_weights(checkpoints.net, weights, checkpoints.best_file)

    def finish(self, test: Mapping[str, Any]) -> None:
        """Report the test of the final epoch, or of the selected one, and say which it is."""
        assert self._training is not None, "call resume() first"
        args, best, split = self.args, self._training.checkpoints.best, self.facts["split"]
        on_test = self._part == "test"
        epoch, selection = (args.epochs, "final") if on_test else (int(best["epoch"]), "val")
        if not on_test:
            self._training.log.final(args.epochs, test)
        if not self.process.is_first:
            return
        about = {"epoch": epoch, "selection": selection, "seed": args.seed, "best": best}
        write_json(args.output_dir / "evaluation.json", {**test, **about, **self.facts})
        result = f"{evaluation_in_words(test)}  split {split['fingerprint']}"
        best_epoch = f"best epoch: {best['epoch']} with acc1 {best['acc1']:.2f} %"
        if on_test:
            print(f"final epoch: {result}\n{best_epoch} (selected on the test set, as published)")
        else:
            print(f"{best_epoch} of the {split['val']} held-out training samples")
            print(f"test set, once, with the weights of that epoch (best.pt): {result}")
        print(f"{time.monotonic() - self._began:.1f} s; everything is in {args.output_dir}", flush=True)

    def report(self, result: Mapping[str, Any]) -> None:
        """Report the evaluation of ``--weights``. The ``evaluation.json`` of a training stays as it is."""
        if not self.process.is_first:
            return
        weights, output = self.args.weights, self.args.output_dir
        path = (output or weights.parent) / "evaluation.json"
        if output is None or (output / "metrics.csv").exists():
            path = path.with_name(f"evaluation_of_{weights.stem}.json")
        print(f"{evaluation_in_words(result)}  split {self.facts['split']['fingerprint']}")
        write_json(path, {**result, "weights": weights, "sha256": sha256_of(weights), **self.facts})
        print(f"written to {path}", flush=True)

    def save_inside(self) -> None:
        """Save the epoch that a signal stops."""
        if self._training is not None and not self._training.is_over:
            self.progress.seconds = time.monotonic() - self._epoch_began
            self._training.checkpoints.save_inside(self._training.done)


@contextmanager
def start_run(args: Namespace, settings: Settings) -> Iterator[Run]:
    """Start the processes of a run and its output folder, and end them; a signal saves inside the epoch.

    Raises:
        UserError: the output folder, the device or the launcher's environment cannot be used.
    """
    check_output(args.output_dir or args.weights.parent)
    torch.backends.cudnn.allow_tf32 = args.tf32
    where = start(args.device, args.local_rank, args.timeout, args.deterministic)
    with where as process, ExitStack() as until_the_end:
        run = Run(args, settings, process, until_the_end)
        try:
            yield run
        except StopRequested:
            run.save_inside()
            raise
