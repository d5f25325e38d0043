"""Event data: layouts, splits, making frames once and whole, damaged files, augmentation, loaders."""

import dataclasses
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch

from tests.conftest import write_events
from utils.data.events import flip_and_shift, load_event_data
from utils.data.loaders import make_loaders, set_epoch
from utils.distributed import Process
from utils.engine import time_first
from utils.errors import DataError, UserError
from utils.prepare.datasets import DATA_SETS
from utils.prepare.spikingjelly_data import published_md5


def process(rank=0, world_size=1):
    return Process(rank, rank, world_size, torch.device("cpu"))


def frames_by_hand(path, T, height, width):
    """Spec section 3: T groups of equally many events, the last takes the rest; counts per polarity and pixel."""
    events = np.load(path)
    count = len(events["t"])
    frames = np.zeros((T, 2, height, width), dtype=np.float32)
    for t in range(T):
        part = slice(t * (count // T), count if t == T - 1 else (t + 1) * (count // T))
        np.add.at(frames[t], (events["p"][part], events["y"][part], events["x"][part]), 1)
    return frames


def test_gesture_layout_has_its_own_split_and_exact_counts(gesture_data):
    data = load_event_data("dvs128", gesture_data, 4)
    assert (len(data.train), len(data.test), len(data.classes)) == (22, 11, 11)
    assert data.classes[:3] == ["0", "1", "10"]  # as torchvision's DatasetFolder sorts: the labels of released weights
    path, label = data.test.files[2]
    frames, same_label = data.test[2]
    assert same_label == label == 2 and path.parent.name == "10"
    expected = frames_by_hand(gesture_data / "events_np/test/10" / path.name, 4, 128, 128)
    assert np.array_equal(frames.numpy(), expected) and frames.dtype == torch.float32


def test_data_that_are_not_all_of_the_official_ones_do_not_go_under_their_name(gesture_data, monkeypatch):
    assert load_event_data("dvs128", gesture_data, 4).title == f"{gesture_data.name}, laid out as DVS128 Gesture"
    monkeypatch.setitem(DATA_SETS, "dvs128", dataclasses.replace(DATA_SETS["dvs128"], samples=33))
    assert load_event_data("dvs128", gesture_data, 4).title == "DVS128 Gesture"


def test_folder_layout_is_split_90_to_10_inside_each_class(folder_data):
    data = load_event_data("ncaltech101", folder_data, 4, split_seed=1)
    assert (len(data.train), len(data.test)) == (27, 3)
    assert sorted(label for _, label in data.test.files) == [0, 1, 2]
    names = {path for path, _ in data.train.files} | {path for path, _ in data.test.files}
    assert len(names) == 30
    assert data.train[0][0].shape == (4, 2, 180, 240)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_directory(folder_data, tmp_path):
    first = load_event_data("ncaltech101", folder_data, 4, split_seed=1)
    for name in ("crab", "ant", "bass"):  # the same names, created in another order
        for path in sorted((folder_data / "events_np" / name).iterdir(), reverse=True):
            (tmp_path / "events_np" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "events_np" / name)
    again = load_event_data("ncaltech101", tmp_path, 4, split_seed=1)
    assert [p.name for p, _ in again.test.files] == [p.name for p, _ in first.test.files]
    assert again.info == first.info
    others = {load_event_data("ncaltech101", folder_data, 4, split_seed=seed).info.fingerprint for seed in range(2, 6)}
    assert len(others) == 4


def test_a_split_file_is_followed_and_checked(folder_data, tmp_path):
    path = tmp_path / "split.csv"
    path.write_text("train,ant/image_0001\ntrain,crab/image_0002\n\ntest,bass/image_0003\n")
    data = load_event_data("ncaltech101", folder_data, 4, split=str(path))
    assert [(p.parent.name, p.stem) for p, _ in data.train.files] == [("ant", "image_0001"), ("crab", "image_0002")]
    assert [(p.parent.name, p.stem) for p, _ in data.test.files] == [("bass", "image_0003")]
    path.write_text("train,ant/image_0001\ntest,ant/image_0001\n")  # in both
    with pytest.raises(UserError, match="line 2"):
        load_event_data("ncaltech101", folder_data, 4, split=str(path))
    with pytest.raises(UserError, match="neither one of random, first90, tebn nor a readable file"):
        load_event_data("ncaltech101", folder_data, 4, split=str(tmp_path / "nothing"))


def test_frames_are_made_once(gesture_data):
    load_event_data("dvs128", gesture_data, 4)
    made = gesture_data / "frames_number_4_split_by_number"
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    load_event_data("dvs128", gesture_data, 4)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert not list(gesture_data.glob(".building-*"))


def test_frames_alone_are_enough(gesture_data, tmp_path):
    load_event_data("dvs128", gesture_data, 4)
    shutil.copytree(gesture_data / "frames_number_4_split_by_number", tmp_path / "frames_number_4_split_by_number")
    assert len(load_event_data("dvs128", tmp_path, 4).train) == 22
    with pytest.raises(UserError, match=r"has frames for T = 4 and 5 are asked for; give one of these as -T"):
        load_event_data("dvs128", tmp_path, 5)


def test_frames_that_a_killed_build_of_spikingjelly_left_partial_are_completed(gesture_data, tmp_path):
    shutil.copytree(gesture_data / "events_np", tmp_path / "events_np")
    partial = tmp_path / "frames_number_4_split_by_number"
    (partial / "train/0").mkdir(parents=True)
    (partial / "train/0/user01_0.npz").write_bytes(b"PK, and no more")
    (tmp_path / "frames_number_4_split_by_number.building").touch()
    assert len(load_event_data("dvs128", tmp_path, 4).train) == 22
    assert not list(tmp_path.glob("*.building"))


def count_samples(root, results):
    data = load_event_data("dvs128", root, 5)
    results.put((len(data.train), len(data.test)))


@pytest.mark.slow
def test_processes_that_start_at_once_all_see_every_sample(gesture_data, tmp_path):
    shutil.copytree(gesture_data / "events_np", tmp_path / "events_np")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=count_samples, args=(tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=120) for _ in workers] == [(22, 11)] * 3
    for worker in workers:
        worker.join()


def test_a_truncated_event_file_is_named(gesture_data, tmp_path, capsys):
    shutil.copytree(gesture_data / "events_np", tmp_path / "events_np")
    broken = tmp_path / "events_np/train/3/user01_1.npz"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(UserError, match=r"1 bad files .*\n.*train/3/user01_1\.npz: cannot be read"):
        load_event_data("dvs128", tmp_path, 4)
    assert not (tmp_path / "frames_number_4_split_by_number").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:300]), "cannot be read"),
        (lambda p: np.savez(p, frames=np.zeros((3, 2, 128, 128))), r"has shape \[3, 2, 128, 128\].*\[4, 2, 128, 128\]"),
        (lambda p: np.savez(p, frames=np.zeros((4, 2, 64, 64))), r"has shape \[4, 2, 64, 64\]"),
        (lambda p: np.savez(p, other=np.zeros(3)), "has the key other and no 'frames'"),
    ],
    ids=["truncated", "T", "size", "key"],
)
def test_a_damaged_frame_file_is_named(damage, message, gesture_data, tmp_path):
    load_event_data("dvs128", gesture_data, 4)
    shutil.copytree(gesture_data / "frames_number_4_split_by_number", tmp_path / "frames_number_4_split_by_number")
    data = load_event_data("dvs128", tmp_path, 4, frames="npz")
    damage(data.train.files[7][0])
    with pytest.raises(DataError, match=message) as caught:
        _ = data.train[7]
    assert str(data.train.files[7][0]) in str(caught.value)


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_a_missing_data_set_tells_where_to_get_it_and_of_the_demo(name, tmp_path):
    about = DATA_SETS[name]
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError) as caught:
            load_event_data(name, folder, 4)
        message = str(caught.value)
        assert about.archives[0] in message and about.page in message and "--demo" in message
        assert str(folder / "download") in message


