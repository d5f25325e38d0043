"""Photographs: reading every kind of file, labels, transforms, draws; the demo pictures."""

import multiprocessing
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import transforms

from models import sma_ms_resnet18
from utils.data import images
from utils.data.demo_images import PATTERNS, render_picture, write_demo_images
from utils.data.images import ImageSet, Mixup, load_image_data, normalized, readable, to_channels_last
from utils.data.loaders import make_loaders, sample_seed, set_epoch
from utils.data.splits import changes
from utils.distributed import Process
from utils.errors import DataError, UserError
from utils.losses import cross_entropy
from utils.optim import averaged

try:
    from torchcodec.decoders import decode_image  # noqa: F401
except (ImportError, RuntimeError, OSError) as error:
    reason = f"torchcodec cannot be imported: {error}"
    needs_torchcodec = pytest.mark.skip(reason=reason)
else:
    needs_torchcodec = pytest.mark.skipif(False, reason="")

PROCESS = Process(0, 0, 1, torch.device("cpu"))


def photograph(size=(300, 200)):
    """A smooth picture: decoders and resizers may differ on noise."""
    x, y = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 2, size[1]))
    channels = [127 + 120 * np.sin(2 * x + y), 127 + 120 * np.cos(x * y), 80 * x]
    return Image.fromarray(np.stack(channels, 2).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folders(tmp_path):
    """Two classes of four images each, in training and test."""
    for part in ("train", "val"):
        for label, name in enumerate(("n02", "n01")):
            for number in range(4):
                path = tmp_path / f"{part}/{name}/{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                photograph((120 + 10 * number, 90 + 30 * label)).save(path)
    return tmp_path


# Reading ------------------------------------------------------------------------------------------------------------

KINDS = {
    "rgb": {},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "progressive": {"progressive": True},
    "png in a .JPEG": {"format": "PNG"},
    "palette": {"mode": "P", "format": "PNG"},
    "alpha": {"mode": "RGBA", "format": "PNG"},
    "bmp": {"format": "BMP"},
}


@pytest.mark.parametrize("decoder", ["pil", pytest.param("torchcodec", marks=needs_torchcodec)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_read(kind, decoder, tmp_path):
    options = {"mode": "RGB", "format": "JPEG", **KINDS[kind]}
    mode = options.pop("mode")
    path = tmp_path / "train/n01/a.JPEG"
    path.parent.mkdir(parents=True)
    photograph().convert(mode).save(path, **options)
    whole = transforms.PILToTensor()
    expected = whole(Image.open(path).convert("RGB"))
    image, label = ImageSet(tmp_path / "train", images.v2.PILToTensor(), decoder)[0]
    assert image.dtype == torch.uint8 and label == 0
    assert (image.int() - expected.int()).abs().max() <= 2


def test_hidden_files_and_folders_are_left_out(folders):
    for name in (
        "train/.ipynb_checkpoints/a.JPEG",
        "train/n01/.ipynb_checkpoints/0-checkpoint.JPEG",
        "train/n01/._0.JPEG",
    ):
        (folders / name).parent.mkdir(exist_ok=True)
        photograph().save(folders / name, format="JPEG")
    (folders / "train/n01/notes.txt").touch()
    (folders / "train/list.txt").touch()
    data = load_image_data(folders, 32)
    assert data.classes == data.train.classes == ["n01", "n02"]
    assert len(data.train) == 8 and all("/." not in path for path, _ in data.train.samples)


def test_a_data_folder_may_itself_be_hidden(folders):
    hidden = folders / ".cache"
    hidden.mkdir()
    for part in ("train", "val"):
        (folders / part).rename(hidden / part)
    assert len(load_image_data(hidden, 32).train) == 8


def test_labels_are_the_ranks_of_the_sorted_names(folders):
    data = load_image_data(folders, 32)
    assert [label for _, label in data.test.samples] == [0] * 4 + [1] * 4
    assert all(("n01", "n02")[label] in path for path, label in data.test.samples)


def test_the_thousand_sorted_wnids_are_the_labels_of_imagenet(tmp_path):
    wnids = ImageNetInfo().label_names()  # in the order of the labels that the field uses
    assert (wnids[0], wnids[217], wnids[999]) == ("n01440764", "n02102040", "n15075141")
    for wnid in reversed(wnids):
        for part in ("train", "test"):
            (tmp_path / part / wnid).mkdir(parents=True)
            (tmp_path / part / wnid / f"{wnid}_1.JPEG").touch()
    data = load_image_data(tmp_path, 32)
    assert data.classes == wnids and [label for _, label in data.test.samples] == list(range(1000))
    assert "not all of ImageNet-1K" in data.title


def test_an_unlabelled_official_test_folder_is_ignored(folders):
    (folders / "test").mkdir()
    photograph().save(folders / "test/ILSVRC2012_test_00000001.JPEG")
    assert load_image_data(folders, 32).test.folder == folders / "val"


@pytest.mark.parametrize("decoder", ["pil", pytest.param("torchcodec", marks=needs_torchcodec)])
@pytest.mark.parametrize(
    "kind", ["16 bits.png", "16 bits.tif", "16 bits.pgm", "to 1.tif", "to 255.tif", "to 65535.tif"]
)
def test_images_of_more_than_eight_bits_are_scaled_and_not_clipped(kind, decoder, tmp_path):
    path = tmp_path / "train/n01" / kind.replace(" ", "_")
    path.parent.mkdir(parents=True)
    values = np.linspace(0, 65535, 256 * 8).round().reshape(8, 256)
    if kind.startswith("to"):
        Image.fromarray((values / 65535 * float(path.stem[3:])).astype(np.float32)).save(path)
    elif path.suffix == ".pgm":
        path.write_bytes(b"P5\n256 8\n65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values.astype(np.uint16)).save(path)
    image, _ = ImageSet(tmp_path / "train", images.v2.PILToTensor(), decoder)[0]
    assert image.shape == (3, 8, 256)
    assert np.abs(image.numpy() - values / 257).max() <= 1


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 70_000.0])
def test_an_image_of_values_that_mean_nothing_cannot_be_read(value, tmp_path):
    path = tmp_path / "train/n01/a.tif"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(path)
    with pytest.raises(DataError, match=r"a\.tif cannot be read \(values from "):
        _ = ImageSet(tmp_path / "train", images.v2.PILToTensor())[0]


def test_classes_and_images_behind_links_are_read_once(folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folders / "train/n01").rename(tmp_path / "elsewhere/n01")
    (folders / "train/n01").symlink_to(tmp_path / "elsewhere/n01")
    (folders / "train/n02/3.JPEG").rename(tmp_path / "elsewhere/3.JPEG")
    (folders / "train/n02/3.JPEG").symlink_to(tmp_path / "elsewhere/3.JPEG")
    assert len(load_image_data(folders, 32).train) == 8


@pytest.mark.parametrize(
    ("link", "target", "what"),
    [
        ("train/n01/up", "train", "is a link to .*/train, which is read already"),
        ("train/n01/other", "train/n02", "is a link to .*/n02, which is read already"),
        ("train/n03", "train/n02", "is a link to .*/n02, which is read already"),
        ("val/n01/4.JPEG", "val/n01/3.JPEG", "is a link to a sample that is read already"),
        ("train/n03", "nowhere", "is a link to nothing"),
        ("train/n01/5.JPEG", "nowhere", "is a link to nothing"),
    ],
)
def test_a_link_that_leads_twice_to_the_same_or_nowhere_is_named(link, target, what, folders):
    (folders / link).symlink_to(folders / target)
    with pytest.raises(UserError, match=rf"1 bad files in .*\n.*{link}: {what}"):
        load_image_data(folders, 32)


def test_what_is_no_file_is_left_out_by_name(folders, capsys):
    os.mkfifo(folders / "train/n01/pipe.JPEG")
    assert len(load_image_data(folders, 32).train) == 8
    assert f"{folders}/train/n01/pipe.JPEG: is a named pipe and no file; remove it; left out" in capsys.readouterr().err


def test_the_data_are_told_by_their_images_wherever_they_lie(folders, tmp_path):
    before = load_image_data(folders, 32)
    shutil.copytree(folders / "train", tmp_path / "copy/train")
    shutil.copytree(folders / "val", tmp_path / "copy/val")
    copied = load_image_data(tmp_path / "copy", 32)
    assert copied.info == before.info and changes(before.manifest, copied.manifest) == []
    photograph((64, 64)).save(tmp_path / "copy/train/n02/1.JPEG")
    one, other = (tmp_path / f"copy/val/n0{n}/0.JPEG" for n in (1, 2))
    one.rename(tmp_path / "swap")
    other.rename(one)
    (tmp_path / "swap").rename(other)
    (tmp_path / "copy/val/n01/3.JPEG").unlink()
    changed = load_image_data(tmp_path / "copy", 32)
    assert changed.info.contents != before.info.contents
    assert changes(before.manifest, changed.manifest) == [
        "test,n01/0.JPEG has other contents",
        "test,n01/3.JPEG is not there any more",
        "test,n02/0.JPEG has other contents",
        "train,n02/1.JPEG has other contents",
    ]


# Transforms ---------------------------------------------------------------------------------------------------------


def test_the_test_image_is_the_centre_of_the_resized_one(folders):
    path = folders / "val/n01/3.JPEG"
    classic = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = classic(Image.open(path).convert("RGB"))
    data = load_image_data(folders)
    image, _ = data.test[3]
    batch, labels = normalized()(image[None], torch.tensor([0]))
    torch.testing.assert_close(batch[0], expected)
    assert labels.tolist() == [0]


def test_the_training_augmentation_is_the_published_one(folders):
    """RandomResizedCrop to the bit, with the same seed; AutoAugment with the same policy (its draws are its own)."""
    data = load_image_data(folders, 48, seed=5)
    crop, augment, to_tensor = data.train.transform.transforms
    assert augment._policies == transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET).policies
    data.train.epoch = 2
    data.train.transform = transforms.Compose([crop, to_tensor])
    classic = transforms.Compose([transforms.RandomResizedCrop(48), transforms.PILToTensor()])
    for index, (path, _) in enumerate(data.train.samples):
        torch.manual_seed(sample_seed(5, 2, index))
        assert torch.equal(data.train[index][0], classic(Image.open(path).convert("RGB")))


@needs_torchcodec
def test_the_faster_decoder_draws_the_same_augmentation(folders):
    slow, fast = (load_image_data(folders, 48, decoder=decoder, seed=1).train for decoder in images.DECODERS)
    differences = []
    for index in range(len(slow)):
        (a, label), (b, same_label) = slow[index], fast[index]
        assert label == same_label and a.shape == b.shape == (3, 48, 48) and b.dtype == torch.uint8
        differences.append((a.int() - b.int()).abs().float().mean())
    # Another crop or another operation would be tens of levels; resampling differs in rounding.
    assert torch.stack(differences).median() < 1.5


def test_draws_depend_on_the_epoch_and_not_on_workers_or_what_ran_before(folders):
    data = load_image_data(folders, 32, seed=3)

    def epoch(number, workers):
        torch.rand(number)  # something else draws in between
        batches, *_ = make_loaders(data, 4, workers, 3, PROCESS, collate=readable)
        set_epoch(batches, number)
        return torch.cat([image for image, _ in batches]), torch.cat([label for _, label in batches])

    first, again, second = epoch(1, 0), epoch(1, 2), epoch(2, 0)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0])


