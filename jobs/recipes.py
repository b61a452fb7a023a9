"""The recipes by family, with their data and what they take: `python -m jobs.recipes`.

`--write` makes the tables of README.md and models/README.md anew from the recipes and the registered models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs.entry import CODE, run_job
from models import MODELS, name_of
from pipelines.errors import FigmentError
from pipelines.recipes import FAMILIES, RECIPES
from pipelines.recipes.recipe import Downloaded, Fetched, Generated, Origin, Recipe, Shipped


@dataclass(frozen=True)
class Arguments:
    write: bool = False
    """Write the tables into README.md and models/README.md."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m jobs.recipes", description=__doc__)
    if not arguments.write:
        print(listing())
        return
    for path, text in documents(CODE).items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"written: {path.relative_to(CODE)}")


def listing() -> str:
    """Every recipe by family: what it is, its data, what it takes and what is expected of it."""
    lines = []
    for family, recipes in FAMILIES.items():
        lines.append(f"{family}:")
        for name, recipe in recipes.items():
            lines.append(f"  {name:<20} {recipe.summary}")
            lines.append(f"  {'':<20} data {recipe().data.dataset}, {origin_in_words(recipe.origin)}")
            lines.append(f"  {'':<20} {recipe.takes}; expected figure: {expected_in_words(recipe)}")
        lines.append("")
    return "\n".join(lines).rstrip()


def origin_in_words(origin: Origin) -> str:
    match origin:
        case Shipped():
            return "shipped"
        case Generated():
            return f"made by {origin.script}"
        case Downloaded():
            return "downloaded"
        case Fetched():
            return "fetched by you"


def expected_in_words(recipe: Recipe) -> str:
    expected = recipe().expected
    if expected is None:
        return "not reached yet"
    return f"{expected.metric} {'≤' if expected.better == 'lower' else '≥'} {expected.bound:g}"


def documents(root: Path) -> dict[Path, str]:
    """What the files that hold tables should say; the rest of them stays as it is."""
    return {
        root / "README.md": _with_table(root / "README.md", "recipes", _recipe_table()),
        root / "models/README.md": _with_table(root / "models/README.md", "models", _model_table()),
    }


def _recipe_table() -> Iterator[str]:
    yield "| recipe | model | what | data | takes | expected |"
    yield "|---|---|---|---|---|---|"
    for name, recipe in RECIPES.items():
        model = MODELS[name_of(recipe().model)].title
        data = f"`{recipe().data.dataset}`, {origin_in_words(recipe.origin)}"
        row = (f"`{name}`", model, recipe.summary, data, recipe.takes, expected_in_words(recipe))
        yield f"| {' | '.join(row)} |"


def _model_table() -> Iterator[str]:
    yield "| model | file | paper | equations | recipes | expected figures |"
    yield "|---|---|---|---|---|---|"
    for name, model in MODELS.items():
        file = "/".join(model.config.__module__.split(".")[1:]) + ".py"
        paper = f"{model.paper}, [{model.arxiv}](https://arxiv.org/abs/{model.arxiv})"
        recipes = ", ".join(f"`{key}`" for key, recipe in RECIPES.items() if name_of(recipe().model) == name)
        page = f"docs/models/{name}.md"
        yield (
            f"| {model.title} | [{file}]({file}) | {paper} | {model.equations} | {recipes} |"
            f" [{page}](../{page}#expected-figures) |"
        )


def _with_table(path: Path, name: str, lines: Iterator[str]) -> str:
    """The text of `path` with the lines between `<!-- table: NAME -->` and `<!-- end -->` replaced."""
    table = re.compile(rf"(<!-- table: {name}[^\n]*-->\n).*?(\n<!-- end -->)", re.DOTALL)
    text = path.read_text()
    if len(table.findall(text)) != 1:
        raise FigmentError(f"{path} has no place for its table: `<!-- table: {name} -->`, the table, `<!-- end -->`")
    body = "\n".join(lines)
    return table.sub(lambda found: found[1] + body + found[2], text)


if __name__ == "__main__":
    run_job(main)