def test_a_wrong_archive_is_refused_and_kept(tmp_path):
    archive = tmp_path / "download/Caltech101.zip"
    archive.parent.mkdir()
    archive.write_text("<html>please log in</html>")
    with pytest.raises(UserError, match=r"Caltech101\.zip has the MD5 [0-9a-f]{32} and [0-9a-f]{32} is published"):
        load_event_data("ncaltech101", tmp_path, 4)
    assert archive.exists()


def aedat2(events):
    """CIFAR10-DVS's AEDAT 2.0: big-endian pairs of address and time stamp after a text header."""
    address = (
        (events["y"].astype(np.uint32) << 8) | (events["x"].astype(np.uint32) << 1) | events["p"].astype(np.uint32)
    )
    words = np.stack([address, events["t"].astype(np.uint32)], axis=1).astype(">u4")
    return b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n" + words.tobytes()


def test_cifar10dvs_recordings_are_read_on_current_numpy(tmp_path):
    for label, name in enumerate(("airplane", "truck")):
        for number in range(10):
            path = tmp_path / f"extract/{name}/cifar10_{name}_{number}.aedat"
            write_events(path.with_suffix(".npz"), 10 * label + number)
            with np.load(path.with_suffix(".npz")) as events:
                path.write_bytes(aedat2(events))
    sources = {p.stem: dict(np.load(p)) for p in tmp_path.glob("extract/*/*.npz")}
    for path in tmp_path.glob("extract/*/*.npz"):
        path.unlink()
    data = load_event_data("cifar10dvs", tmp_path, 2)
    assert (len(data.train), len(data.test)) == (18, 2)
    assert data.title.endswith("laid out as CIFAR10-DVS")
    path, _ = data.test.files[0]
    source = sources[path.stem]
    expected = np.zeros((2, 128, 128))
    # SpikingJelly's convention: both axes mirrored and exchanged, polarity inverted.
    np.add.at(expected, (1 - source["p"], 127 - source["x"], 127 - source["y"]), 1)
    assert np.array_equal(data.test[0][0].sum(0).numpy(), expected)


