"""The models that a TOML can name."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from cli_calls import SMALL, call, refused
from fedprior import config, models, objective
from fedprior.compare import build

IMAGES = torch.zeros(2, 1, 28, 28)
TEXT = torch.zeros(2, 12, dtype=torch.int64)
DIGITS = '[run]\nrounds = 1\ncohort = 2\n[data]\nname = "digits"\nclients = 4\n'
GIVEN = {  # keys of [model], and the same model in Python
    "resnet": ("depth = 8\nwidth = 4", lambda: models.resnet(8, width=4)),
    "resnet, batch norm": ('depth = 14\nnorm = "batch"\nwidth = 2', lambda: models.resnet(14, "batch", 2)),
    "vit": (
        "patch = 2\nwidth = 12\nheads = 3\ndepth = 1\nhidden = 20",
        lambda: models.vit(8, patch=2, width=12, heads=3, depth=1, hidden=20),
    ),
    "mlp": ("hidden = [6, 5]", lambda: models.mlp(64, (6, 5))),
    "softmax": ("", lambda: models.softmax(64)),
}
WRONG = {
    "resnet": ("depth = 9", "depth 8, 14, 20, ... and norm 'batch' or 'group', got 9"),
    "vit": ("patch = 3", "a patch that divides the side of the images; got heads=4, width=48, patch=3, image=8"),
}


def section(name, keys):
    return f'{DIGITS}[model]\nname = "{name.split(",")[0]}"\n{keys}\n'


@pytest.mark.parametrize("name", config.MODELS)
def test_every_model_follows_from_the_data_and_is_a_toml(name, tmp_path):
    """All arguments are there once it is resolved; what is written is read again, and makes a model that fits."""
    text = name.startswith("char")
    x = TEXT if text else IMAGES
    call_of = config.resolve(config.Call(name), "digits", x, 7, 3)
    assert list(call_of.arguments) == list(inspect.signature(config.MODELS[name]).parameters)
    sections = {"model": {"name": name, **call_of.arguments}}
    parsed = config.parse(sections, tmp_path)
    (tmp_path / "run.toml").write_text(config.to_toml(parsed))
    assert config.read(tmp_path / "run.toml").model == parsed.model == call_of
    outputs = parsed.make_model()(x if name != "rules" and name != "elsa" else x.flatten(1))
    assert torch.is_tensor(outputs) or outputs


@pytest.mark.parametrize("name", GIVEN)
def test_a_toml_names_a_model_and_its_arguments(name, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(section(name, GIVEN[name][0]))
    made, wanted = (objective.params_of(m) for m in (build(config.read(path)).model, GIVEN[name][1]()))
    assert made.keys() == wanted.keys() and all(torch.equal(made[k], wanted[k]) for k in made)
    call("run", path, "--out", tmp_path / "out", "--quiet")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", WRONG)
def test_sizes_that_do_not_fit_are_one_line(name, tmp_path):
    (tmp_path / "my.toml").write_text(section(name, WRONG[name][0]))
    assert WRONG[name][1] in refused("run", tmp_path / "my.toml", "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_rows_of_a_table_are_no_images(name, tmp_path):
    """Four columns: as many as a patch is wide, so that there is such a model."""
    (tmp_path / "mine.csv").write_text(
        "a,b,c,d,y\n" + "".join(f"{i % 7},{i % 3},{i % 5},{i % 2},{'no' if i % 2 else 'yes'}\n" for i in range(60))
    )
    text = refused("compare", tmp_path / "mine.csv", "--target", "y", "--model", name, *SMALL)
    assert f"the model {name!r} does not fit examples of shape (4,)" in text


def test_the_help_and_the_readme_name_every_model():
    shown = " ".join(call("compare", "--help").stdout.split())
    (listed,) = re.findall(r"^Models, for .*?;", (Path(__file__).parent.parent / "README.md").read_text(), re.M | re.S)
    assert all(name in shown for name in config.MODELS)
    assert re.findall(r"`(\w+)`", listed)[1:] == list(config.MODELS)