def test_reading_a_sample_leaves_the_generator_alone(folders):
    data = load_image_data(folders, 32)
    before = torch.get_rng_state()
    _ = data.train[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_count_of_left_out_images_is_shared_by_the_workers(folders, capfd):
    for number in (0, 1, 2):
        (folders / f"train/n01/{number}.JPEG").write_bytes(b"no image")
    data = load_image_data(folders, 32, leave_out=True)
    batches, *_ = make_loaders(data, 4, 2, 0, PROCESS, collate=readable)
    assert sum(len(labels) for _, labels in batches) == 5
    assert data.train.left_out.value == 3
    assert sorted(line.rsplit(", ", 1)[1] for line in capfd.readouterr().err.splitlines() if "left out" in line) == [
        "1 so far", "2 so far", "3 so far",
    ]  # fmt: skip


def test_a_batch_without_one_readable_image_is_an_error():
    with pytest.raises(images.DataError, match="not one of the 3 images of a batch could be read"):
        readable([None, None, None])


# Mixup, channels-last, learning rate, average -----------------------------------------------------------------------


def test_mixup_mixes_images_and_targets_alike_and_repeats_itself():
    torch.manual_seed(0)
    batch, labels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4, 0])
    plain, _ = normalized()(batch, labels)
    mixup = Mixup(normalized(), 5, seed=7, rank=0)
    mixup.set_epoch(3)
    runs = [mixup(batch, labels) for _ in range(20)]
    mixup.set_epoch(3)
    for images_, targets in runs:
        again, same = mixup(batch, labels)
        assert torch.equal(images_, again) and torch.equal(targets, same)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        share = targets[1, 1].item()  # of its own image; the rest is that of the one at the other end
        assert targets[1, 4].item() == pytest.approx(1 - share, abs=1e-6)
        blended = share * plain[1] + (1 - share) * plain[4]
        pasted = (images_[1] == plain[1]).all(0).float().mean().item()
        assert torch.allclose(images_[1], blended, atol=1e-5) or pasted == pytest.approx(share, abs=1e-6)
    shares = [targets[1, 1].item() for _, targets in runs]
    assert len(set(shares)) > 15
    other = Mixup(normalized(), 5, seed=7, rank=1)
    other.set_epoch(3)
    assert not torch.equal(other(batch, labels)[0], runs[0][0])


