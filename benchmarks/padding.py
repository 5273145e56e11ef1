"""``python -m benchmarks.padding movielens-100k movielens-rating``: the share of padding among computed tokens."""

import sys
from itertools import chain

from mta.config import Run
from mta.data.readers import read_people
from mta.data.tasks.load import load_task
from mta.model.base import BaseModel
from mta.system import assets
from mta.training.packing import TOKENS, pack_for
from mta.training.trainer import _passes

if len(sys.argv) != 3:
    sys.exit(__doc__)
data, name = sys.argv[1:]
task, base = load_task(name), BaseModel.of(Run.model_validate({"base": "smollm2-135m-instruct", "max_tokens": 512}))
people = [person for person in read_people(assets.resolve(data), name) if len(person.items) >= 8][:64]
shots = [list(chain(*base.prompts.all(task, person.items[:8]))) for person in people]
shots.sort(key=lambda own: sum(len(example.tokens) for example in own))  # as the trainer does
rows = [pack_for(base, own, TOKENS) for own in shots]
passes = [part.rows for part in _passes(rows, TOKENS, base.footprint.target_weight)]
computed = sum(len(part) * max(len(row.tokens) for row in part) for part in passes)
kept = sum(len(row.tokens) for part in passes for row in part)
print(f"{len(people)} people: {kept} tokens in trees, {computed} computed, padding {1 - kept / computed:.1%}")
