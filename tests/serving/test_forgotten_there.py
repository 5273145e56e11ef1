"""A person forgotten by HTTP is in no file and no log of the server."""

from urllib.parse import quote

from served import served, waited
from tiny import base_of, endless
from traces import spellings, traces

from mta.bank.bank import Bank
from mta.data.history import Item, Person

EVE = Person.of(
    'Quispe-Hoxha "zq" ann+7@exämple.org',
    [Item({"title": f'Xylogräd "{n}" <&>', "genres": "Drama", "rating": "4"}, time=float(n)) for n in range(4)],
)


def test_a_person_forgotten_by_http_is_in_no_file(tiny_bank_folder, tmp_path, cache, capfd, caplog):
    base = endless(base_of())
    bank, where = Bank.open(tiny_bank_folder, base), f"/v1/people/{quote(EVE.id, safe='')}"
    items = [{"fields": dict(item.fields), "time": item.time} for item in EVE.items]
    with served(base, bank, tmp_path) as here:
        store = here.service.store
        with here.http("admin") as http:
            for keep, part in ((True, items[:2]), (False, items[2:])):
                assert http.post(f"{where}/history", json={"items": part, "keep": keep}).status_code == 200
            assert http.post(f"{where}/personalize").status_code == 202
            waited(lambda: http.get(f"{where}/personalize").json())
            asked = {"model": f"person:{quote(EVE.id, safe='')}", "prompt": items[0]["fields"]["title"]}
            assert http.post("/v1/completions", json=asked | {"max_tokens": 4}).status_code == 200
            assert http.post("/v1/completions", json=asked | {"nonsense": EVE.id}).status_code == 400
            before = {what for _, what in traces([tmp_path], EVE, store)}
            assert before >= {"texts", "keyed hash"}
            assert "id" not in before
            report = http.delete(where).json()
        assert report == {"removed": True, "needs_rebuild": [], "exports_left": 0, "banks_unmarked": 0}
        assert traces([tmp_path], EVE, store) == []
    assert traces([tmp_path, tiny_bank_folder], EVE, store) == []
    out, err = capfd.readouterr()
    written = (out + err + caplog.text).encode()
    words = spellings(EVE.id).union(*(spellings(item["fields"]["title"]) for item in items))
    assert not [word for word in words if word in written]