def test_mixup_takes_an_odd_batch():
    batch, labels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 1])
    mixed, targets = Mixup(normalized(), 2, seed=0, rank=0)(batch, labels)
    assert torch.equal(mixed[2], normalized()(batch, labels)[0][2]) and targets[2].tolist() == [0, 1]


def test_cross_entropy_with_labels_and_with_probabilities():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    probabilities = torch.nn.functional.one_hot(labels, 3).float()
    smoothed = 0.9 * probabilities + 0.1 / 3
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    for targets in (labels, probabilities):
        torch.testing.assert_close(cross_entropy(0.1)(logits, targets), expected)


def test_channels_last_changes_the_layout_and_not_the_numbers():
    torch.manual_seed(0)
    net = sma_ms_resnet18(T=2, width=0.125, num_classes=3).eval()
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        before = net(normalized()(batch, None)[0])
        to_channels_last(net)
        net.apply(lambda module: module.reset() if hasattr(module, "reset") else None)
        inputs = normalized(channels_last=True)(batch, None)[0]
        after = net(inputs)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert net.conv3_x[0].residual_function[1].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_the_average_follows_the_steps():
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    average = averaged(net, 0.75, optimizer)
    expected = 0.0
    for _ in range(3):
        net.weight.grad = torch.tensor([[-1.0]])
        optimizer.step()
        expected = 0.75 * expected + 0.25 * net.weight.item()
    assert net.weight.item() == 3.0 and average.weight.item() == pytest.approx(expected)


