"""The recipes train as published: the steps of a whole trajectory, learning rates, augmentation, last batches."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from models import sma_vgg8_dvs128
from models.neurons import reset_net
from tests.conftest import ROOT, SCRIPTS, parse
from tests.reference import fill
from utils.checkpoint import Checkpoints
from utils.data.events import flip_and_shift
from utils.data.loaders import make_loaders, set_epoch
from utils.distributed import Process
from utils.engine import Progress, train_one_epoch
from utils.losses import mse_of_mean
from utils.optim import cosine_one_epoch_late

CPU = torch.device("cpu")
ONE = Process(0, 0, 1, CPU)
TOLERANCE = 1e-9


class Run:
    """SMA-VGG8 of DVS128 Gesture in double precision, on the parameters of the reference, and its optimiser."""

    def __init__(self, directory):
        self.net = sma_vgg8_dvs128().double()
        filled = fill.fill(self.net.state_dict())
        self.net.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in filled.items()})
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, weight_decay=1e-3)
        self.progress = Progress(CPU)
        self.checkpoints = Checkpoints(directory, {}, ONE, self.net, self.progress, optimizer=self.optimizer)
        self.losses, self.logits = [], []

    def train(self, steps):
        """Take these steps through the project's training loop."""

        def batches():
            for n in steps:
                frames = torch.from_numpy(fill.events(1000 + n, 16, 2, 2, 32, 32)).transpose(0, 1)
                labels = torch.from_numpy(np.random.RandomState(2000 + n).randint(0, 11, 2))
                torch.manual_seed(n)
                yield frames, labels

        def criterion(logits, labels):
            loss = mse_of_mean(logits, labels)
            self.losses.append(loss.item())
            self.logits.append(logits.detach())
            return loss

        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_one_epoch(self.net, batches(), criterion, self.optimizer, scaler, CPU)

    def difference(self, expected, first=0):
        """The largest relative difference from the reference, of the steps from ``first`` on and of the final state."""
        found = np.array(self.losses), torch.stack(self.logits).numpy()
        pairs = [(found[0], expected["losses"][first:], 1.0), (found[1], expected["logits"][first:], 1.0)]
        state = self.net.state_dict()
        for name, statistics in zip(expected["names"], expected["final"], strict=True):
            value = state[str(name)]
            ends = value.flatten()[[0, -1]].tolist()
            total, absolute = value.sum().item(), value.abs().sum().item()
            pairs.append((np.array([total, absolute, *ends]), statistics, statistics[1]))
        return max(np.abs(a - b).max() / max(scale, np.abs(b).max()) for a, b, scale in pairs)


def test_training_follows_the_published_trajectory_through_a_checkpoint(tmp_path):
    expected = np.load(ROOT / "tests/reference/trajectory_dvs128.npz")
    run = Run(tmp_path)
    run.train([1])
    run.checkpoints.save(1, 0.0)
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume("auto") == 1
    resumed.train([2])
    np.testing.assert_allclose(run.losses + resumed.losses, expected["losses"][:2], rtol=TOLERANCE)
    for found, logits in zip(run.logits + resumed.logits, expected["logits"], strict=False):
        assert np.abs(found.numpy() - logits).max() <= TOLERANCE * max(1.0, np.abs(logits).max())


@pytest.mark.slow
def test_training_follows_the_whole_published_trajectory_also_when_it_is_resumed(tmp_path):
    expected = np.load(ROOT / "tests/reference/trajectory_dvs128.npz")
    run = Run(tmp_path)
    run.train([1, 2])
    run.checkpoints.save(1, 0.0)
    run.train([3, 4])
    assert run.difference(expected) <= TOLERANCE
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume("auto") == 1
    resumed.train([3, 4])
    assert resumed.difference(expected, first=2) <= TOLERANCE
    assert resumed.losses == run.losses[2:]


def test_dropout_draws_one_mask_for_all_steps_and_another_after_a_reset():
    net = sma_vgg8_dvs128(T=4, width=0.125)
    seen = []
    first, last = net.others[4], net.others[7]
    for module in (first, last):
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    ones = torch.ones(4, 3, 256)
    masks = []
    for _ in range(2):
        out = first(ones)
        assert torch.equal(out, out[:1].expand_as(out)) and set(out.unique().tolist()) == {0.0, 2.0}
        masks.append(out[0])
        assert torch.equal(first(ones), out)  # until the reset
        reset_net(net)
    assert not torch.equal(*masks)
    net.eval()
    assert torch.equal(first(ones), ones)


