"""Tables are made from the recipes; every model has its page; what a recipe needs is brought along."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from jobs import recipes, train
from jobs.entry import CODE
from jobs.recipes import documents, listing
from models import MODELS, name_of
from pipelines.data.known import KNOWN
from pipelines.data.manifest import load_manifest
from pipelines.errors import FigmentError
from pipelines.objects import write_json
from pipelines.recipes import FAMILIES, RECIPES
from pipelines.recipes.recipe import Downloaded, Generated, Recipe, Shipped
from pipelines.training.reporter import Outcome
from tests.pipelines.training.toys import toy_spec


@pytest.mark.parametrize("path", ["README.md", "models/README.md"])
def test_the_tables_say_what_the_recipes_say(path: str) -> None:
    assert (CODE / path).read_text() == documents(CODE)[CODE / path], "run `make tables`"


def test_a_file_without_a_place_for_its_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# nothing\n")
    with pytest.raises(FigmentError, match=r"README.md has no place for its table: `<!-- table: recipes -->`"):
        documents(tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_recipe_and_a_page_that_names_its_recipes_and_expected_figures(model: str) -> None:
    own = [name for name, recipe in RECIPES.items() if name_of(recipe().model) == model]
    page = (CODE / "docs" / "models" / f"{model}.md").read_text()
    assert own and [name for name in own if name not in page] == []
    for heading in ("What differs from the original", "Run it", "What the logged numbers mean", "Expected figures"):
        assert f"\n## {heading}\n" in page, heading


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_known_by_its_own_name_and_says_what_it_is(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe().recipe == name
    recipe().check()
    assert recipe.summary.endswith(".") and len(recipe.summary) < 100
    if isinstance(recipe.origin, Shipped):
        assert (CODE / recipe.origin.path).exists()
    if isinstance(recipe.origin, Downloaded):
        assert recipe.origin.name in KNOWN
    if isinstance(recipe.origin, Generated):
        assert (CODE / recipe.origin.script).is_file()


def test_the_list_names_every_recipe_under_its_family_with_data_and_time() -> None:
    blocks = listing().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [f"{family}:" for family in FAMILIES]
    for block, family in zip(blocks, FAMILIES.values(), strict=True):
        for name, recipe in family.items():
            assert f"  {name} " in block
            assert f"data {recipe().data.dataset}, " in block and recipe.takes in block


MAKES_IDX_FILES = """
import pathlib, struct, sys
for prefix in ("train", "t10k"):
    images, labels = (pathlib.Path(sys.argv[1], f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images.write_bytes(struct.pack(">4i", 0x803, 3, 8, 8) + bytes(range(192)))
    labels.write_bytes(struct.pack(">2i", 0x801, 3) + bytes((0, 1, 0)))
"""


def _recipe(origin: object) -> Recipe:
    return Recipe(lambda: toy_spec("vae"), origin, "2 CPU cores")  # type: ignore[arg-type]


def test_a_recipe_brings_what_the_storage_has_not(
    store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by a script of the repository, once: a second time the storage has it, and the script is not run."""
    script = tmp_path / "make.py"
    script.write_text(MAKES_IDX_FILES)
    monkeypatch.setattr(train, "CODE", tmp_path)
    url = str(tmp_path / "store")
    train.bring_data("toy", _recipe(Generated("make.py")), store, url)
    made = load_manifest(store, "toy")
    assert (made.rows("train"), made.rows("test")) == (3, 3)
    assert made.source["url"] == "make.py", "not a folder that is gone by now"
    script.write_text("raise SystemExit(3)")
    train.bring_data("toy", _recipe(Generated("make.py")), store, url)
    store.delete_dir("datasets")
    with pytest.raises(FigmentError, match=r"make.py, which makes data set 'toy', ended with code 3"):
        train.bring_data("toy", _recipe(Generated("make.py")), store, url)


def test_data_that_only_the_user_can_fetch_are_named_with_the_command(store: pafs.FileSystem) -> None:
    with pytest.raises(FigmentError, match=r"ILSVRC2012_img_train.tar.*--size 64 --dataset-name imagenet64"):
        train.bring_data("imagenet64", RECIPES["dcgan-imagenet64"], store, "/nowhere")


@pytest.mark.parametrize("dataset", ["another", "toy@0123456789ab"])
def test_data_that_are_not_the_recipes_own_are_not_brought(dataset: str, store: pafs.FileSystem) -> None:
    with pytest.raises(FigmentError, match=rf"no data set '{dataset}', and --ingest only brings the recipe's own"):
        train.bring_data(dataset, _recipe(Downloaded("mnist")), store, "/nowhere")


def _shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    (tmp_path / "make.py").write_text(MAKES_IDX_FILES)
    (tmp_path / "data").mkdir()
    subprocess.run([sys.executable, str(tmp_path / "make.py"), str(tmp_path / "data")], check=True)
    monkeypatch.setattr(train, "CODE", tmp_path)
    return _recipe(Shipped("data"))


def test_a_version_that_is_there_is_taken_and_one_that_is_not_is_named(
    store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, url = _shipped(tmp_path, monkeypatch), str(tmp_path / "store")
    train.bring_data("toy", recipe, store, url)
    made = load_manifest(store, "toy")
    assert made.source["url"] == "data", "as the recipe names it, wherever this copy of the code lies"
    train.bring_data(f"toy@{made.version}", recipe, store, url)
    with pytest.raises(FigmentError, match="no data set 'toy@0123'"):
        train.bring_data("toy@0123", recipe, store, url)


def test_data_that_cannot_be_read_are_not_ingested_again(
    store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _shipped(tmp_path, monkeypatch)
    write_json(store, "datasets/toy/abcdef012345/manifest.json", {"format": "figment-dataset-9"})
    with pytest.raises(FigmentError, match="has format 'figment-dataset-9'"):
        train.bring_data("toy", recipe, store, str(tmp_path / "store"))


def test_a_finished_run_is_shown_again_without_its_data(
    store: pafs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of this recipe could not even be brought."""
    spec = RECIPES["dcgan-imagenet64"]()
    known = {"identity": spec.identity, "dataset": "imagenet64@0123456789ab", "spec": spec.to_dict()}
    write_json(store, "runs/done/run.json", known)
    outcome = Outcome("done", spec.training.images, 1.0, 1.0, {}, "", "", "runs/done", [], "samples.png", "a.mp4", None)
    write_json(store, "runs/done/outcome.json", asdict(outcome))
    monkeypatch.setattr(train, "connect_ray", lambda: None)
    arguments = ["train", spec.recipe, "--name", "done", "--ingest", "--store", str(tmp_path / "store")]
    monkeypatch.setattr(sys, "argv", arguments)
    train.main()
    assert "run 'done' is complete" in capsys.readouterr().out
    arguments[3] = "new"
    with pytest.raises(FigmentError, match="which only you can fetch"):
        train.main()
    arguments.remove("--ingest")
    with pytest.raises(FigmentError, match=r"no complete data set 'imagenet64'.*--ingest brings the data of recipe"):
        train.main()


def test_written_tables_are_what_the_recipes_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("README.md", "models/README.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((CODE / path).read_text().replace("`dcgan-demo`", "`old`"))
    monkeypatch.setattr(recipes, "CODE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes", "--write"])
    recipes.main()
    for path in ("README.md", "models/README.md"):
        assert (tmp_path / path).read_text() == (CODE / path).read_text()
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text() * 2)
    with pytest.raises(FigmentError, match="has no place for its table"):
        recipes.main()