def test_ncaltech101_recordings_are_read(tmp_path):
    rng = np.random.default_rng(0)
    sources = {}
    for number in range(10):
        x, y, p = rng.integers(0, 34, 200), rng.integers(0, 34, 200), rng.integers(0, 2, 200)
        t = np.sort(rng.integers(0, 300_000, 200))
        packed = (x << 32) | (y << 24) | (p << 23) | t  # 5 bytes: x, y, polarity and 23 bits of time
        path = tmp_path / f"extract/Caltech101/ant/image_{number:04}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(int(v).to_bytes(5, "big") for v in packed))
        sources[path.stem] = (x, y, p)
    data = load_event_data("ncaltech101", tmp_path, 2, sensor_size=(34, 34))
    x, y, p = sources[data.test.files[0][0].stem]
    expected = np.zeros((2, 34, 34))
    np.add.at(expected, (p, y, x), 1)
    assert np.array_equal(data.test[0][0].sum(0).numpy(), expected)


def test_frames_of_another_sensor_size_are_refused(tmp_path):
    for number in range(10):
        write_events(tmp_path / f"events_np/ant/{number}.npz", number, 34, 34)
    load_event_data("ncaltech101", tmp_path, 2, sensor_size=(34, 34))
    with pytest.raises(UserError, match=r"10 bad files.*\n.*has shape \[2, 2, 34, 34\] and"):
        load_event_data("ncaltech101", tmp_path, 2)


def test_frame_size_resizes_and_keeps_the_mean(gesture_data):
    full = load_event_data("dvs128", gesture_data, 4)
    small = load_event_data("dvs128", gesture_data, 4, frame_size=(48, 64))
    assert small.train[0][0].shape == (4, 2, 48, 64)
    torch.testing.assert_close(small.train[0][0].mean(), full.train[0][0].mean(), rtol=0.02, atol=0)


