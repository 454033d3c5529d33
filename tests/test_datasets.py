"""Image classes, the datasets and their cache, on small archives made here and on the real ones where they are."""

import csv
import io
import json
import logging
import os
import unicodedata
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import tiny
from hyperax.fewshot.datasets import Glyphs, ImageClasses, ImageFolder, MetaDataset, MiniImageNet, Omniglot, describe
from hyperax.fewshot.datasets import cache as cache_module
from hyperax.fewshot.datasets import glyphs as glyphs_module
from hyperax.fewshot.datasets.cache import cached

Image = pytest.importorskip("PIL.Image")

BACKGROUND = (
    "Alphabet_of_the_Magi 20 Anglo-Saxon_Futhorc 29 Arcadian 26 Armenian 41 Asomtavruli_(Georgian) 40 Balinese 24 "
    "Bengali 46 Blackfoot_(Canadian_Aboriginal_Syllabics) 14 Braille 26 Burmese_(Myanmar) 34 Cyrillic 33 "
    "Early_Aramaic 22 Futurama 26 Grantha 43 Greek 24 Gujarati 48 Hebrew 22 "
    "Inuktitut_(Canadian_Aboriginal_Syllabics) 16 Japanese_(hiragana) 52 Japanese_(katakana) 47 Korean 40 Latin 26 "
    "Malay_(Jawi_-_Arabic) 40 Mkhedruli_(Georgian) 41 N_Ko 33 Ojibwe_(Canadian_Aboriginal_Syllabics) 14 Sanskrit 42 "
    "Syriac_(Estrangelo) 23 Tagalog 17 Tifinagh 55"
)
EVALUATION = (
    "Angelic 20 Atemayar_Qelisayer 26 Atlantean 26 Aurek-Besh 26 Avesta 26 Ge_ez 26 Glagolitic 45 Gurmukhi 45 "
    "Kannada 41 Keble 26 Malayalam 47 Manipuri 40 Mongolian 30 Old_Church_Slavonic_(Cyrillic) 45 Oriya 46 Sylheti 28 "
    "Syriac_(Serto) 23 Tengwar 25 Tibetan 42 ULOG 26"
)


def encoded(pixels, mode="L", format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def write_omniglot(folder, part, alphabets, drawings=1, side=12):
    random = np.random.default_rng(len(part))
    folder.mkdir(parents=True, exist_ok=True)
    words = alphabets.split()
    with zipfile.ZipFile(folder / f"images_{part}.zip", "w") as archive:
        archive.writestr("__MACOSX/._junk.png", b"")
        for alphabet, count in zip(words[::2], words[1::2], strict=True):
            for character in range(1, int(count) + 1):
                for drawing in range(1, drawings + 1):
                    paper = 255 * (random.random((side, side)) < 0.8)
                    name = f"images_{part}/{alphabet}/character{character:02}/0001_{drawing:02}.png"
                    archive.writestr(name, encoded(paper, "1"))


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory):
    """1623 characters in Omniglot's alphabets, one noise drawing each, and a cache for them."""
    folder = tmp_path_factory.mktemp("data")
    write_omniglot(folder / "omniglot", "background", BACKGROUND)
    write_omniglot(folder / "omniglot", "evaluation", EVALUATION)
    return {"data_dir": str(folder), "cache_dir": str(folder / "cache")}


@pytest.fixture
def small(tmp_path):
    write_omniglot(tmp_path / "data" / "omniglot", "background", "A 2 B 3", drawings=2, side=8)
    write_omniglot(tmp_path / "data" / "omniglot", "evaluation", "C 2", drawings=2, side=8)
    return {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}


def same(one: MetaDataset, other: MetaDataset):
    return all(
        a.names == b.names and np.array_equal(a.images, b.images)
        for a, b in zip(one.splits.values(), other.splits.values(), strict=True)
    )


# Image classes


def three_classes():
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 2)).astype(np.uint8)
    return ImageClasses.from_lists({"a": images[:1], "b": images[1:3], "c": images[3:]}), images


