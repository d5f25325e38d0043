"""Pictures show what they should, pixel by pixel."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.text import Text
from PIL import Image, ImageSequence

from tests.conftest import write_events
from utils import pictures
from utils.analysis import figures
from utils.errors import UserError
from utils.pictures import save_as_gif, save_as_pic, save_every_frame_of_an_entire_DVS_dataset

BLACK, GREEN, BLUE = (0, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def spikes():
    """Frames of 2 x 3 pixels: polarity 0 at the top left, polarity 1 at the bottom right; then both in one place."""
    x = torch.zeros(2, 2, 2, 3)
    x[0, 0, 0, 0] = 1
    x[0, 1, 1, 2] = 1
    x[1, :, 0, 1] = 1
    return x


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_polarity_0_is_green_and_polarity_1_blue_one_pixel_each(spikes, tmp_path):
    paths = save_as_pic(spikes, tmp_path / "new", "clap")
    assert [path.name for path in paths] == ["clap_0.png", "clap_1.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["clap_0.png", "clap_1.png"]
    assert pixels(paths[0]).tolist() == [
        [list(c) for c in row] for row in [(GREEN, BLACK, BLACK), (BLACK, BLACK, BLUE)]
    ]
    assert pixels(paths[1]).tolist()[0][1] == [0, 255, 255] and pixels(paths[1]).sum() == 510


def test_counts_saturate_instead_of_wrapping_around_and_full_sets_the_brightest(spikes, tmp_path):
    (path, _) = save_as_pic(300 * spikes.numpy(), str(tmp_path), "many")
    assert pixels(path)[0, 0].tolist() == [0, 255, 0]
    (path, _) = save_as_pic(2 * spikes, tmp_path, "dim", scale=3, full=4)
    assert pixels(path).shape == (6, 9, 3)
    assert (pixels(path)[:3, :3] == [0, 127, 0]).all() and pixels(path)[:, 3:6].sum() == 0


@pytest.mark.parametrize(
    ("shape", "keywords", "words"),
    [
        ((2, 3, 4, 4), {}, r"\[T, 2, H, W\]"),
        ((2, 2, 4, 4), {"scale": 0}, "scale=0"),
        ((1, 2, 4, 4), {"full": 0}, "full=0"),
    ],
)
def test_what_cannot_be_a_picture_is_refused(shape, keywords, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save_as_pic(torch.zeros(shape), tmp_path, "x", **keywords)


def test_a_gif_has_every_frame(spikes, tmp_path):
    save_as_gif(spikes, tmp_path / "a.gif", scale=2)
    with Image.open(tmp_path / "a.gif") as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    assert len(frames) == 2 and frames[0].shape == (4, 6, 3)
    assert frames[0][0, 0].tolist() == [0, 255, 0] and frames[1][0, 2].tolist() == [0, 255, 255]


@pytest.fixture
def small_data(tmp_path):
    """Two classes of two training samples and one test sample, in the layout of DVS128 Gesture."""
    for label in range(2):
        for number, part in enumerate(("train", "train", "test")):
            write_events(tmp_path / f"data/events_np/{part}/{label}/s{number}.npz", 10 * label + number)
    return tmp_path / "data"


def test_a_whole_data_set_in_one_line_and_again_only_what_is_missing(small_data, tmp_path, monkeypatch):
    out = tmp_path / "png"
    assert save_every_frame_of_an_entire_DVS_dataset("DVS128Gesture", str(small_data), 2, str(out)) == 12
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
    assert files.pop(0) == "pictures.json"
    assert files == sorted(
        f"{part}/{label}/{name}_{t}.png"
        for label in (0, 1)
        for part, name in (("train", "s0"), ("train", "s1"), ("test", "s2"))
        for t in (0, 1)
    )
    with np.load(small_data / "frames_number_2_split_by_number/train/1/s0.npz") as file:
        frame = file["frames"][1]
    shown = pixels(out / "train/1/s0_1.png")
    assert (shown[..., 1] == 255 * (frame[0] > 0)).all() and (shown[..., 2] == 255 * (frame[1] > 0)).all()

    # A kill while a file is written leaves it under another name: it does not count as made.
    (out / "test/0/s2_1.png").rename(out / "test/0/.s2_1.png.partial")
    untouched = (out / "train/1/s0_1.png").stat().st_mtime_ns
    made = []
    monkeypatch.setattr(pictures, "save_as_pic", lambda *a: made.append(a[2]) or save_as_pic(*a))
    assert save_every_frame_of_an_entire_DVS_dataset("dvs128", small_data, 2, out, number_of_threads=1) == 2
    assert made == ["s2"] and pixels(out / "test/0/s2_1.png").shape == (128, 128, 3)
    assert (out / "train/1/s0_1.png").stat().st_mtime_ns == untouched
    assert not list(out.rglob(".*"))


def test_a_folder_holds_pictures_of_one_t_scale_and_brightness(small_data, tmp_path):
    out = tmp_path / "png"
    save_every_frame_of_an_entire_DVS_dataset("dvs128", small_data, 2, out)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    for T, look, words in (
        (1, {}, "T 2, scale 1, full 1.0 there, T 1, scale 1, full 1.0 here"),
        (2, {"scale": 2}, "scale 2, full 1.0 here"),
        (2, {"full": 3.0}, "full 3.0 here"),
    ):
        with pytest.raises(UserError, match=f"png holds pictures of another kind: .*{words}; choose another folder"):
            save_every_frame_of_an_entire_DVS_dataset("dvs128", small_data, T, out, **look)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
    assert save_every_frame_of_an_entire_DVS_dataset("dvs128", small_data, 2, out) == 0
    assert save_every_frame_of_an_entire_DVS_dataset("dvs128", small_data, 1, tmp_path / "other") == 6


def test_mistakes_in_a_whole_data_set_are_sentences(small_data, tmp_path):
    call = save_every_frame_of_an_entire_DVS_dataset
    with pytest.raises(UserError, match="use DVS128Gesture, CIFAR10DVS or NCaltech101"):
        call("MNIST", small_data, 2, tmp_path / "png")
    with pytest.raises(UserError, match="number_of_threads=0"):
        call("DVS128Gesture", small_data, 2, tmp_path / "png", 0)
    with pytest.raises(UserError, match="scale=0"):
        call("DVS128Gesture", small_data, 2, tmp_path / "png", scale=0)
    assert not (tmp_path / "png").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written: File exists; make room"):
        save_as_pic(torch.zeros(1, 2, 4, 4), tmp_path / "file")
    call("DVS128Gesture", small_data, 2, tmp_path / "png")
    (tmp_path / "png/train/0/s1_0.png").unlink()
    (small_data / "frames_number_2_split_by_number/train/0/s1.npz").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"s1\.npz: cannot be read"):
        call("DVS128Gesture", small_data, 2, tmp_path / "png")


def colour_at(figure, ax, x, y):
    """The drawn colour at a place in the coordinates of ``ax``, RGB 0 to 255."""
    figure.canvas.draw()
    column, row = ax.transData.transform((x, y))
    drawn = np.asarray(figure.canvas.buffer_rgba())
    return drawn[drawn.shape[0] - 1 - round(row), round(column), :3].astype(int)


def of_map(value):
    return np.round(255 * np.array(colormaps[figures.MAP](value)[:3])).astype(int)


def close(a, b):
    return np.abs(a - b).max() <= 2


def test_a_spike_map_has_the_colour_of_its_rate_at_its_place():
    frames = np.zeros((2, 8, 8))
    rates = {"first": np.zeros((2, 4, 4)), "second": np.zeros((2, 2, 2))}
    rates["first"][0, 0, 3] = 0.5  # step 1, the upper right corner: 2 x 2 pixels of the input
    rates["second"][1, 1, 0] = 0.25  # step 2, the lower left quarter
    figure = figures.draw_spikes(frames, rates, "title", shade=False)
    axes = np.array(figure.axes[:6]).reshape(3, 2)  # input, first, second; the colour bar is the last
    assert close(colour_at(figure, axes[1, 0], 7, 1), of_map(1.0))  # the largest rate is the end of the scale
    assert close(colour_at(figure, axes[1, 1], 7, 1), of_map(0.0))
    assert close(colour_at(figure, axes[2, 1], 2, 6), of_map(0.5))
    assert close(colour_at(figure, axes[2, 0], 2, 6), of_map(0.0))
    assert len(figure.axes) == 7 and "share" in figure.axes[6].get_ylabel()  # one colour scale


def test_the_steps_of_a_spike_map_can_be_chosen():
    frames = np.zeros((16, 4, 4))
    rates = {"layer": np.zeros((16, 1, 1))}
    rates["layer"][9] = 0.5
    rates["layer"][10] = 1.0  # not shown: not the end of the colour scale
    figure = figures.draw_spikes(frames, rates, "title", shade=False, steps=[12, 10])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["step 10", "step 12"]
    assert close(colour_at(figure, figure.axes[2], 2, 2), of_map(1.0))
    assert close(colour_at(figure, figure.axes[3], 2, 2), of_map(0.0))
    default = figures.draw_spikes(frames, rates, "title")
    titles = [ax.get_title() for ax in default.axes[:8]]
    assert titles == [f"step {t}" for t in (1, 3, 5, 7, 10, 12, 14, 16)]
    every = figures.draw_spikes(frames, rates, "title", steps=range(1, 17))
    assert [ax.get_title() for ax in every.axes[:16]] == [str(t) for t in range(1, 17)]
    with pytest.raises(UserError, match="--steps 17 is none of the 16 time steps"):
        figures.draw_spikes(frames, rates, "title", steps=[1, 17])


def test_the_input_shows_through_a_spike_map():
    frames = np.zeros((1, 2, 2))
    frames[0, 0, 0] = 1
    figure = figures.draw_spikes(frames, {"layer": np.zeros((1, 1, 1))}, "title")
    shown, hidden = (colour_at(figure, figure.axes[1], x, y) for x, y in ((0.5, 0.5), (1.5, 1.5)))
    assert (shown < hidden).all()


def test_the_azo_figure_puts_steps_and_channels_where_they_were_replaced():
    shares = np.zeros((3, 2, 4, 8))  # epochs, S, T, C
    shares[2, 1, 3, 5] = 1.0  # epoch 3, the second scale, step 4, channel 5
    figure = figures.draw_azo([1, 2, 3], shares, [1, 3], "title")
    steps, channels = figure.axes[1], figure.axes[3]
    assert close(colour_at(figure, channels, 3, 5), of_map(1.0))  # 1 of 4 steps, the largest
    assert close(colour_at(figure, steps, 3, 4), of_map(0.5))  # 1 of 8 channels
    assert close(colour_at(figure, steps, 3, 3), of_map(0.0)) and close(colour_at(figure, steps, 2, 4), of_map(0.0))
    assert close(colour_at(figure, figure.axes[2], 3, 5), of_map(0.0))


def test_an_epoch_without_a_record_of_azo_is_a_gap_and_the_others_keep_their_columns():
    shares = np.zeros((3, 1, 4, 8))  # epochs 1, 2 and 4
    shares[2] = 1.0
    figure = figures.draw_azo([1, 2, 4], shares, [1], "title")
    steps, channels = figure.axes[:2]
    for ax in (steps, channels):
        assert close(colour_at(figure, ax, 4, 2), of_map(1.0)) and close(colour_at(figure, ax, 2, 2), of_map(0.0))
        assert close(colour_at(figure, ax, 3, 2), np.array([255, 255, 255]))
    assert "white: no record" in figure.get_suptitle()
    assert "white" not in figures.draw_azo([1, 2, 3], shares, [1], "title").get_suptitle()


def test_the_attention_figure_draws_every_scale():
    time = np.array([[0.1, 0.2, 0.7], [0.9, 0.8, 0.3]])
    channel = np.zeros((2, 3, 4))
    channel[1, 2, 0] = 1.0
    figure = figures.draw_attention(time, np.zeros_like(time), channel, [1, 3], "title")
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["1 x 1"] == [0.1, 0.2, 0.7] and lines["3 x 3"] == [0.9, 0.8, 0.3]
    assert close(colour_at(figure, figure.axes[2], 3, 0), of_map(1.0))
    assert close(colour_at(figure, figure.axes[1], 3, 0), of_map(0.0))


def test_curves_show_the_numbers_and_refuse_more_runs_than_colours():
    run = {"epoch": [1, 2], "train_acc1": [10, 20], "test_acc1": [11, 21], "train_loss": [3, 2], "test_loss": [4, 3]}
    figure = figures.draw_curves({"one": run, "two": {**run, "test_acc1": [50, 60]}})
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata())]
    assert [list(y) for y in drawn] == [[10, 20], [11, 21], [10, 20], [50, 60]]
    assert [ax.get_ylabel() for ax in figure.axes] == ["accuracy, %", "loss"]
    with pytest.raises(UserError, match="at most 7"):
        figures.draw_curves({str(n): run for n in range(8)})


@pytest.mark.parametrize("letters", [5, 25, 60, 95, 300])
def test_names_of_runs_stay_on_the_page(letters):
    run = {"epoch": [1, 2], "train_acc1": [10, 20], "test_acc1": [11, 21], "train_loss": [3, 2], "test_loss": [4, 3]}
    figure = figures.draw_curves({f"run_{n}_".ljust(letters, "w"): run for n in range(3)})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0
    assert legend.get_texts()[0].get_text().replace("\n", "") == "run_0_".ljust(letters, "w")
    assert all(ax.get_window_extent().height > 200 for ax in figure.axes)  # the curves keep their place


def test_no_text_is_smaller_than_7_points_at_the_width_of_a_page():
    channel = np.full((4, 16, 8), 0.25)
    run = {"epoch": [1], "train_acc1": [1], "test_acc1": [1], "train_loss": [1], "test_loss": [1]}
    drawn = [
        figures.draw_frames(np.zeros((16, 2, 32, 32)), "title"),
        figures.draw_spikes(np.zeros((16, 8, 8)), {str(n): np.zeros((16, 2, 2)) for n in range(6)}, "title"),
        figures.draw_attention(channel[..., 0], channel[..., 0], channel, [1, 3, 5, 7], "title"),
        figures.draw_azo([1, 2], np.zeros((2, 4, 16, 8)), [1, 3, 5, 7], "title"),
        figures.draw_spikes(np.zeros((16, 8, 8)), {"a": np.zeros((16, 2, 2))}, "title", steps=range(1, 17)),
        figures.draw_curves({"run": run}),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        assert figure.get_figwidth() <= figures.WIDTH + 1e-9
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7
