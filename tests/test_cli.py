"""The command line: what it says, what it refuses and how; and what `import hyperax` brings."""

import dataclasses
import inspect
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

import hyperax
import tiny
from hyperax import experiments, fewshot
from hyperax.cli import main
from hyperax.experiments import few_shot, preparing
from hyperax.stopping import DivergenceWarning

pytest.importorskip("tyro")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


# A process of its own


def test_importing_hyperax_imports_nothing_but_jax_and_its_company():
    modules = "print(*sorted({name for name in sys.modules if 'test' not in name}))"
    code = f"import sys, hyperax; {modules}; import hyperax.fewshot; {modules}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    alone, with_fewshot = (set(line.split()) for line in found.splitlines())
    extras = {"PIL", "matplotlib", "rich", "tyro", "pooch", "requests", "hyperax.experiments"}
    assert not alone & (extras | {"sklearn", "orbax", "scipy.stats", "hyperax.fewshot"})
    assert {"jax", "equinox", "optax", "jaxtyping", "numpy"} <= alone
    assert not with_fewshot & extras
    assert "hyperax.fewshot" in with_fewshot


def in_ascii(*words):
    """The command, with streams and warnings as PYTHONIOENCODING=ascii and PYTHONWARNINGS=error make them."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")
    warnings.simplefilter("error")
    return main(words)


def test_a_narrow_encoding_and_a_closed_pipe_do_no_harm(tmp_path):
    (tmp_path / "here").mkdir()
    log, here = tmp_path / "said.log", tmp_path / "here"

    def refused(*words):
        process = tiny.begin(log, here, in_ascii, *words)
        process.join(60)
        assert process.exitcode == 2
        return log.read_text("ascii")

    told = refused("run", "glyphs-5way-1shot", "--wayz", "3")
    assert "Unrecognized options: --wayz" in told
    assert "--ways INT" in told
    assert "\x1b" not in told
    assert refused("report", "Ωmega").startswith("hyperax: ")
    with subprocess.Popen(
        [sys.executable, "-m", "hyperax", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert not list(here.iterdir())


# In this process


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Run a command in an empty folder and return the one sentence with which it is refused."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("HYPERAX_DATA", raising=False)
    monkeypatch.setattr(few_shot, "minimize", lambda *_, **__: pytest.fail("the work began"))

    def refuse(*words):
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("hyperax: ")
        assert captured.err.count("\n") == 1
        assert not list(Path.cwd().iterdir()), "something was left behind"
        return captured.err

    return refuse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "there is no command 'train': use list, run, resume, join, report, data"),
        (["run"], "something is missing: hyperax run RECIPE"),
        (["run", "omniglot-5way"], "there is no recipe 'omniglot-5way': did you mean omniglot-"),
        (["run", "x"], "known are glyphs-5way-1shot, omniglot-5way-1shot"),
        (["list", "all"], "takes nothing else"),
        (["resume", "nowhere"], "nowhere is not a run folder"),
        (["resume", "--progress"], "something is missing"),
        (["report", "nowhere"], "there is no folder nowhere"),
        (["report", "a", "b"], "takes a folder and nothing else"),
        (["data", "lose", "omniglot"], "there is no `hyperax data lose`"),
        (["data", "show", "faces"], "there is no data set 'faces': use glyphs, omniglot"),
        (["data", "fetch", "miniimagenet"], "cannot be downloaded"),
        (["run", "glyphs-5way-1shot", "--ways", "1"], "ways must be a whole number, at least 2"),
        (["run", "glyphs-5way-1shot", "--checkpoint-every", "0"], "checkpoint_every is 0"),
        (["run", "omniglot-5way-1shot", "--data-dir", "nowhere"], "run `hyperax data fetch omniglot`"),
        (["run", "miniimagenet-c4l-1shot", "--data-dir", "nowhere"], "miniImageNet cannot be downloaded"),
        (["run", "folder-5way-1shot", "--dataset.path", "nowhere"], "nowhere is not a folder"),
        (["run", "folder-5way-1shot"], "name your folder of class folders: --data-dir DIR or HYPERAX_DATA"),
        (["data", "show", "imagefolder"], "name your folder of class folders"),
        (["run", "folder-5way-1shot", "--dataset.path", "."], "here holds no class folder: put the images"),
        (["run", "folder-5way-1shot", "--data-dir", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_words_that_make_no_sense(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": 6}, "has 6 images and an episode needs 7 (1 shots, 6 queries)"),
        ({"ways": 4}, "4-way episodes need 4 classes and the validation set has 3"),
        ({"train_ways": 5}, "5-way episodes need 5 classes and the training set has 4"),
        ({"network": "c4l"}, "C4L needs images of at least 16 x 16 pixels and one channel; these are 12 x 12 x 1"),
        ({"network": "rn"}, "ResidualNet needs images of at least 16 x 16"),
        ({"dataset.size": 8}, "OmniglotNet needs images of at least 9 x 9"),
    ],
)
def test_images_that_cannot_give_the_run(refused, images, changes, message):
    assert message in refused("run", *tiny.options(images, **changes))


@pytest.mark.parametrize(
    ("classes", "more", "message"),
    [
        (
            15,
            {},
            "5-way episodes need 5 classes in each of the three parts, so at least 15 in all, and this folder has 15, "
            "split 10/2/3: use --dataset.fractions 0.34 0.33 0.33 or fewer ways",
        ),
        (14, {}, "this folder has 14, split 9/2/3: add classes or use fewer ways"),
        (
            15,
            {"train_ways": 6, "ways": 4},
            "4-way episodes, 6-way in training, need 6/4/4 classes, so at least 14 in all, and this folder has 15, "
            "split 10/2/3: use --dataset.fractions 0.46 0.27 0.27",
        ),
    ],
)
def test_a_small_folder(refused, tmp_path, classes, more, message):
    images = tiny.write_images(tmp_path / "images", (classes, 0, 0), images=3) / "train"
    assert message in refused("run", *tiny.options(images, **{"ways": 5, **more}))


def test_damaged_images(refused, tmp_path):
    images = tiny.write_images(tmp_path / "images")
    words = tiny.options(images)
    broken = images / "val" / "val1" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert "val/val1/2.png in " in (told := refused("run", *words))
    assert "is not a readable image" in told
    broken.unlink()
    (images / "val" / "train0").mkdir()
    (images / "train" / "train0" / "0.png").rename(images / "val" / "train0" / "0.png")
    assert "train0 are in two of the splits" in refused("run", *words)


def test_damaged_archives(refused, tmp_path):
    data = tmp_path / "data"
    (data / "omniglot").mkdir(parents=True)
    for part in ("background", "evaluation"):
        with zipfile.ZipFile(data / "omniglot" / f"images_{part}.zip", "w") as archive:
            archive.writestr(f"images_{part}/Greek/character01/0001_01.png", bytes(2000))
    words = ("run", "omniglot-5way-1shot", "--data-dir", data)
    assert "defined on Omniglot's 1623 characters, and these archives have 2" in refused(*words)
    archive = data / "omniglot" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:1000])
    assert "images_evaluation.zip is not a readable zip archive" in refused(*words)
    archive.unlink()
    assert "there is no images_evaluation.zip" in refused(*words)

    (data / "miniimagenet" / "images").mkdir(parents=True)
    words = ("run", "miniimagenet-c4l-1shot", "--data-dir", data)
    assert "there is no" in refused(*words)
    for name in ("train", "val", "test"):
        (data / "miniimagenet" / f"{name}.csv").write_text(f"filename,label\n{name}.jpg,{name}\n")
    assert "names 1 image(s) that" in (told := refused(*words))
    assert "(train.jpg)" in told


def test_a_folder_in_use_is_refused_before_any_work(refused, images, tmp_path, monkeypatch):
    monkeypatch.setattr(few_shot, "load_dataset", lambda *_: pytest.fail("the images were read"))
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    words = ("run", *tiny.options(images), "--out")
    assert f"{used} is not empty: --out names" in refused(*words, used)
    assert f"{used / 'thesis.txt'} is a file" in refused(*words, used / "thesis.txt")
    (used / "config.json").write_text("{}")
    assert f"`hyperax resume {used}` goes on with it" in refused(*words, used)
    assert sorted(path.name for path in used.iterdir()) == ["config.json", "thesis.txt"]
    assert "not the configuration of a few-shot run" in refused("resume", used)
    (used / "config.json").write_text('{"ways": ')
    assert "config.json is damaged" in refused("resume", used)
    (used / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is damaged" in refused("resume", used)


def test_a_folder_that_cannot_be_made(refused, images, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("run", *tiny.options(images), "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "glyphs-5way-1shot", "--wayz", "3"], "--ways INT"),
        (["run", "glyphs-5way-1shot", "--ways", "many"], "Error parsing --ways"),
        (["run", "glyphs-5way-1shot", "--schedule", "linear"], "inverse-time"),
        (["run", "glyphs-5way-1shot", "--dataset.size", "2"], "size 2 is too small to tell characters apart"),
        (["resume", "somewhere", "--seed", "1"], "Unrecognized options: --seed"),
    ],
)
def test_unknown_options(words, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert told in " ".join((captured.out + captured.err).split())


def test_every_field_is_an_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "omniglot-20way-5shot-papers", "--help"])
    assert not stop.value.code
    told = capsys.readouterr().out
    fields = [*few_shot.FewShotConfig.__dataclass_fields__, "published.accuracy", "dataset.split", "dataset.rotations"]
    for name in set(fields) - {"dataset", "published"}:
        assert f"--{name.replace('_', '-')} " in told or f"--{name.replace('_', '-')}," in told


@pytest.mark.parametrize("words", [[], ["--help"], ["help"], ["run", "--help"], ["data", "-h"]])
def test_help(words, capsys):
    assert main(words) == 0
    assert "hyperax resume DIR" in capsys.readouterr().out


def test_list(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(experiments.recipes())
    assert any("omniglot-5way-1shot " in line and "98.60 % in Franceschi" in line for line in lines)


def test_data_show(images, capsys):
    assert main(["data", "show", "imagefolder", "--path", str(images), "--size", "12", "--mode", "L"]) == 0
    assert "12 x 12 x 1" in capsys.readouterr().out


def test_data_show_of_the_data_folder(images, monkeypatch, capsys):
    monkeypatch.setenv("HYPERAX_DATA", str(images))
    assert main(["data", "show", "imagefolder", "--size", "12", "--mode", "L"]) == 0
    assert "12 x 12 x 1" in capsys.readouterr().out


def test_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["run", "glyphs-5way-1shot"]) == 2
    assert "pip install 'hyperax[run]' (from a clone: pip install -e '.[run]')" in capsys.readouterr().err


def test_a_run_that_diverged_ends_with_its_advice_and_status_1(images, tmp_path, monkeypatch, capsys):
    said = "diverged at step 6: f_T is not finite. The last good lam was kept. Try a smaller inner step size."

    def diverge(config, out, **options):
        warnings.warn(said, DivergenceWarning, stacklevel=1)
        return {"recipe": config.recipe, "test": {"accuracy": 0.5, "ci95": 0.01}, "stopped": said}

    monkeypatch.setattr(experiments, "run", diverge)
    assert main(["run", *tiny.options(images), "--out", str(tmp_path / "run")]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"hyperax: {said}\n"
    assert "this run   50.00 ± 1.00" in captured.out


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupt_says_how_to_go_on(begun, images, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(few_shot, "minimize" if begun else "load_dataset", interrupt)
    monkeypatch.setitem(preparing._NETWORKS, "omniglot", tiny.Network)
    out = tmp_path / "run"
    assert main(["run", *tiny.options(images)[:-1], "--out", str(out)]) == 130
    told = capsys.readouterr().err
    assert (f"run folder: {out}\n" in told) == begun
    assert (f"go on with: hyperax resume {out}" in told) == begun
    assert out.exists() == begun


# The public names


@pytest.mark.parametrize("name", hyperax.__all__)
def test_public_names_are_documented(name):
    public = getattr(hyperax, name)
    if not callable(public):
        return
    text = inspect.getdoc(public) or ""
    assert text.split("\n\n")[0].rstrip().endswith((".", ":")), "one sentence first"
    if inspect.isfunction(public):
        sections = ["Arguments:", "Returns:", "Raises:", "Cost", ">>> "]
        sections += [] if name == "hypergradient" else ["Do not use"]  # of the verb itself, its methods say it
    elif issubclass(public, Warning) or inspect.isabstract(public) or issubclass(public, tuple) or "Fields:" in text:
        return  # nothing that a user makes
    else:
        made_with = [field for field in dataclasses.fields(public) if field.init]
        sections = ["Cost", "Do not use", ">>> ", *(["Arguments:"] if made_with else [])]
    assert [section for section in sections if section not in text] == []


PUBLIC = [(module, name) for module in (fewshot, experiments) for name in module.__all__]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_public_names_of_few_shot_learning_are_documented(module, name):
    public = getattr(module, name)
    text = inspect.getdoc(public) or ""
    assert text.split("\n\n")[0].rstrip().endswith((".", ":")), "one sentence first"
    sections = [">>> "]
    if inspect.isfunction(public):
        sections += ["Returns:", *(["Arguments:"] if inspect.signature(public).parameters else [])]
    assert [section for section in sections if section not in text] == []