def test_classes_lie_side_by_side():
    classes, images = three_classes()
    assert (classes.images.dtype, classes.start.dtype, classes.count.dtype) == (np.uint8, np.int32, np.int32)
    np.testing.assert_array_equal(classes.images, images)
    assert (classes.start.tolist(), classes.count.tolist()) == ([0, 1, 3], [1, 2, 3])
    moved = jax.device_put(classes)
    assert isinstance(moved.images, jax.Array)
    assert moved.names == classes.names


def test_subset_keeps_order_and_images():
    classes, images = three_classes()
    chosen = classes.subset([2, 0])
    assert (chosen.names, chosen.start.tolist()) == (("c", "a"), [0, 3])
    np.testing.assert_array_equal(chosen.images, np.concatenate([images[3:], images[:1]]))
    side_by_side = classes.subset([1, 2])
    assert np.shares_memory(side_by_side.images, classes.images)
    np.testing.assert_array_equal(side_by_side.images, images[1:])


def test_rotations_are_new_classes():
    classes, images = three_classes()
    rotated = classes.rotated()
    assert rotated.num_classes == 12
    for quarter in range(4):
        for index, name in enumerate(classes.names):
            turned = index + 3 * quarter
            assert rotated.names[turned] == (name if quarter == 0 else f"{name}@{90 * quarter}")
            block = rotated.images[rotated.start[turned] :][: rotated.count[turned]]
            own = images[classes.start[index] :][: classes.count[index]]
            np.testing.assert_array_equal(block, [np.rot90(image, quarter) for image in own])
    top_right = np.zeros((1, 3, 3))
    top_right[0, 0, 2] = 255
    quarter_turn = ImageClasses.from_lists({"a": top_right}).rotated().images[1]
    assert quarter_turn[0, 0, 0] == 255, "counterclockwise"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: ImageClasses.from_lists({}), "no class"),
        (lambda c: ImageClasses.from_lists({"a": []}), "'a' needs images"),
        (lambda c: ImageClasses.from_lists({"a": [np.zeros((2, 2)), np.zeros((3, 3))]}), "all of one shape"),
        (lambda c: ImageClasses.from_lists({"a": [np.full((2, 2), 0.5)]}), "not integers from 0 to 255"),
        (lambda c: ImageClasses.from_lists({"a": np.zeros((1, 2, 2)), "b": np.zeros((1, 3, 3))}), "others of"),
        (lambda c: ImageClasses.from_lists({"a": np.zeros((1, 2, 3))}).rotated(), "square images, not 2 x 3"),
        (lambda c: ImageClasses(c.images.astype(float), c.start, c.count, c.names), "uint8"),
        (lambda c: ImageClasses(c.images, c.start, c.count, ("a",)), "one entry for each of the 1 class names"),
        (lambda c: ImageClasses(c.images[:4], c.start, c.count, c.names), "inside the array of 4 images"),
        (lambda c: c.subset([3]), "from 0 to 2"),
        (lambda c: c.subset([]), "at least one"),
        (lambda c: c.subset([1, 1]), "named twice"),
    ],
)
def test_wrong_classes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(three_classes()[0])


# Omniglot