def test_resized_frames_are_the_same_packed_and_not(gesture_data):
    read = load_event_data("dvs128", gesture_data, 4, frame_size=(32, 32), frames="npz")
    packed = load_event_data("dvs128", gesture_data, 4, frame_size=(32, 32))
    assert packed.train.store is not None and read.train.store is None
    for index in (0, 21):
        assert torch.equal(packed.train[index][0], read.train[index][0])


def test_the_folders_of_the_published_splitters_are_taken_as_a_split(folder_data, tmp_path):
    data = load_event_data("ncaltech101", folder_data, 4)
    for part, samples in {"train_dataset": data.train.files, "test_dataset": data.test.files}.items():
        for path, _ in samples:
            target = tmp_path / part / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for _ in range(2):  # also beside what the first start made there
        found = load_event_data("ncaltech101", tmp_path, 4)
        assert found.classes == data.classes
        for one, other in ((found.train, data.train), (found.test, data.test)):
            assert [(p.name, label) for p, label in one.files] == [(p.name, label) for p, label in other.files]
            assert all(torch.equal(one[i][0], other[i][0]) for i in range(len(one)))


def test_flip_and_shift_is_the_same_for_all_frames_and_drops_what_leaves():
    frames = torch.zeros(3, 2, 16, 16)
    frames[:, 0, 8, 3] = 1.0
    moves = set()
    for seed in range(300):
        out = flip_and_shift(frames, torch.Generator().manual_seed(seed))
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
        assert set(out.unique().tolist()) <= {0.0, 1.0}
        hit = out[0, 0].nonzero().tolist()
        moves.add((hit[0][0] - 8, hit[0][1]) if hit else None)
    assert {dy for dy, _ in moves - {None}} == set(range(-5, 6))
    columns = {x for _, x in moves - {None}}
    assert columns == set(range(9)) | set(range(7, 16))  # from 3 (not mirrored) and from 12 (mirrored)
    assert None in moves  # column 3 moved by -4 or -5
    unflipped = {flip_and_shift(frames, torch.Generator().manual_seed(s), flip=False)[0, 0].nonzero().tolist().__str__()
                 for s in range(300)}  # fmt: skip
    assert not any(", 12]" in hit for hit in unflipped)


def test_augmentation_depends_on_seed_epoch_and_sample_only(folder_data):
    data = load_event_data("ncaltech101", folder_data, 4, frame_size=(32, 32), augment=flip_and_shift, seed=5)
    first = data.train[3][0]
    torch.manual_seed(123)
    assert torch.equal(data.train[3][0], first)
    changed = []
    for epoch in range(1, 6):
        data.train.epoch = epoch
        changed.append(not torch.equal(data.train[3][0], first))
    assert any(changed)
    assert torch.equal(data.test[0][0], load_event_data("ncaltech101", folder_data, 4, frame_size=(32, 32)).test[0][0])


def batches_of(data, workers, epoch, rank=0, world_size=1):
    train, _, test = make_loaders(data, 4, workers, 7, process(rank, world_size))
    set_epoch(train, epoch)
    return list(train), list(test)


def test_training_batches_do_not_depend_on_the_number_of_workers(folder_data):
    data = load_event_data("ncaltech101", folder_data, 4, frame_size=(32, 32), augment=flip_and_shift)
    alone, _ = batches_of(data, 0, epoch=3)
    helped, _ = batches_of(data, 2, epoch=3)
    assert len(alone) == len(helped) == 6  # 27 samples in batches of 4, the rest dropped
    for (frames, labels), (same_frames, same_labels) in zip(alone, helped, strict=True):
        assert torch.equal(frames, same_frames) and torch.equal(labels, same_labels)


