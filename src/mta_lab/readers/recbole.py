"""Reader of RecBole's atomic files of movie ratings: NAME.inter and NAME.item, tab separated, with typed headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mta.data.readers.rejects import Bad, Place, Records, Rejects, data_error
from mta.data.readers.rows import RecordPart, id_in, item_in
from mta.data.readers.stream import text_lines
from mta.data.tasks.task import Task
from mta.errors import DataError
from mta_lab.readers import only_file

FIELDS = ("title", "genres", "rating")
NO_GENRES = "(no genres listed)"  # as in MovieLens
COLUMNS = {  # field -> names of its column in different data sets
    "title": ("movie_title", "title", "item_name", "name"),
    "year": ("release_year", "year"),
    "genres": ("class", "genre", "genres"),
}


class RecBole:
    """A folder of RecBole's atomic files."""

    def opens(self, path: Path) -> bool:
        return path.is_dir() and any(path.glob("*.inter"))

    def knows(self, record: Mapping[str, Any]) -> bool:
        return False

    def parts(
        self, path: Path, records: Records | None, task: Task, rejects: Rejects, answers: bool
    ) -> Iterator[RecordPart]:
        """Yield one part per rating. Fields: title with its year, genres with commas, rating; time is the timestamp."""
        if set(task.fields()) != set(FIELDS):
            raise DataError(
                f"{path} is a RecBole folder of ratings: it has {', '.join(FIELDS)}; "
                f"task {task.name!r} needs {', '.join(task.fields())}",
                hint="Use task movielens-rating, or one with the same fields.",
            )
        inter, item = (
            only_file(path, pattern, hint="Give a folder with NAME.inter and NAME.item of one data set.")
            for pattern in ("*.inter", "*.item")
        )
        movies = _movies(item, rejects)
        for place, row in _table(inter, ("user_id", "item_id", "rating"), rejects):
            with rejects.skipping(place, row):
                movie = movies.get(row["item_id"])
                if movie is None:
                    raise Bad("item_id", f"{row['item_id']!r} is not in {inter.stem}.item")
                rating = {**row, **movie, "id": row["item_id"]}
                yield RecordPart(id_in(row, "user_id"), (item_in(rating, task, time="timestamp"),), place)

    def beside(self, path: Path) -> list[Path]:
        return [*path.glob("*.inter"), *path.glob("*.item")]


def _movies(path: Path, rejects: Rejects) -> dict[str, dict[str, str]]:
    movies: dict[str, dict[str, str]] = {}
    for place, row in _table(path, ("item_id",), rejects):
        if row["item_id"] in movies:
            rejects.add(place, "item_id", f"duplicate item {row['item_id']!r}", row)
            continue
        title, year, genres = (_column(row, name) for name in COLUMNS)
        if year.isdecimal() and not title.endswith(f"({year})"):
            title = f"{title} ({year})"
        genres = "unknown" if genres == NO_GENRES else ", ".join(genres.split(" "))
        movies[row["item_id"]] = {"title": title, "genres": genres}
    return movies


def _column(row: dict[str, str], name: str) -> str:
    return next((row[column].strip() for column in COLUMNS[name] if column in row), "")


def _table(path: Path, needed: tuple[str, ...], rejects: Rejects) -> Iterator[tuple[Place, dict[str, str]]]:
    names: list[str] | None = None
    for line, text in text_lines(path, rejects):
        place, cells = Place(path, line), text.split("\t")
        if names is None:
            names = [cell.partition(":")[0] for cell in cells]
            if missing := [name for name in needed if name not in names]:
                got = ", ".join(names)
                raise data_error(
                    place,
                    missing[0],
                    f"no such column; got {got}",
                    hint=f"Name the columns in the first line, such as  {_header(needed)}",
                )
        elif len(cells) != len(names):
            rejects.add(place, None, f"expected {len(names)} columns, got {len(cells)}", text)
        else:
            yield place, dict(zip(names, cells))
    if names is None:
        raise DataError(
            f"{path} is empty; expected a RecBole header, such as {_header(needed)}",
            hint="Write the header line, or download the data set again.",
        )


def _header(names: tuple[str, ...]) -> str:
    return " ".join(f"{name}:token" for name in names)


FORMAT = RecBole()