@pytest.mark.parametrize(
    ("split", "sizes"), [("papers", (1200, 100, 323)), ("vinyals", (1028, 172, 423)), ("alphabets", (None, None, 659))]
)
def test_omniglot_splits(omniglot, split, sizes):
    dataset = Omniglot(split=split, rotations=False, size=12).load(**omniglot)
    names = [set(classes.names) for classes in dataset.splits.values()]
    assert len(set.union(*names)) == sum(map(len, names)) == 1623
    assert all(size in (None, len(n)) for size, n in zip(sizes, names, strict=True))
    alphabets = [{name.split("/")[0] for name in n} for n in names]
    if split == "alphabets":
        assert not alphabets[0] & alphabets[1]
        assert [len(a) for a in alphabets] == [25, 5, 20]
    if split == "vinyals":
        assert alphabets[1] == {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
        assert alphabets[0] & alphabets[2] == {"Gurmukhi"}
        assert {f"Gurmukhi/character{n}" for n in (42, 43, 44, 45)} <= names[2]
        assert "Gurmukhi/character41" in names[0]


def test_omniglot_seed(omniglot):
    load = lambda seed: Omniglot(seed=seed, rotations=False, size=12).load(**omniglot)
    assert same(load(0), load(0))
    assert load(0).train.names != load(1).train.names


def test_omniglot_pixels_and_rotations(omniglot):
    plain = Omniglot(rotations=False, size=12, resize="nearest").load(**omniglot)
    full = Omniglot(size=12, resize="nearest").load(**omniglot)
    assert [c.num_classes for c in full.splits.values()] == [4800, 400, 1292]
    np.testing.assert_array_equal(full.test.images[323:646], np.rot90(plain.test.images, 1, axes=(1, 2)))
    assert plain.train.image_shape == (12, 12, 1)
    assert set(np.unique(plain.train.images)) == {0, 255}
    assert 0.15 < np.mean(plain.train.images == 255) < 0.25, "ink is 255, a fifth of the drawing"
    alphabet, character = plain.validation.names[0].split("/")
    with zipfile.ZipFile(Path(omniglot["data_dir"], "omniglot", "images_background.zip")) as archive:
        file = f"images_background/{alphabet}/{character}/0001_01.png"
        if file not in archive.namelist():
            pytest.fail("the first validation character of seed 0 should be a background one")
        drawing = np.asarray(Image.open(io.BytesIO(archive.read(file))).convert("L"))
    np.testing.assert_array_equal(plain.validation.images[0, :, :, 0], 255 - drawing)


def test_antialias_has_greys_and_nearest_has_none(small):
    grey = Omniglot(split="alphabets", size=5).load(**small).train.images
    hard = Omniglot(split="alphabets", size=5, resize="nearest").load(**small).train.images
    assert len(np.unique(grey)) > 10
    assert set(np.unique(hard)) == {0, 255}


def test_unzipped_folder_and_direct_folder_and_environment(small, tmp_path, monkeypatch):
    option = Omniglot(split="alphabets", size=8)
    zipped = option.load(**small)
    for part in ("background", "evaluation"):
        with zipfile.ZipFile(Path(small["data_dir"], "omniglot", f"images_{part}.zip")) as archive:
            archive.extractall(tmp_path / "unzipped")
    assert same(zipped, option.load(str(tmp_path / "unzipped"), small["cache_dir"]))
    monkeypatch.setenv("HYPERAX_DATA", small["data_dir"])
    monkeypatch.setenv("HYPERAX_CACHE", str(tmp_path / "other"))
    assert same(zipped, option.load())
    assert (tmp_path / "other").exists()


def test_provenance_and_description(small):
    dataset = Omniglot(split="alphabets", size=8).load(**small)
    assert json.loads(json.dumps(dataset.provenance)) == dataset.provenance
    assert dataset.provenance["config"]["split"] == "alphabets"
    assert sum(dataset.provenance["classes"].values()) == 4 * 7
    assert sum(dataset.provenance["images"].values()) == 4 * 14
    assert set(dataset.provenance["sources"]) == {"background", "evaluation"}
    assert "test 8 16 2 8 x 8 x 1" in [" ".join(line.split()) for line in describe(dataset).splitlines()]


def test_omniglot_errors(small, tmp_path):
    with pytest.raises(ValueError, match=r"hyperax data fetch omniglot.*--data-dir"):
        Omniglot().load(str(tmp_path / "nowhere"), small["cache_dir"])
    with pytest.raises(ValueError, match="1623 characters, and these archives have 7"):
        Omniglot(split="papers").load(**small)
    with pytest.raises(ValueError, match="'papers', 'alphabets', 'vinyals', not 'thirds'"):
        Omniglot(split="thirds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not 'bicubic'"):
        Omniglot(resize="bicubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Omniglot(size=0)
    path = Path(small["data_dir"], "omniglot", "images_background.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"not a readable zip archive.*delete it and run `hyperax data fetch omniglot`"
    ):
        Omniglot(split="alphabets").load(**small)
    path.write_bytes(whole.replace(b"IDAT", b"IDXT", 1))  # the archive's CRC of this file is wrong then
    with pytest.raises(ValueError, match=r"0001_01.png in .* cannot be read"):
        Omniglot(split="alphabets").load(**small)
    assert not Path(small["cache_dir"]).exists() or not any(Path(small["cache_dir"]).iterdir())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images_background/readme.txt", "no drawing")
    with pytest.raises(ValueError, match="holds no <Alphabet>"):
        Omniglot(split="alphabets").load(**small)


# Cache


def test_a_second_load_does_not_decode(small, monkeypatch):
    first = Omniglot(split="alphabets", size=8).load(**small)

    def never(*arguments):
        raise AssertionError("decoded again")

    monkeypatch.setattr("hyperax.fewshot.datasets.omniglot.decode", never)
    assert same(first, Omniglot(split="alphabets", size=8).load(**small))
    with pytest.raises(AssertionError, match="decoded again"):
        Omniglot(split="alphabets", size=7).load(**small)
    assert not list(Path(small["cache_dir"]).glob(".building*")), "a failed decoding leaves nothing"


@pytest.mark.parametrize("damage", ["byte", "truncated", "missing", "json"])
def test_a_damaged_entry_is_rebuilt(small, caplog, damage):
    option = Omniglot(split="alphabets", size=8)
    first = option.load(**small)
    expected = [classes.images.copy() for classes in first.splits.values()]
    (entry,) = Path(small["cache_dir"]).iterdir()
    array = entry / "background.npy"
    content = bytearray(array.read_bytes())
    content[-1] ^= 255
    if damage == "missing":
        array.unlink()
    elif damage == "json":
        (entry / "entry.json").write_text("[1")
    else:
        # A new file: the old one is still mapped by `first`.
        array.unlink()
        array.write_bytes(content if damage == "byte" else content[:40])
    with caplog.at_level(logging.WARNING):
        again = option.load(**small)
    assert "is damaged" in caplog.text
    for images, classes in zip(expected, again.splits.values(), strict=True):
        np.testing.assert_array_equal(images, classes.images)
    caplog.clear()
    option.load(**small)
    assert not caplog.text
    assert [path.name for path in Path(small["cache_dir"]).iterdir()] == [entry.name]


def _fill(allocate):
    allocate("all", (6, 2, 2, 1))[:] = 7
    return {"all": {"a": 2, "b": 4}}


def _load_in_process(folder, barrier, results):
    def build(allocate):
        barrier.wait(30)  # both have seen that the entry is missing
        return _fill(allocate)

    parts, digests = cached("two", {"k": 1}, build, folder)
    results.put((int(parts["all"].images.sum()), digests["all"]))


def test_two_processes_at_once(tmp_path):
    barrier, results = tiny.COPIES.Barrier(2), tiny.COPIES.Queue()
    both = [tiny.COPIES.Process(target=_load_in_process, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for process in both:
        process.join(30)
    assert first == second
    assert first[0] == 6 * 4 * 7
    assert len(list(tmp_path.iterdir())) == 1


def test_abandoned_entries_go_and_running_ones_stay(tmp_path):
    old, new = tmp_path / ".building-old", tmp_path / ".building-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    cached("fill", {}, _fill, str(tmp_path))
    assert not old.exists()
    assert new.exists()


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*--cache-dir"):
        cached("fill", {}, _fill, str(tmp_path / "file"))
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3}))
    with pytest.raises(ValueError, match=r"GB left.*--cache-dir"):
        cached("fill", {}, _fill, str(tmp_path))


# miniImageNet


def write_mini(folder, images=None):
    """Four classes of two images each; `images` replaces the bytes of some."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"train": ["n1", "n0"], "val": ["n2"], "test": ["n3"]}
    random = np.random.default_rng(0)
    pixels = {}
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for split, classes in labels.items():
            with (folder / f"{split}.csv").open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["filename", "label"])
                for label in classes:
                    for index in range(2):
                        name = f"{label}{index}.png"
                        rows.writerow([name, label])
                        pixels[name] = random.integers(0, 256, (6, 6, 3))
                        archive.writestr(f"images/{name}", (images or {}).get(name, encoded(pixels[name], "RGB")))
    return pixels


def test_mini_imagenet(tmp_path):
    pixels = write_mini(tmp_path / "miniimagenet")
    dataset = MiniImageNet(size=6).load(str(tmp_path), str(tmp_path / "cache"))
    assert {split: classes.names for split, classes in dataset.splits.items()} == {
        "train": ("n0", "n1"),
        "validation": ("n2",),
        "test": ("n3",),
    }
    np.testing.assert_array_equal(dataset.train.images[3], pixels["n11.png"])
    assert not dataset.train.images.flags.writeable, "mapped from the cache"
    direct = MiniImageNet(size=3).load(str(tmp_path / "miniimagenet"), str(tmp_path / "cache"))
    assert direct.test.image_shape == (3, 3, 3)


def test_mini_imagenet_errors(tmp_path):
    load = lambda: MiniImageNet(size=6).load(str(tmp_path), str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"no images.zip or images/ in.*ImageNet's terms"):
        load()
    write_mini(tmp_path, images={"n20.png": b"not an image"})
    with pytest.raises(ValueError, match=r"images/n20.png in .* is not a readable image.*replace or remove"):
        load()
    write_mini(tmp_path, images={"n20.png": encoded(np.zeros((6, 6)))[:45]})
    with pytest.raises(ValueError, match=r"images/n20.png"):
        load()
    write_mini(tmp_path)
    (tmp_path / "val.csv").write_text("filename,label\nn20.png,n0\n")
    with pytest.raises(ValueError, match=r"1 label\(s\) are named twice.*n0"):
        load()
    write_mini(tmp_path)
    table = tmp_path / "train.csv"
    table.write_text("filename,label\n" + "".join(f"x{n}.png,n0\n" for n in range(5)))
    with pytest.raises(ValueError, match=r"names 5 image\(s\).*x0.png, x1.png, x2.png, \.\.\."):
        load()
    table.write_text("file,class\na,b\n")
    with pytest.raises(ValueError, match=r"train.csv needs the columns filename,label"):
        load()
    table.write_text("filename,label\n")
    with pytest.raises(ValueError, match="names no image"):
        load()
    table.write_text("filename,label\nn00.png\n")
    with pytest.raises(ValueError, match="line 2 of"):
        load()
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load()
    table.unlink()
    with pytest.raises(ValueError, match=r"there is no .*train.csv"):
        load()


# Image folders


def write_folder(root, names, images=2, side=8):
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for image in range(images):
            Image.new("RGB", (side, side), (10 * index, image, 0)).save(root / name / f"{image}.png")


def load_folder(root, **options):
    return ImageFolder(str(root), **({"size": 8} | options)).load(cache_dir=str(root.parent / "cache"))


def test_which_folder_is_read(tmp_path, monkeypatch):
    for place in ("here", "there", "environment"):
        write_folder(tmp_path / place / "mine", [f"{place}{n}" for n in range(3)])
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HYPERAX_DATA", str(tmp_path / "environment"))

    def read(path, data_dir=None):
        dataset = ImageFolder(path, size=8).load(data_dir, str(tmp_path / "cache"))
        return dataset.name, dataset.train.names[0][:-1]

    assert read("mine") == ("mine", "here")
    assert read("mine", "../there") == ("mine", "there")
    assert read(str(tmp_path / "here" / "mine"), "../there") == ("mine", "here")
    assert read("", "../there/mine") == ("mine", "there")
    assert read("", "mine") == ("mine", "here")
    monkeypatch.setenv("HYPERAX_DATA", str(tmp_path / "environment" / "mine"))
    assert read("") == ("mine", "environment")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYPERAX_DATA", str(tmp_path / "environment"))
    assert read("mine") == ("mine", "environment")
    with pytest.raises(ValueError, match=r"there.nobody or .*nobody is not a folder: check the path, --data-dir"):
        read("nobody", "there")
    monkeypatch.delenv("HYPERAX_DATA")
    with pytest.raises(ValueError, match="name your folder of class folders: --data-dir DIR or HYPERAX_DATA"):
        read("")


def test_fractions_are_disjoint_and_drawn_by_the_seed(tmp_path):
    write_folder(tmp_path / "mine", [f"c{n:02}" for n in range(10)])
    dataset = load_folder(tmp_path / "mine")
    names = [set(classes.names) for classes in dataset.splits.values()]
    assert [len(n) for n in names] == [6, 2, 2]
    assert len(set.union(*names)) == 10
    assert dataset.name == "mine"
    assert same(dataset, load_folder(tmp_path / "mine"))
    assert load_folder(tmp_path / "mine", seed=1).train.names != dataset.train.names
    for classes in dataset.splits.values():
        for name, start in zip(classes.names, classes.start, strict=True):
            assert classes.images[start, 0, 0, 0] == 10 * int(name[1:])
    assert [c.num_classes for c in load_folder(tmp_path / "mine", fractions=(0.98, 0.01, 0.01)).splits.values()] == [
        8,
        1,
        1,
    ]


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_three_subfolders(tmp_path, validation):
    for part, names in (("train", ["a", "b"]), (validation, ["c"]), ("test", ["d"])):
        write_folder(tmp_path / "mine" / part, names)
    dataset = load_folder(tmp_path / "mine")
    assert [classes.names for classes in dataset.splits.values()] == [("a", "b"), ("c",), ("d",)]
    write_folder(tmp_path / "mine" / "test" / "..x", [])
    write_folder(tmp_path / "mine" / "test", ["a"])
    with pytest.raises(ValueError, match=r"class\(es\) a are in two of the splits"):
        load_folder(tmp_path / "mine")


def test_every_mode_becomes_upright_opaque_rgb(tmp_path):
    root = tmp_path / "mine"
    write_folder(root, ["a", "b"])
    (root / "modes").mkdir()
    half = np.zeros((8, 16, 3), np.uint8)
    half[:, 8:] = 255  # left black, right white
    picture = Image.fromarray(half)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.rotate(180).save(root / "modes" / "exif.png", exif=exif)
    for mode, suffix in (("1", "png"), ("L", "png"), ("P", "png"), ("CMYK", "tiff"), ("RGB", "bmp")):
        picture.convert(mode).save(root / "modes" / f"{mode}.{suffix}")
    Image.fromarray((half[..., 0].astype(np.uint16)) * 257).save(root / "modes" / "sixteen.png")
    clear = Image.new("RGBA", (16, 8), (0, 0, 0, 255))
    clear.paste((90, 0, 0, 0), (8, 0, 16, 8))
    clear.save(root / "modes" / "rgba.png")
    palette = Image.fromarray(half[..., 0] // 255)
    palette.putpalette([0, 0, 0, 90, 0, 0])
    palette.save(root / "modes" / "transparent.png", transparency=1)
    dataset = load_folder(root, size=4)
    every = ImageClasses.join(*dataset.splits.values())
    (index,) = [i for i, name in enumerate(every.names) if name == "modes"]
    block = every.images[every.start[index] :][: every.count[index]].astype(int)
    assert block.shape == (9, 4, 4, 3)
    # The centred square of the 16 x 8 picture has the edge in its middle.
    for image in block:
        assert image[:, 0].max() < 40
        assert image[:, 3].min() > 215
    assert load_folder(root, size=4, mode="L").train.image_shape == (4, 4, 1)


def test_crop_keeps_the_centre_of_the_shorter_side(tmp_path):
    root = tmp_path / "mine"
    write_folder(root, ["a", "b"])
    (root / "tall").mkdir()
    rows = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None], 8, axis=1)  # 24 x 8
    Image.fromarray(rows).save(root / "tall" / "0.png")
    Image.fromarray(rows.astype(np.uint16) * 257).save(root / "tall" / "1.png")  # the same with 16 bits
    every = ImageClasses.join(*load_folder(root, mode="L").splits.values())
    start = every.start[every.names.index("tall")]
    np.testing.assert_array_equal(every.images[start : start + 2, :, :, 0], [rows[8:16], rows[8:16]])


def test_folder_errors(tmp_path, caplog):
    root = tmp_path / "mine"
    with pytest.raises(ValueError, match="is not a folder"):
        load_folder(root)
    root.mkdir()
    with pytest.raises(ValueError, match="holds no class folder"):
        load_folder(root)
    write_folder(root, ["a", "b"])
    with pytest.raises(ValueError, match=r"2 class folder\(s\).*three"):
        load_folder(root)
    with pytest.raises(ValueError, match=r"subfolder\(s\) train, val or validation, test"):
        load_folder(root, split="folders")
    (root / "c").mkdir()
    (root / "c" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"folder\(s\) c in .* hold no image"):
        load_folder(root)
    assert "notes.txt" in caplog.text, "what is left out is said"
    (root / "c" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ValueError, match=r"c/bad.png in .* is not a readable image"):
        load_folder(root)
    (root / "c" / "bad.png").unlink()
    (root / "c" / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"gone.png cannot be read"):
        load_folder(root)
    with pytest.raises(ValueError, match=r"sum to 1, not .* with the sum 1\.2"):
        ImageFolder("x", fractions=(0.5, 0.5, 0.2))
    with pytest.raises(ValueError, match="'auto', 'fractions', 'folders', not 'random'"):
        ImageFolder("x", split="random")  # type: ignore[arg-type]


def test_a_new_file_makes_a_new_entry(tmp_path):
    root = tmp_path / "mine"
    write_folder(root, ["a", "b", "c"])
    before = sum(load_folder(root).provenance["images"].values())
    Image.new("RGB", (8, 8)).save(root / "a" / "new.png")
    assert sum(load_folder(root).provenance["images"].values()) == before + 1


# Glyphs


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    pytest.importorskip("matplotlib")
    return Glyphs(size=20, images_per_class=4).load(cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_glyphs_sizes_and_ink(glyphs):
    assert glyphs.train.num_classes >= 400
    assert sum(classes.num_classes for classes in glyphs.splits.values()) >= 600
    assert min(glyphs.validation.num_classes, glyphs.test.num_classes) >= 40
    for classes in glyphs.splits.values():
        assert set(classes.count.tolist()) == {4}
        assert classes.image_shape == (20, 20, 1)
        assert (classes.images.max(axis=(1, 2, 3)) > 80).all(), "no image is blank"
        assert classes.images[:, [0, -1], :].mean() < 5, "paper is 0 and the ink is inside"
        flat = classes.images.reshape(classes.num_classes, 4, -1)
        assert all(len(np.unique(images, axis=0)) == 4 for images in flat), "images of a class differ"


def test_glyphs_are_split_by_script_and_look_different(glyphs):
    names = [set(classes.names) for classes in glyphs.splits.values()]
    assert len(set.union(*names)) == sum(map(len, names))
    scripts = [{name.split()[0] for name in n if " LETTER " in name} for n in names]
    assert not scripts[0] & scripts[1]
    assert not scripts[0] & scripts[2]
    assert not scripts[1] & scripts[2]
    every = set.union(*names)
    for alike in ("AΑА", "oοо", "CcСсϹ", "IΙІ|", "TТΤ", "ՕO"):
        assert len({unicodedata.name(character) for character in alike} & every) <= 1
    # Drawn in another way: no two characters are the same bitmap in the commonest face.
    from PIL import ImageDraw, ImageFont

    (sans,) = [path for path in glyphs_module._font_files() if path.name == "DejaVuSans.ttf"]
    font = ImageFont.truetype(str(sans), 24)
    box = bytes(font.getmask("\U0010ffff"))
    seen = {}
    for name in sorted(every):
        image = Image.new("L", (80, 60))
        ImageDraw.Draw(image).text((15, 10), unicodedata.lookup(name), font=font, fill=255)
        if bytes(font.getmask(unicodedata.lookup(name))) != box:  # other faces have those that this one lacks
            ink = image.crop(image.getbbox())
            assert seen.setdefault((ink.size, ink.tobytes()), name) == name


def test_glyphs_depend_on_the_seed_in_images_only(tmp_path, monkeypatch):
    serif = [path for path in glyphs_module._font_files() if path.name.startswith("DejaVuSerif")]
    monkeypatch.setattr(glyphs_module, "_font_files", lambda: serif)
    monkeypatch.setitem(glyphs_module._LETTERS, "test", ("ARMENIAN",))
    monkeypatch.setitem(glyphs_module._LETTERS, "train", ("GREEK",))
    monkeypatch.setattr(glyphs_module, "_SYMBOLS", ())
    load = lambda seed, cache: Glyphs(16, 2, seed).load(cache_dir=str(tmp_path / cache))
    first = load(0, "one")
    assert same(first, load(0, "two"))
    other = load(1, "one")
    assert other.train.names == first.train.names
    assert not np.array_equal(other.train.images, first.train.images)


def test_glyphs_options():
    with pytest.raises(ValueError, match="too small"):
        Glyphs(size=4)
    with pytest.raises(ValueError, match="2 or more"):
        Glyphs(images_per_class=1)


# The real archives

REAL = os.environ.get("HYPERAX_DATA")


@pytest.mark.skipif(not REAL, reason="set HYPERAX_DATA to the folder that holds omniglot/ and miniimagenet/")
class TestReal:
    def test_omniglot_characters(self):
        from hyperax.fewshot.datasets.omniglot import _characters
        from hyperax.fewshot.datasets.sources import Archive, find

        found = {}
        for part, count in (("background", 964), ("evaluation", 659)):
            with Archive(find("omniglot", [f"images_{part}.zip", f"images_{part}"], REAL, "")) as archive:
                characters = _characters(archive)
                assert len(characters) == count
                assert {len(drawings) for drawings in characters.values()} == {20}
                found[part] = characters
        ours = {}
        for part, text in (("background", BACKGROUND), ("evaluation", EVALUATION)):
            words = text.split()
            ours[part] = dict(zip(words[::2], map(int, words[1::2]), strict=True))
            for alphabet, count in ours[part].items():
                assert sum(name.startswith(alphabet + "/") for name in found[part]) == count

    def test_mini_imagenet_lists_and_a_few_images(self, tmp_path):
        from hyperax.fewshot.datasets.mini_imagenet import _read_csv
        from hyperax.fewshot.datasets.sources import find

        real = find("miniimagenet", ["images.zip"], REAL, "").parent
        with zipfile.ZipFile(real / "images.zip") as images, zipfile.ZipFile(tmp_path / "images.zip", "w") as few:
            for name, classes in (("train", 64), ("val", 16), ("test", 20)):
                labels = _read_csv(real / f"{name}.csv")
                assert (len(labels), sum(map(len, labels.values()))) == (classes, 600 * classes)
                rows = [(file, label) for label in list(labels)[:2] for file in labels[label][:3]]
                (tmp_path / f"{name}.csv").write_text("filename,label\n" + "".join(f"{f},{c}\n" for f, c in rows))
                for file, _ in rows:
                    few.writestr(f"images/{file}", images.read(f"images/{file}"))
        dataset = MiniImageNet().load(str(tmp_path), str(tmp_path / "cache"))
        assert [c.images.shape for c in dataset.splits.values()] == [(6, 84, 84, 3)] * 3
        assert dataset.train.images.std() > 30
