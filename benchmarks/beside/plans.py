"""The plans of a search's points in its folder, for sides that run the trials themselves."""

import logging
from pathlib import Path

import ray

from tunefleet.launch.cluster import joined_shape
from tunefleet.recipe.tune import read_search
from tunefleet.search.book import Book
from tunefleet.search.opening import open_space
from tunefleet.search.trials import Workshop
from tunefleet.storage import place


def put_plans(file: Path, root: Path) -> tuple[str, list[str], str]:
    """Plan every point of a search. Returns where its folder is, the names of its trials, and the cluster's address."""
    search = read_search(file)
    space = open_space(search)
    settings = space.common_recipe().ray
    address = str(settings.ray_address)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    folder = place(settings.ray_storage_path).child(space.common_recipe().run_name)
    shop = Workshop(space, search.tune, search.keys, joined_shape(settings), root, folder)
    ray.shutdown()
    book = Book(folder)
    for point in space.points():
        plan = shop.plan(point)
        branch = space.branches[point.branch]
        shop.put(book.add(point, branch.name, branch.method.name, 1, plan.batch.updates), plan)
    return folder.uri, [trial.name for trial in book.trials], address
