"""CIFAR and WikiText-2 from small made-up files in the true formats, the data at hand, and the networks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

ROWS = 6
GENERATOR = np.random.default_rng(3)
PIXELS = GENERATOR.integers(0, 256, (ROWS, 3, 32, 32), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _program(paper):
    """On the path."""


def write_cifar(folder, name, binary):
    """Six images over the training files and two to test, as the University of Toronto's archives have them."""
    fine, coarse = np.arange(ROWS) % 10, np.arange(ROWS) % 3
    files = ["test_batch"] + [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["test", "train"]
    folder.mkdir()
    for i, file in enumerate(files):
        part = [0, 1] if i == 0 else [i] if name == "cifar10" else range(1, ROWS)
        flat = PIXELS.reshape(ROWS, -1)[part]
        if binary:
            labels = [coarse[part], fine[part]] if name == "cifar100" else [fine[part]]
            np.concatenate([*(x[:, None].astype(np.uint8) for x in labels), flat], 1).tofile(folder / f"{file}.bin")
        else:
            keys = {b"fine_labels": fine, b"coarse_labels": coarse} if name == "cifar100" else {b"labels": fine}
            content = {b"data": flat, **{key: [int(x[i]) for i in part] for key, x in keys.items()}}
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("own_folder", [True, False])
@pytest.mark.parametrize(
    ("name", "folder", "binary"),
    [
        ("cifar10", "cifar-10-batches-py", False),
        ("cifar10", "cifar-10-batches-bin", True),
        ("cifar100", "cifar-100-python", False),
        ("cifar100", "cifar-100-binary", True),
    ],
)
def test_cifar(tmp_path, name, folder, binary, own_folder):
    from accordion_paper.images import cifar

    write_cifar(tmp_path / folder, name, binary)
    data = cifar(name, tmp_path / folder if own_folder else tmp_path)
    images, labels = data.train
    np.testing.assert_array_equal(images, PIXELS[1:])
    assert labels.tolist() == [1, 2, 3, 4, 5] and data.test[1].tolist() == [0, 1]
    np.testing.assert_array_equal(data.test[0], PIXELS[:2])
    assert data.classes == int(name[5:])


def test_cifar_of_the_wrong_kind(tmp_path):
    from accordion_paper.images import cifar

    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar(folder, "cifar10", binary=True)
    (folder / "data_batch_3.bin").write_bytes(bytes(3000))
    with pytest.raises(ValueError, match=r"data_batch_3\.bin must hold rows of 3073 bytes, got 3000"):
        cifar("cifar10", tmp_path)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"cifar-10-batches-bin/ \(data_batch_1\.bin, .*binary version of Krizh"
    ):
        cifar("cifar10", tmp_path)


def test_a_pickle_cannot_run_anything(tmp_path):
    from accordion_paper.images import cifar

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    folder = tmp_path / "cifar-100-python"
    write_cifar(folder, "cifar100", binary=False)
    (folder / "train").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="this one asks for"):
        cifar("cifar100", tmp_path)
    assert not (tmp_path / "ran").exists()
    (folder / "train").write_bytes(pickle.dumps({b"data": 1}))
    with pytest.raises(ValueError, match="must hold a pickled dict with the keys b'data' and b'fine_labels'"):
        cifar("cifar100", tmp_path)