@pytest.mark.parametrize(
    ("name", "epochs", "lr"), [("dvs128", 200, 1e-4), ("cifar10dvs", 200, 1e-3), ("ncaltech101", 300, 1e-3)]
)
def test_event_recipes_have_the_published_cosine(name, epochs, lr):
    assert parse(name, "-N", epochs).decay == epochs
    assert parse(name).decay == parse(name).epochs == epochs
    args = parse(name, "-N", 7, "--decay", 5)
    assert (args.epochs, args.decay) == (7, 5)
    args = parse(name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.decay)
    for epoch in range(1, epochs + 1):
        expected = 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-18), epoch
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warm_up", [0, 5])
def test_the_imagenet_recipe_enters_its_cosine_one_epoch_late(warm_up):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = cosine_one_epoch_late(optimizer, 200, warm_up)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    length = 200 - warm_up
    rising = [0.1 * e / (warm_up + 1) for e in range(1, warm_up + 1)]
    cosine = [0.05 * (1 + math.cos(math.pi * e / length)) for e in range(1, length + 1)]
    assert rates == pytest.approx(rising + cosine, rel=1e-12, abs=1e-18)
    assert warm_up or rates[0] == pytest.approx(0.0999938, abs=5e-8)
    assert rates[-1] == 0.0


def test_the_translation_has_the_published_probabilities():
    draws = 4000
    frames = torch.zeros(1, 1, 21, 21)
    frames[..., 10, 10] = 1.0
    counts = np.zeros((2, 11))
    for seed in range(draws):
        (_, _, y, x) = flip_and_shift(frames, torch.Generator().manual_seed(seed), flip=False).nonzero()[0].tolist()
        counts[0, y - 5] += 1
        counts[1, x - 5] += 1
    expected = draws * np.array([0.05, *[0.1] * 9, 0.05])
    chi_square = ((counts - expected) ** 2 / expected).sum(1)
    assert (chi_square < 29.6).all(), chi_square  # 10 degrees of freedom: above it in 1 of 1000
    uniform = draws / 11
    assert (((counts - uniform) ** 2 / uniform).sum(1) > 29.6).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_drop_last_every_process_takes_its_last_smaller_batch(world_size):
    class Data:
        train = TensorDataset(torch.arange(23))
        val = None
        test = TensorDataset(torch.arange(5))

    seen, sizes = [], set()
    for rank in range(world_size):
        process = Process(rank, rank, world_size, CPU)
        batches, *_ = make_loaders(Data, 4, 0, 0, process, drop_last=False)
        set_epoch(batches, 1)
        own = [values for (values,) in batches]
        assert len(own) == len(batches)
        sizes.add(tuple(len(values) for values in own))
        seen += torch.cat(own).tolist()
    share = math.ceil(23 / world_size)
    assert sizes == {(*[4] * (share // 4), *([share % 4] if share % 4 else []))}
    assert set(seen) == set(range(23)) and len(seen) == share * world_size


def test_published_defaults_of_all_scripts():
    names = ("timesteps", "batch_size", "epochs", "lr", "seed", "RCR", "RTR", "weight_decay")
    found = {name: [getattr(parse(name), key) for key in names] for name in SCRIPTS}
    assert found == {
        "dvs128": [16, 9, 200, 1e-4, 3401, 10, 4, 1e-3],
        "cifar10dvs": [10, 24, 200, 1e-3, 3404, 4, 4, 0.0],
        "ncaltech101": [14, 6, 300, 1e-3, 3402, 24, 4, 0.0],
        "imagenet": [6, 256, 200, 0.1, 445, 4, 2, 1e-4],
    }
    assert parse("ncaltech101").momentum_decay == 1e-3
    imagenet = parse("imagenet")
    assert (imagenet.net, imagenet.label_smoothing, imagenet.AZO, imagenet.mixup) == ("resnet18", 0.1, False, False)