def test_every_epoch_has_its_own_order(folder_data):
    data = load_event_data("ncaltech101", folder_data, 4, frame_size=(32, 32))
    orders = []
    for epoch in (1, 2, 1):
        train, _ = batches_of(data, 0, epoch)
        orders.append(torch.cat([frames.sum((1, 2, 3, 4)) for frames, _ in train]))
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_test_shards_hold_every_sample_once(gesture_data, world_size):
    data = load_event_data("dvs128", gesture_data, 4, frame_size=(32, 32))
    sampled = [
        index
        for rank in range(world_size)
        for index in make_loaders(data, 2, 0, 0, process(rank, world_size))[2].sampler
    ]
    assert sorted(sampled) == list(range(11))


def test_a_batch_larger_than_the_data_is_refused(gesture_data):
    data = load_event_data("dvs128", gesture_data, 4)
    with pytest.raises(
        UserError, match=r"a step takes 24 training samples \(12 for each of 2 process\(es\)\) and there are 22"
    ):
        make_loaders(data, 12, 0, 0, process(0, 2))


def test_hidden_folders_are_no_classes(folder_data, tmp_path):
    load_event_data("ncaltech101", folder_data, 4)
    frames = tmp_path / "frames_number_4_split_by_number"
    shutil.copytree(folder_data / "frames_number_4_split_by_number", frames)
    (frames / ".ipynb_checkpoints").mkdir()
    assert load_event_data("ncaltech101", tmp_path, 4).classes == ["ant", "bass", "crab"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error_in_one_sentence(gesture_data, tmp_path):
    shutil.copytree(gesture_data / "events_np", tmp_path / "events_np")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot be made in --data-dir"):
            load_event_data("dvs128", tmp_path, 4)
    finally:
        tmp_path.chmod(0o755)


def test_published_checksums_are_used():
    for about in DATA_SETS.values():
        published = published_md5(about.reader)
        assert all(len(published[name]) == 32 for name in about.archives)


def test_packed_and_npz_frames_are_the_same_tensors_and_become_float32_on_the_way_to_the_network(folder_data):
    packed = load_event_data("ncaltech101", folder_data, 4, augment=flip_and_shift, seed=3)
    files = load_event_data("ncaltech101", folder_data, 4, augment=flip_and_shift, seed=3, frames="npz")
    assert packed.train.store is not None and files.train.store is None
    for index in range(0, 27, 5):
        (ours, label), (theirs, same) = packed.train[index], files.train[index]
        assert ours.dtype == theirs.dtype == torch.float32 and label == same and torch.equal(ours, theirs)
    for (small, labels), (frames, same) in zip(batches_of(packed, 0, 2)[0], batches_of(files, 0, 2)[0], strict=True):
        assert small.dtype == torch.uint8 and torch.equal(labels, same)
        ready, _ = time_first(small, labels)
        assert ready.dtype == torch.float32 and torch.equal(ready, frames.transpose(0, 1))


def test_a_packed_file_of_changed_frames_is_made_again(folder_data, tmp_path):
    load_event_data("ncaltech101", folder_data, 4)
    shutil.copytree(folder_data / "frames_number_4_split_by_number", tmp_path / "frames_number_4_split_by_number")
    first = load_event_data("ncaltech101", tmp_path, 4)
    path, _ = first.train.files[3]
    frames = np.load(path)["frames"][::-1]  # the same events in another order: the same split, other frames
    np.savez(path, frames=frames)
    again = load_event_data("ncaltech101", tmp_path, 4)
    assert again.train.store.path == first.train.store.path and again.fingerprint == first.fingerprint
    assert np.array_equal(again.train[3][0].numpy(), frames)


def test_the_same_name_in_training_and_test_is_two_samples(tmp_path):
    for number, part in enumerate(("train", "test")):
        write_events(tmp_path / f"events_np/{part}/0/a.npz", number)
    data = load_event_data("dvs128", tmp_path, 4)
    for part, frames in (("train", data.train[0][0]), ("test", data.test[0][0])):
        assert np.array_equal(frames.numpy(), frames_by_hand(tmp_path / f"events_np/{part}/0/a.npz", 4, 128, 128))