def test_normalised():
    import torch
    from accordion_paper.images import CIFAR10, Images

    data = Images((torch.tensor(PIXELS), torch.zeros(6)), (torch.tensor(PIXELS), torch.zeros(6)), 10, **CIFAR10)
    mean, std = (np.array(CIFAR10[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    np.testing.assert_allclose(data.normalised(torch.tensor(PIXELS)), (PIXELS / 255 - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shift", "mirror"), [(4, True), (2, False)])
def test_crops_and_mirrors(shift, mirror):
    """Each image is one of all that crops and mirrors can give, and over many draws each of them comes."""
    import torch
    from accordion_paper.images import CIFAR10, Images, augmented

    image = np.arange(1, 82, dtype=np.uint8).reshape(1, 9, 9)
    many = torch.tensor(np.repeat(image[None], 3000, 0))
    data = Images((many, many), (many, many), 10, **CIFAR10, shift=shift, mirror=mirror)
    padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)))
    places = range(2 * shift + 1)
    crops = [padded[:, i : i + 9, j : j + 9] for i in places for j in places]
    allowed = {crop.tobytes() for crop in crops} | {crop[:, :, ::-1].tobytes() for crop in crops if mirror}
    drawn = [x.numpy().tobytes() for x in augmented(many, data, torch.Generator().manual_seed(1))]
    assert set(drawn) == allowed
    assert drawn == [x.numpy().tobytes() for x in augmented(many, data, torch.Generator().manual_seed(1))]


def test_turns():
    """Against numpy: a pixel comes from where the turn takes its place, if that is in the image."""
    import torch
    from accordion_paper.images import turned

    images = torch.tensor(PIXELS)
    angles = (2 * torch.rand(ROWS, generator=torch.Generator().manual_seed(5)).numpy() - 1) * np.deg2rad(15)
    got = turned(images, 15.0, torch.Generator().manual_seed(5)).numpy()
    y, x = np.mgrid[:32, :32] - 15.5
    for image, angle, result in zip(PIXELS, angles, got, strict=True):
        rows = np.round(np.sin(angle) * x + np.cos(angle) * y + 15.5).astype(int)
        columns = np.round(np.cos(angle) * x - np.sin(angle) * y + 15.5).astype(int)
        inside = (rows >= 0) & (rows < 32) & (columns >= 0) & (columns < 32)
        expected = np.where(inside, image[:, rows.clip(0, 31), columns.clip(0, 31)], 0)
        assert (expected == result).mean() > 0.995  # but for places half way between two pixels
    assert abs(angles).max() < np.deg2rad(15) and abs(angles).max() > np.deg2rad(5)


@pytest.mark.parametrize("names", [("wiki.train.tokens", "wiki.valid.tokens"), ("train.txt", "valid.txt")])
def test_wikitext2(tmp_path, names):
    from accordion_paper.text import wikitext2

    (tmp_path / "wikitext-2").mkdir()
    for name, text in zip(names, (" \n = Robert <unk> = \n the the robert \n", "robert the king\n"), strict=True):
        (tmp_path / "wikitext-2" / name).write_text(text)
    data = wikitext2(tmp_path)
    # <unk>; then by frequency, first come first: <eos> 3, = 2, robert 2, the 2
    assert data.words == 5
    assert data.train.tolist() == [1, 2, 3, 0, 2, 1, 4, 4, 3, 1]
    assert data.test.tolist() == [3, 4, 0, 1]
    with pytest.raises(
        FileNotFoundError, match=r"wiki\.train\.tokens and wiki\.valid\.tokens or train\.txt and valid\.txt"
    ):
        wikitext2(tmp_path / "elsewhere")


def test_streams_and_windows():
    import torch
    from accordion_paper.text import streams, windows

    columns = streams(torch.arange(23), 3, 1, 3)
    assert columns.T.tolist() == [[7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 19, 20]]
    parts = [(x[:, 0].tolist(), y[:, 0].tolist()) for x, y in windows(columns, 4)]
    assert parts == [([7, 8, 9, 10], [8, 9, 10, 11]), ([11, 12], [12, 13])]
    with pytest.raises(ValueError, match="5 words is too short for 3 streams"):
        streams(torch.arange(5), 3, 0, 1)


def test_data_at_hand():
    from accordion_paper.images import digits
    from accordion_paper.text import topics

    data = digits()
    assert data.train[0].shape == (4000, 1, 14, 14) and data.test[0].shape == (1000, 1, 14, 14)
    assert sorted(set(data.test[1].tolist())) == list(range(10))
    assert (digits(100).train[0] == data.train[0][:100]).all()
    mean = float(data.train[0].float().mean()) / 255
    assert mean == pytest.approx(data.mean[0], abs=0.005)
    text = topics(vocabulary=300)
    assert text.words == 300 and int(text.train.max()) == 299 and len(text.train) > 5 * len(text.test) > 10_000


@pytest.mark.parametrize(("model", "options"), [("resnet18", {"width": 4, "channels": 1}), ("senet", {"width": 16})])
def test_networks(model, options):
    import torch
    from accordion_paper.models import MODELS

    network = MODELS[model](7, **options)
    size = 14 if options.get("channels") == 1 else 32
    assert network(torch.zeros(2, options.get("channels", 3), size, size)).shape == (2, 7)
    convolutions = [p for p in network.parameters() if p.dim() == 4]
    assert len(convolutions) == 20 and convolutions[-1].shape[0] == 8 * options["width"]


def test_vgg_has_nineteen_layers_of_weights():
    import torch
    from accordion_paper.models import vgg19bn

    network = vgg19bn(10).eval()
    assert sum(p.dim() > 1 for p in network.parameters()) == 19
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_lstm_keeps_its_state():
    import torch
    from accordion_paper.models import LSTM

    torch.manual_seed(0)
    network = LSTM(50, width=8, layers=2).eval()
    words = torch.randint(50, (6, 3))
    whole, _ = network(words)
    first, state = network(words[:4])
    second, _ = network(words[4:], state)
    torch.testing.assert_close(whole, torch.cat([first, second]))
    assert network.head.weight is network.words.weight