# Demo pictures ------------------------------------------------------------------------------------------------------


def test_demo_pictures_are_a_function_of_their_arguments_and_differ():
    pictures = [render_picture(p, n) for p in range(len(PATTERNS)) for n in range(3)]
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == len(pictures)
    assert np.array_equal(render_picture(2, 1), pictures[7])
    with pytest.raises(ValueError, match="there are 6 patterns"):
        render_picture(6, 0)


def test_a_linear_classifier_on_pixels_does_not_solve_the_demo():
    train = np.stack([render_picture(p, n) for p in range(6) for n in range(120)]).reshape(720, -1) / 255.0
    test = np.stack([render_picture(p, n) for p in range(6) for n in range(120, 150)]).reshape(180, -1) / 255.0
    targets = np.eye(6)[np.repeat(np.arange(6), 120)] - 1 / 6
    middle = train.mean(0)
    kernel = (train - middle) @ (train - middle).T
    best = 0.0
    for ridge in (1.0, 10.0, 100.0, 1000.0):  # tuned on the test pictures, in its favour
        weights = np.linalg.solve(kernel + ridge * np.eye(720), targets)
        predicted = ((test - middle) @ (train - middle).T @ weights).argmax(1)
        best = max(best, (predicted == np.repeat(np.arange(6), 30)).mean())
    assert best < 0.4, best


def _write(folder, results):
    results.put(str(write_demo_images(folder)))


@pytest.mark.slow
def test_two_processes_write_one_whole_demo_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_write, args=(tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    (path,) = paths
    assert [p.name for p in tmp_path.iterdir()] == [path.rsplit("/", 1)[1]]
    data = load_image_data(tmp_path / path, 32)
    assert data.classes == list(PATTERNS) and (len(data.train), len(data.test)) == (720, 180)
    pixels = np.asarray(Image.open(data.test.samples[31][0]))
    assert np.array_equal(pixels, render_picture(1, 121))


def test_a_decoder_that_is_not_installed_is_one_sentence(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"--decoder torchcodec cannot be used \(.*\); install torchcodec, or use"):
        load_image_data(folders, 32, decoder="torchcodec")
