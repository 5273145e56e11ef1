from pathlib import Path

import pytest
from files import TIME, fails

from mta.data.describe import describe
from mta.data.history import Item
from mta.data.readers import read_people
from mta.data.tasks import load_task
from mta.errors import DataError, InputError
from mta.system import assets


def recbole(tmp_path: Path, inter: str, item: str) -> Path:
    (tmp_path / "ml.inter").write_text(inter, encoding="utf-8")
    (tmp_path / "ml.item").write_text(item, encoding="utf-8")
    return tmp_path


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
MOVIES = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
MOVIE = f"{MOVIES}1\tToy Story\t1995\tComedy\n"


def test_recbole_ratings(tmp_path: Path) -> None:
    folder = recbole(
        tmp_path,
        f"{INTER}7\t1\t3.0\t881250949\n8\t2\t5\t1\n7\t2\t4\t5\n",
        f"{MOVIES}1\tToy Story\t1995\tAnimation Children's Sci-Fi\n2\tHeat (1995)\t1995\t(no genres listed)\n",
    )
    seven, eight = read_people(folder, "movielens-rating")
    assert seven.items == (
        Item({"title": "Heat (1995)", "genres": "unknown", "rating": "4"}, 5.0, "2"),
        Item({"title": "Toy Story (1995)", "genres": "Animation, Children's, Sci-Fi", "rating": "3"}, 881250949.0, "1"),
    )
    assert eight.items[0].fields["rating"] == "5"
    assert load_task("movielens-rating").prompt(seven.items[1]) == (
        'How many stars from 1 to 5 does this person give the movie "Toy Story (1995)" '
        "(Animation, Children's, Sci-Fi)? Answer with the number only."
    )
    with pytest.raises(DataError) as caught:
        read_people(folder, "lamp3")
    expected = "is a RecBole folder of ratings: it has title, genres, rating; task 'lamp3' needs text, score"
    assert caught.value.message == f"{folder} {expected}"


def test_labels_of_half_stars(tmp_path: Path) -> None:
    task = load_task("movielens-rating").model_copy(update={"labels": ("0.5", "1.0", "1.5")})
    (person,) = read_people(recbole(tmp_path, f"{INTER}7\t1\t1.0\t1\n", MOVIE), task)
    assert person.items[0].fields["rating"] == "1.0"


@pytest.mark.parametrize("name", ["ml.inter", "ml.item"])
def test_bad_rows_do_not_replace_a_file_of_ratings(tmp_path: Path, name: str) -> None:
    folder = recbole(tmp_path, f"{INTER}7\t1\t3\t1\n", MOVIE)
    with pytest.raises(InputError, match="it is an input file"):
        read_people(folder, "movielens-rating", skip_bad=tmp_path / name)


@pytest.mark.parametrize(
    ("inter", "item", "message"),
    [
        (f"{INTER}7\t9\t3\t1\n", MOVIE, "/ml.inter:2: field 'item_id': '9' is not in ml.item"),
        (
            f"{INTER}7\t1\t3.5\t1\n",
            MOVIE,
            "/ml.inter:2: field 'rating': unknown label '3.5'; expected one of: 1, 2, 3, 4, 5",
        ),
        (f"{INTER}7\t1\t3\tnow\n", MOVIE, f"/ml.inter:2: field 'timestamp': bad time 'now'; {TIME}"),
        (f"{INTER}\t1\t3\t1\n", MOVIE, "/ml.inter:2: field 'user_id': empty; expected some text"),
        (f"{INTER}7\t1\t3\n", MOVIE, "/ml.inter:2: expected 4 columns, got 3"),
        (
            f"{INTER}7\t1\t3\t1\n",
            f"{MOVIES}1\tToy Story\t1995\t\n",
            "/ml.inter:2: field 'genres': empty; expected some text",
        ),
        (f"{INTER}7\t1\t3\t1\n", f"{MOVIE}1\tHeat\t1995\tDrama\n", "/ml.item:3: field 'item_id': duplicate item '1'"),
        ("user_id:token\n", MOVIE, "/ml.inter:1: field 'item_id': no such column; got user_id"),
        ("", MOVIE, "/ml.inter is empty; expected a RecBole header, such as user_id:token item_id:token rating:token"),
        (INTER, MOVIE, " holds no people: no row could be used, 0 were bad"),
    ],
)
def test_bad_ratings(tmp_path: Path, inter: str, item: str, message: str) -> None:
    fails(recbole(tmp_path, inter, item), "movielens-rating", f"{tmp_path}{message}")


def test_a_recbole_folder_without_movies(tmp_path: Path) -> None:
    recbole(tmp_path, INTER, MOVIE)
    (tmp_path / "ml.item").unlink()
    fails(tmp_path, "movielens-rating", f"{tmp_path}: expected one file *.item, got none")


@pytest.mark.integration
def test_real_movielens() -> None:
    if not (assets.cache_dir() / "assets" / "movielens-100k").exists():
        pytest.skip("movielens-100k is not cached: mta.system.assets.fetch('movielens-100k') fetches it")
    people = read_people(assets.fetch("movielens-100k"), "movielens-rating")
    assert describe(people) == {"people": 943, "items": 100_000, "min": 20, "median": 65, "max": 737, "queries": 0}
