"""Tables are made from the recipes; every model has its page; what a recipe needs is brought along."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs as pafs

from jobs import train
from jobs.entry import CODE
from jobs.recipes import documents, listing
from models import MODELS, name_of
from pipelines.data.known import KNOWN
from pipelines.data.manifest import load_manifest
from pipelines.errors import FigmentError
from pipelines.recipes import FAMILIES, RECIPES
from pipelines.recipes.recipe import Downloaded, Generated, Recipe, Shipped
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
    for block, recipes in zip(blocks, FAMILIES.values(), strict=True):
        for name, recipe in recipes.items():
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
